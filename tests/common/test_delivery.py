"""Whoever receives frames takes each once, in order, and nothing else."""

from __future__ import annotations

import msgpack
import pytest
from edgedaq.delivery import StreamTable, Verdict
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, decode, encode, pack_map
from hypothesis import given
from hypothesis import strategies as st


def frame(kind: Kind, seq: int, body: bytes = b"", *, stream: int = 1, rows: int = 0, row0: int = 0) -> Frame:
    return decode(memoryview(encode(kind, stream, seq, body, rows=rows, row0=row0)))


def gap(first: int, last: int, rows: int | None = None, row0: int = 0) -> Frame:
    return frame(Kind.GAP, first, pack_map({"last": last, "rows": rows, "reason": "test"}), row0=row0)


def opened() -> StreamTable:
    table = StreamTable()
    table.apply(frame(Kind.OPEN, 0))
    return table


def test_a_stream_is_unknown_until_its_open_has_come():
    table = StreamTable()
    assert table.judge(frame(Kind.RAW, 1)) is Verdict.UNKNOWN
    assert table.judge(frame(Kind.OPEN, 0)) is Verdict.ACCEPT
    table.apply(frame(Kind.OPEN, 0))
    assert table.judge(frame(Kind.RAW, 1)) is Verdict.ACCEPT
    assert table.judge(frame(Kind.OPEN, 0)) is Verdict.DUPLICATE


def test_seq_decides_between_duplicate_next_and_ahead():
    table = opened()
    table.apply(frame(Kind.RAW, 1, rows=5))
    verdicts = [table.judge(frame(Kind.RAW, seq)) for seq in (1, 2, 3)]
    assert verdicts == [Verdict.DUPLICATE, Verdict.ACCEPT, Verdict.AHEAD]
    assert table.expected(1) == 2


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (1, 3, Verdict.DUPLICATE),
        (1, 4, Verdict.ACCEPT),
        (4, 4, Verdict.ACCEPT),
        (2, 9, Verdict.ACCEPT),
        (5, 9, Verdict.AHEAD),
    ],
)
def test_a_gap_is_taken_where_it_covers_the_next_seq(first, last, verdict):
    table = opened()
    for seq in (1, 2, 3):
        table.apply(frame(Kind.RAW, seq))
    assert table.judge(gap(first, last)) is verdict
    if verdict is Verdict.ACCEPT:
        table.apply(gap(first, last))
        assert table.expected(1) == last + 1


def test_a_gap_counts_its_rows_or_that_nobody_knows_them():
    table = opened()
    table.apply(gap(1, 2, 10))
    table.apply(gap(3, 3))
    state = table.streams[1]
    assert (state.gap_rows, state.gap_frames, state.gaps_unknown, state.next_row) == (10, 3, 1, 10)


def test_a_closed_stream_takes_nothing_more_and_keeps_its_account():
    table = opened()
    table.apply(frame(Kind.RAW, 1, rows=5))
    table.apply(frame(Kind.CLOSE, 2, pack_map({"rows": 5, "tail_unknown": False, "bound_s": 0.0})))
    assert table.judge(frame(Kind.RAW, 3)) is Verdict.DUPLICATE
    assert table.judge(frame(Kind.OPEN, 0)) is Verdict.DUPLICATE
    assert not table.streams and table.tombstones[1].rows == 5


def test_tombstones_are_bounded_and_the_oldest_goes_first():
    table = StreamTable(tombstones_max=2)
    for stream in (1, 2, 3):
        table.apply(frame(Kind.OPEN, 0, stream=stream))
        table.apply(frame(Kind.CLOSE, 1, pack_map({"rows": 0}), stream=stream))
    assert list(table.tombstones) == [2, 3]


@pytest.mark.parametrize("body", [{"last": 0, "reason": "r"}, {"last": "x", "reason": "r"}, {"last": 3}, {}])
def test_a_gap_that_does_not_say_what_is_lost_is_refused(body):
    with pytest.raises(WireError):
        opened().apply(frame(Kind.GAP, 1, pack_map(body)))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), max_size=40))
def test_whatever_comes_each_stream_is_applied_in_order_without_hole_or_repetition(arrivals):
    table = StreamTable()
    kept: dict[int, list[int]] = {}
    for stream, seq in arrivals:
        arrived = frame(Kind.RAW if seq else Kind.OPEN, seq, stream=stream, rows=1 if seq else 0)
        if table.judge(arrived) is Verdict.ACCEPT:
            table.apply(arrived)
            kept.setdefault(stream, []).append(seq)
    assert all(seqs == list(range(len(seqs))) for seqs in kept.values())
    described = msgpack.unpackb(msgpack.packb(table.snapshot()))
    assert StreamTable.restore(described) == table


@given(
    st.recursive(st.none() | st.integers(0, 9) | st.binary(max_size=3), lambda c: st.lists(c, max_size=14))
)
def test_a_checkpoint_that_is_no_account_is_refused_by_name(described):
    try:
        StreamTable.restore(described)
    except WireError:
        return
    assert described == []
