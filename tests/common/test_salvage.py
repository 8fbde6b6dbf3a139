"""Death at every store: after each change of the ring's memory, what was put can be told from it exactly."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from edgedaq import sealing
from edgedaq.delivery import StreamTable, Verdict
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, decode
from edgedaq.gate import Gate
from edgedaq.messages import (
    DAQJobMessageEvent,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
    MessageReader,
)
from edgedaq.raw_writer import EventWriter, RawWriter
from edgedaq.ring import Identity, ProducedRing
from edgedaq.ring_frames import walk
from edgedaq.ring_layout import (
    W_COMMIT,
    W_OPENS_USED,
    W_PUBLISHED,
    W_RELEASED,
    W_SLOT_STREAM,
    read_layout,
)
from edgedaq.salvage import salvage
from edgedaq.schema import Column, OpenInfo, Schema, decode_open
from edgedaq.stream_writer import Lane
from edgedaq.table_writer import TableWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

FLAT = Schema((Column("n", "i8"), Column("x", "f8"), Column("s", "i2")))
SHAPED = Schema((Column("n", "i4"), Column("ok", "bool"), Column("a", "u2", (3,))))
TEXT = Schema((Column("n", "i8"), Column("name", "utf8")))
LIFE = "00000000000000aa"


class Rig:
    """A producer's ring driven by hand, a consumer beside it, and the list of what was put."""

    def __init__(self, directory: Path, sealer_class: type[Any] = sealing.Sealer) -> None:
        claims = {"up": ["t"]}
        identity = Identity("node", "job", "Type", LIFE, "boot", claims)
        self.ring = ProducedRing(directory, identity, ring_bytes=8192, slot_bytes=256, slots=3)
        self.gate = Gate()
        self.gate.interrupt = self._make_room
        self.sealer = sealer_class(self.ring, lambda *_: None)
        self.lane = Lane(self.sealer, self.sealer.slots)
        self.writers: dict[str, Any] = {}
        self.put: dict[str, list[Any]] = {}
        self.in_progress: tuple[str, Any] | None = None
        self.lost: dict[str, int] = {}
        self.taken: list[Frame] = []
        self.cursor = 0
        self.may_take = True

    def writer(self, key: str) -> Any:
        if key not in self.writers:
            kinds: dict[str, tuple[type[Any], Any]] = {
                "flat": (TableWriter, FLAT),
                "shaped": (TableWriter, SHAPED),
                "text": (TableWriter, TEXT),
                "raw": (RawWriter, None),
                "event": (EventWriter, None),
            }
            kind, schema = kinds[key]
            form: Any = {"raw": "raw", "event": "event"}.get(key, "table")
            info = OpenInfo(
                node="node", job="job", job_type="Type", life=LIFE, boot="boot", topics=("t",), form=form,
                schema=schema, tag=key, t_open_ns=1,
            )  # fmt: skip
            stream = 100 + len(self.writers)
            self.writers[key] = kind(self.gate, self.sealer, self.lane, stream, info)
            self.put[key] = []
        return self.writers[key]

    def put_one(self, key: str, value: Any) -> None:
        writer = self.writer(key)
        self.in_progress = (key, value)
        if key == "raw":
            writer.put(value)
        elif key == "event":
            writer.put(*value)
        else:
            writer.put(value)
        self.put[key].append(value)
        self.in_progress = None

    def lose(self, key: str, count: int) -> None:
        self.lost[key] = self.lost.get(key, 0)
        self.in_progress = (key, count)
        self.writer(key).append_gap(count, "overrun")
        self.lost[key] += count
        self.in_progress = None

    def seal(self, index: int) -> None:
        with self.gate.condition:
            self.sealer.seal(self.sealer.slots[index])

    def take(self) -> None:
        """Be the consumer: take all that is published, then release it."""
        head = self.sealer.head
        for _, frame in walk(self.ring.buffer, self.ring.layout, self.cursor, head):
            assert frame is not None
            self.taken.append(decode(memoryview(bytes(frame.raw))))
        self.cursor = head
        self.sealer.release(head)

    def close_streams(self) -> None:
        with self.gate.condition:
            for slot in self.sealer.slots:
                if slot.account is not None and not self.sealer.seal(slot):
                    return
            for account in self.sealer.accounts:
                if not self.sealer.close_stream(account):
                    return

    def _make_room(self) -> None:
        if self.gate.is_blocked and self.may_take:
            self.take()

    def close(self) -> None:
        self.sealer = self.lane = self.writers = None  # type: ignore[assignment]
        self.ring.close(unlink=True)
        self.gate.close()

    def check(self) -> None:
        """Be a consumer after a death at this very moment."""
        copy = memoryview(bytes(self.ring.buffer))
        left = salvage(copy)
        again = salvage(copy)
        assert left == again
        frames = list(self.taken)
        layout = self.ring.layout
        area = copy[layout.data_offset :]
        here = [at.position for at in left.frames if at.position >= self.cursor]
        frames += [decode(area, position % layout.ring_bytes) for position in here]
        frames += [decode(memoryview(raw)) for raw in left.tail]
        self._check_frames(frames)

    def _check_frames(self, frames: Sequence[Frame]) -> None:
        table, reader = StreamTable(), MessageReader()
        found: dict[str, list[Any]] = {}
        infos = {}
        for frame in frames:
            assert table.judge(frame) is Verdict.ACCEPT, f"{frame.kind.name} {frame.seq} of {frame.stream}"
            if frame.kind is Kind.OPEN:
                infos[frame.stream] = decode_open(frame)
                found[infos[frame.stream].tag] = []
            else:
                expected_row = table.streams[frame.stream].next_row
                assert frame.row0 == expected_row or frame.kind is Kind.CLOSE
                assert not frame.rows or frame.t_first_ns > 0
            table.apply(frame)
            for message in reader.read(infos[frame.stream], frame):
                found[infos[frame.stream].tag] += _values(message)
        assert not table.streams, "every stream is closed"
        for state in table.tombstones.values():
            key = infos[state.stream].tag
            lost = self.lost.get(key, 0)
            in_progress = self.in_progress[1] if self.in_progress and self.in_progress[0] == key else None
            may_lose = {lost} if type(in_progress) is not int else {lost, lost + in_progress}
            assert state.gap_rows in may_lose
        for key, values in self.put.items():
            expected = [_plain(value) for value in values]
            allowed = [expected]
            if self.in_progress is not None and self.in_progress[0] == key:
                allowed.append([*expected, _plain(self.in_progress[1])])
            got = found.get(key, [])
            assert got in allowed, f"{key}: put {len(expected)}, found {len(got)}"


