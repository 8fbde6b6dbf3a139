from __future__ import annotations

from collections import deque

import pytest
from edgedaq.followers import Follower, Followers
from edgedaq.frame import Frame, Kind, decode, encode, pack_map
from edgedaq.missing import MISSED, Gap, GapFinder
from edgedaq.ring_control import InputPolicy
from hypothesis import given
from hypothesis import strategies as st

STREAM = 77


def stream_of(sizes: list[int]) -> list[Frame]:
    """Return an OPEN, frames of that many rows (a GAP of as many where negative), and a CLOSE."""
    raws, row = [encode(Kind.OPEN, STREAM, 0)], 0
    for seq, size in enumerate(sizes, start=1):
        if size < 0:
            body = pack_map({"last": seq, "rows": -size, "reason": "overrun"})
            raws.append(encode(Kind.GAP, STREAM, seq, body, row0=row))
        else:
            raws.append(encode(Kind.PACKED, STREAM, seq, bytes(size), rows=size, row0=row))
        row += abs(size)
    raws.append(encode(Kind.CLOSE, STREAM, len(sizes) + 1, row0=row))
    return [decode(memoryview(raw)) for raw in raws]


@given(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=1))
def test_what_comes_and_what_the_gaps_say_is_always_all(frames: list[tuple[int, bool]]) -> None:
    finder = GapFinder({})
    comes = [True, *(wanted for _, wanted in frames), True]
    rows = 0
    told: list[Gap] = []
    for frame, is_there in zip(stream_of([size for size, _ in frames]), comes, strict=True):
        if is_there:
            is_news, gaps = finder.take(frame)
            assert is_news
            rows += frame.rows
            told += gaps
    assert rows + sum(gap.rows or 0 for gap in told) == sum(abs(size) for size, _ in frames)
    seqs = [gap.first for gap in told]
    assert seqs == sorted(set(seqs)), "no gap is told twice"


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1))
def test_the_end_of_a_life_tells_of_what_never_came(frames: list[tuple[int, bool]]) -> None:
    finder = GapFinder({})
    rows = 0
    for frame, (_, is_there) in zip(stream_of([size for size, _ in frames])[1:], frames, strict=False):
        if is_there:
            rows += frame.rows + sum(gap.rows or 0 for gap in finder.take(frame)[1])
    total = sum(size for size, _ in frames)
    rows += sum(gap.rows or 0 for gap in finder.finish({STREAM: (len(frames) + 2, total)}))
    assert rows == total
    assert finder.finish({STREAM: (len(frames) + 2, total)}) == []


def test_a_frame_that_was_had_is_no_news_and_a_gap_tells_only_of_the_rest() -> None:
    frames = stream_of([10, 10, 10])
    finder = GapFinder({STREAM: (2, 10)})
    assert finder.take(frames[1]) == (False, [])
    assert finder.take(frames[2]) == (True, [])
    body = pack_map({"last": 5, "rows": 40, "reason": "damaged"})
    whole = decode(memoryview(encode(Kind.GAP, STREAM, 1, body, row0=0)))
    assert finder.take(whole) == (True, [Gap(STREAM, 3, 5, 20, "damaged")])
    assert finder.take(whole) == (False, [])


def test_where_nobody_knows_what_was_had_the_first_frame_is_the_begin() -> None:
    frames = stream_of([10, 10, 10, 10])
    finder = GapFinder(None)
    assert finder.take(frames[2]) == (True, [])
    assert finder.take(frames[4]) == (True, [Gap(STREAM, 3, 3, 10, MISSED)])


class Ring:
    """A ring without anything around it: frames in, and what one follower is sent."""

    def __init__(self, policy: InputPolicy, limit_bytes: int, size: int = 4096) -> None:
        self.memory = bytearray(size)
        self.followers = Followers(memoryview(self.memory))
        self.follower: Follower = self.followers.add("f", ["store"], policy, limit_bytes)
        self.head = self.seq = self.row = 0
        self.sent: deque[int] = deque()
        self.got: list[Frame] = []

    def publish(self, rows: int) -> None:
        self.seq += 1
        raw = encode(Kind.PACKED, STREAM, self.seq, bytes([self.seq % 256]) * rows, rows=rows, row0=self.row)
        at = self.head % len(self.memory)
        if at + len(raw) > len(self.memory):
            self.head += len(self.memory) - at
            at = 0
        self.memory[at : at + len(raw)] = raw
        self.row += rows
        self.followers.on_publish(STREAM, ("store.X",), self.head, len(raw), rows)
        self.head += len(raw)

    def send(self) -> None:
        for _, _, copies in self.followers.take():
            joined = memoryview(b"".join(copies.parts))
            while joined:
                frame = decode(joined)
                self.got.append(frame)
                joined = joined[len(frame.raw) :]
            self.sent.append(copies.end)

    def release(self) -> None:
        while self.sent:
            self.followers.release(b"route", self.sent.popleft())


STEPS = st.lists(
    st.sampled_from(["publish", "publish", "publish", "send", "release", "leave", "come"]), max_size=60
)


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
@given(steps=STEPS, sizes=st.randoms(use_true_random=False))
def test_whatever_happens_a_follower_gets_or_misses_all_since_what_it_had(
    policy: InputPolicy, steps, sizes
) -> None:
    ring = Ring(policy, 1500)
    begin = 0
    finder = GapFinder({})
    for step in [*steps, "come", "publish", "send"]:
        if step == "publish":
            ring.publish(sizes.randrange(700))
        elif step == "send":
            ring.send()
        elif step == "release":
            ring.release()
        elif step == "leave":
            ring.followers.disconnect(b"route")
        else:  # a new process, which knows what it is told
            ring.followers.connect(ring.follower, b"route")
            ring.sent.clear()
            ring.got.clear()
            finder = GapFinder(ring.follower.had)
            begin = ring.follower.had.get(STREAM, (1, 0))[1]
        waiting = (*ring.follower.copied, *ring.follower.waiting)
        assert ring.follower.waiting_bytes == sum(frame.length for frame in waiting)
    ring.send()
    rows = gap_rows = 0
    for frame in ring.got:
        assert set(bytes(frame.body)) <= {frame.seq % 256}
        is_news, gaps = finder.take(frame)
        assert is_news
        rows += frame.rows
        gap_rows += sum(gap.rows or 0 for gap in gaps)
    gap_rows += sum(gap.rows or 0 for gap in finder.finish({STREAM: (ring.seq + 1, ring.row)}))
    assert rows + gap_rows == ring.row - begin
    assert gap_rows <= ring.follower.dropped_rows


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
@given(steps=STEPS, sizes=st.randoms(use_true_random=False))
def test_what_is_counted_as_dropped_is_what_a_follower_that_stays_misses(
    policy: InputPolicy, steps, sizes
) -> None:
    ring = Ring(policy, 1500)
    ring.followers.connect(ring.follower, b"route")
    for step in [*steps, "publish", "send"]:
        if step == "publish":
            ring.publish(sizes.randrange(700))
        elif step == "send":
            ring.send()
        elif step == "release":
            ring.release()
    ring.release()
    ring.send()
    finder = GapFinder({})
    gaps = [gap for frame in ring.got for gap in finder.take(frame)[1]]
    gaps += finder.finish({STREAM: (ring.seq + 1, ring.row)})
    assert sum(gap.rows or 0 for gap in gaps) == ring.follower.dropped_rows