def _values(message: Any) -> list[Any]:
    if isinstance(message, DAQJobMessageStoreTabular):
        assert message.data is not None
        return [_plain(row) for row in message.data]
    if isinstance(message, DAQJobMessageStoreRaw):
        return [bytes(message.data)]
    assert isinstance(message, DAQJobMessageEvent)
    return [_plain((message.metadata, message.data))]


def _plain(value: Any) -> Any:
    """Make values equal that a widened column holds in another form."""
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, bool) or value is None or isinstance(value, bytes):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@contextmanager
def watched(rig: Rig, modules: Sequence[str], *, by_opcode: bool) -> Iterator[list[int]]:
    """Check the rig whenever a line (or an instruction) of these modules has changed the ring's memory."""
    seen = [0]
    layout, buffer = rig.ring.layout, rig.ring.buffer
    first, rest = buffer[: layout.opens_offset], buffer[layout.slots_offset :]
    last = [0]

    def look() -> None:
        now = xxh3_64_intdigest(first) ^ (xxh3_64_intdigest(rest) << 1)
        if now != last[0]:
            last[0] = now
            seen[0] += 1
            sys.settrace(None)
            try:
                rig.check()
            finally:
                sys.settrace(trace)

    def trace_inside(frame: FrameType, event: str, _: Any) -> Any:
        look()
        return trace_inside

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if any(name.endswith(module) for module in modules):
            frame.f_trace_opcodes = by_opcode
            look()
            return trace_inside
        return None

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)
        first.release()
        rest.release()


MODULES = (
    "edgedaq/sealing.py",
    "edgedaq/stream_writer.py",
    "edgedaq/table_writer.py",
    "edgedaq/raw_writer.py",
    "edgedaq/frame.py",
    "mutated_sealing.py",
)


def scenario(rig: Rig) -> None:
    """Come by every path: seals in between, full slots, eviction, wrap, large ones, widening, loss, close."""
    for n in range(8):
        rig.put_one("flat", (n, n / 2, n))
    rig.seal(0)
    rig.put_one("flat", (8, 4.0, 8))
    rig.take()
    for n in range(9, 34):
        rig.put_one("flat", (n, n / 2, n))
    for n in range(5):
        rig.put_one("raw", bytes([n]) * (n * 13))
    rig.seal(1)
    rig.put_one("raw", b"after")
    rig.put_one("raw", b"L" * 600)
    rig.put_one("raw", b"small again")
    rig.take()
    rig.put_one("raw", b"M" * 2900)
    rig.put_one("event", ({"a": 1}, b"payload"))
    for n in range(9):
        rig.put_one("shaped", (n, n % 2 == 0, (n, n + 1, n + 2)))
        rig.put_one("text", (n, f"name {n}"))
    rig.lose("flat", 7)
    rig.put_one("flat", (34, 17.0, 34))
    rig.seal(0)
    rig.seal(1)
    rig.seal(2)
    rig.put_one("flat", (35, None, 35))
    for n in range(36, 48):
        rig.put_one("flat", (n, n / 2, n))
    rig.put_one("flat", (48, "broken", 48))
    rig.seal(0)
    rig.take()
    rig.put_one("flat", (49, 1.5, 49))
    for n in range(30):
        rig.put_one("raw", bytes([n]) * 100)
        if n % 9 == 0:
            rig.take()
    rig.close_streams()
    rig.check()


def test_what_was_put_is_told_exactly_after_death_at_every_store(runtime_dir: Path) -> None:
    rig = Rig(runtime_dir)
    try:
        with watched(rig, MODULES, by_opcode=True) as seen:
            scenario(rig)
        assert seen[0] > 500, "it must have looked after each of some hundred stores"
    finally:
        rig.close()


def _mutated(old: str, new: str) -> ModuleType:
    """Return the module that seals with one thing changed."""
    source = Path(sealing.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the mutation must apply"
    spec = importlib.util.spec_from_loader("mutated_sealing", loader=None)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutated_sealing"] = module
    try:
        exec(compile(source.replace(old, new), "mutated_sealing.py", "exec"), module.__dict__)  # noqa: S102
    finally:
        del sys.modules["mutated_sealing"]
    return module


PUBLISHED = "        self._words[W_PUBLISHED] = head\n"
NEXT_SEQ = "        account.words[W_NEXT_SEQ] = account.next_seq + len(bodies)\n"
ROWS = "        account.words[W_ROWS] = rows + lost_rows\n"
EMPTY_SLOT = "        words[W_COMMIT] = 0\n"
FREE_SLOT = "        words[W_SLOT_STREAM] = 0\n"
BASE = "        words[W_ROW_BASE] = account.rows\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PUBLISHED + NEXT_SEQ + ROWS, ROWS + NEXT_SEQ + PUBLISHED),
        (EMPTY_SLOT + FREE_SLOT, FREE_SLOT),
        (BASE, BASE.replace("account.rows", "0")),
    ],
    ids=["account before published", "commit kept at attach", "row base forgotten"],
)
def test_the_check_sees_a_seal_in_the_wrong_order(runtime_dir: Path, old: str, new: str) -> None:
    rig = Rig(runtime_dir, _mutated(old, new).Sealer)
    try:
        with pytest.raises((AssertionError, WireError)), watched(rig, MODULES, by_opcode=False):
            scenario(rig)
    finally:
        sys.settrace(None)
        rig.close()


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("flat"), st.integers(1, 14)),
        st.tuples(st.just("odd"), st.sampled_from([None, "text", 2**70, b"\xff", [1, 2], float("inf")])),
        st.tuples(st.just("raw"), st.sampled_from([0, 1, 30, 128, 129, 256, 700, 1500])),
        st.tuples(st.just("text"), st.integers(1, 5)),
        st.tuples(st.just("shaped"), st.integers(1, 9)),
        st.tuples(st.just("lose"), st.integers(0, 5)),
        st.tuples(st.just("seal"), st.integers(0, 2)),
        st.tuples(st.just("take"), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=OPS)
def test_whatever_a_job_puts_is_told_exactly_after_death_anywhere(
    runtime_dir: Path, ops: list[tuple[str, Any]]
) -> None:
    rig = Rig(runtime_dir)
    counts: dict[str, int] = {}
    try:
        with watched(rig, MODULES, by_opcode=False):
            for op, argument in ops:
                _play(rig, op, argument, counts)
            rig.check()
    finally:
        rig.close()


def _play(rig: Rig, op: str, argument: Any, counts: dict[str, int]) -> None:
    n = counts[op] = counts.get(op, 0) + 1
    if op == "seal":
        rig.seal(argument)
    elif op == "take":
        rig.take()
    elif op == "lose":
        if "flat" in rig.writers:
            rig.lose("flat", argument)
    elif op == "raw":
        rig.put_one("raw", bytes([n % 256]) * argument)
    elif op == "odd":
        writer = rig.writer("flat")
        rig.in_progress = ("flat", ODD)
        writer.put((n, argument, 3))
        rig.put["flat"].append(ODD)
        rig.in_progress = None
    else:
        rows: dict[str, Callable[[int], tuple[Any, ...]]] = {
            "flat": lambda k: (k, k / 4, k % 100),
            "text": lambda k: (k, "x" * k),
            "shaped": lambda k: (k, True, (k, k, k)),
        }
        for k in range(argument):
            rig.put_one(op, rows[op](n * 100 + k))


class _Anything:
    """Equal to every row: what a value looks like in a widened column is the schema's business."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


ODD = _Anything()


def _dead_ring(directory: Path) -> bytearray:
    rig = Rig(directory)
    try:
        for n in range(40):
            rig.put_one("flat", (n, n / 2, n))
            rig.put_one("raw", bytes([n]) * 20)
        return bytearray(rig.ring.buffer)
    finally:
        rig.close()


class _Receiver:
    """Takes exactly once, as everybody does who gets frames; what it cannot take fails the test."""

    def __init__(self) -> None:
        self.table = StreamTable()

    def take(self, frame: Frame) -> None:
        verdict = self.table.judge(frame)
        assert verdict in (Verdict.ACCEPT, Verdict.DUPLICATE), (verdict, frame.kind, frame.seq)
        if verdict is Verdict.ACCEPT:
            self.table.apply(frame)

    def accounts(self) -> dict[int, tuple[int, int, bool]]:
        """Return rows, lost rows and whether the tail is not known, of the streams that were closed."""
        return {s: (t.rows, t.gap_rows, t.tail_unknown) for s, t in self.table.tombstones.items()}


def _received(ring: memoryview, before: Sequence[Frame] = ()) -> _Receiver | None:
    """Return who took first what it had before the death, then all that is left; None if that is refused."""
    receiver = _Receiver()
    for frame in before:
        receiver.take(frame)
    try:
        left = salvage(ring)
    except WireError:
        return None
    begin = read_layout(ring).data_offset
    for at in left.frames:
        receiver.take(decode(ring, begin + at.position))
    for raw in left.tail:
        receiver.take(decode(memoryview(raw)))
    return receiver


def test_whatever_byte_of_its_frames_is_damaged_a_ring_accounts_for_every_row(runtime_dir: Path) -> None:
    whole = _dead_ring(runtime_dir)
    layout = read_layout(memoryview(whole))
    before = [frame for _, frame in walk(memoryview(whole), layout, 0, _word(whole, W_PUBLISHED)) if frame]
    expected = _received(memoryview(whole))
    assert expected
    puts = {stream: rows for stream, (rows, lost, _) in expected.accounts().items() if not lost}
    assert sorted(puts.values()) == [40, 40]
    end = layout.data_offset + _word(whole, W_PUBLISHED)
    choose = random.Random(7)
    lost_at_all = 0
    for _ in range(200):
        damaged = bytearray(whole)
        at = choose.randrange(layout.data_offset, end)
        length = choose.choice([1, 1, 8, 100, 3000])
        damaged[at : min(at + length, end)] = choose.randbytes(min(at + length, end) - at)
        receiver = _received(memoryview(damaged), before[: choose.randrange(len(before))])
        assert receiver
        assert {s: rows + lost for s, (rows, lost, _) in receiver.accounts().items()} == puts
        assert not any(unknown for _, _, unknown in receiver.accounts().values())
        lost_at_all += any(lost for _, lost, _ in receiver.accounts().values())
    assert lost_at_all > 50


def test_a_ring_with_a_flipped_bit_anywhere_is_refused_or_gives_what_can_be_taken(runtime_dir: Path) -> None:
    whole = _dead_ring(runtime_dir)
    choose = random.Random(7)
    used = [i for i, byte in enumerate(whole) if byte]
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[choose.choice(used)] ^= 1 << choose.randrange(8)
        refused += _received(memoryview(damaged)) is None
    assert refused < 100


def _word(ring: bytearray, index: int) -> int:
    return int.from_bytes(ring[8 * index : 8 * index + 8], "little")


def test_a_ring_that_was_cut_anywhere_is_refused(runtime_dir: Path) -> None:
    whole = _dead_ring(runtime_dir)
    for size in [0, 7, 8, 95, 96, 104, 511, 600, 4095, 4096, 20_480, len(whole) - 4096, len(whole) - 1]:
        with pytest.raises(WireError):
            salvage(memoryview(whole[:size]))


@pytest.mark.parametrize("word", [W_PUBLISHED, W_RELEASED, W_OPENS_USED])
@pytest.mark.parametrize("value", [1 << 20, 2**63, 2**64 - 1])
def test_words_that_cannot_be_are_refused(runtime_dir: Path, word: int, value: int) -> None:
    ring = _dead_ring(runtime_dir)
    ring[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
    with pytest.raises(WireError):
        salvage(memoryview(ring))


@pytest.mark.parametrize("word", [W_PUBLISHED, W_RELEASED, W_OPENS_USED])
@pytest.mark.parametrize("value", [1, 8])
def test_words_that_are_wrong_are_damage_or_refused(runtime_dir: Path, word: int, value: int) -> None:
    ring = _dead_ring(runtime_dir)
    ring[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
    assert _received(memoryview(ring)) is None or salvage(memoryview(ring)).damage


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (W_COMMIT, 2**64 - 1),
        (W_COMMIT, 4096 << 32),
        (W_SLOT_STREAM, 77),
        (1, 9),
        (1, 3),
        (2, 2**40),
        (6, 2**40),
    ],
)
def test_a_slot_that_cannot_be_is_a_gap_or_makes_the_end_unknown(
    runtime_dir: Path, word: int, value: int
) -> None:
    rig = Rig(runtime_dir)
    try:
        rig.put_one("raw", b"whole")
        rig.seal(0)
        rig.put_one("flat", (1, 1.0, 1))
        ring = bytearray(rig.ring.buffer)
        at = rig.ring.layout.slot_offset(1) + 8 * word
    finally:
        rig.close()
    ring[at : at + 8] = value.to_bytes(8, "little")
    receiver = _received(memoryview(ring))
    assert receiver
    raw, flat = sorted(receiver.accounts().values(), reverse=True)
    assert raw[:2] == (1, 0)
    assert flat[0] == 0
    assert flat[1] == 1 or flat[2]
    assert salvage(memoryview(ring)).damage
