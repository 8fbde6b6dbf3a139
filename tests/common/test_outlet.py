from __future__ import annotations

import array
import datetime as dt
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgedaq.batch import frame_columns
from edgedaq.errors import JobError
from edgedaq.frame import Frame, Kind, decode
from edgedaq.gate import PutTimeout
from edgedaq.outlet import Outlet
from edgedaq.raw_writer import RawWriter
from edgedaq.ring import Identity
from edgedaq.salvage import salvage
from edgedaq.schema import Column, OpenInfo, Schema, decode_open

WHERE: dict[str, Any] = {"topics": ["store.X"]}
NUMBERS = Schema((Column("n", "i8"), Column("x", "f8")))


@pytest.fixture
def outlet(runtime_dir: Path) -> Iterator[Outlet]:
    identity = Identity("node", "job", "Type", "00000000000000ab", "boot", {"up": ["store"]})
    with Outlet(runtime_dir, identity, ring_bytes=1 << 20, slot_bytes=4096, slots=2) as made:
        yield made


def left(outlet: Outlet) -> list[tuple[OpenInfo, Frame]]:
    """Return what a consumer would find if the process died now."""
    copy = memoryview(bytes(outlet._ring.buffer))
    layout = outlet._ring.layout
    found = salvage(copy)
    area = copy[layout.data_offset :]
    frames = [decode(area, at.position % layout.ring_bytes) for at in found.frames]
    frames += [decode(memoryview(raw)) for raw in found.tail]
    infos = {stream: decode_open(decode(memoryview(raw))) for stream, raw in found.opens.items()}
    return [(infos[frame.stream], frame) for frame in frames]


def rows(outlet: Outlet) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for info, frame in left(outlet):
        if frame.kind in (Kind.PACKED, Kind.COLUMNS):
            found += zip(*frame_columns(info, frame)[1], strict=True)
    return found


def kinds(outlet: Outlet) -> list[str]:
    return [frame.kind.name for _, frame in left(outlet) if frame.rows]


def test_rows_are_in_shared_memory_when_put_returns(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    for n in range(700):
        writer.put((n, n / 2))
        if n % 97 == 0:
            assert rows(outlet) == [(k, k / 2) for k in range(n + 1)]
    assert outlet.out_count == 700
    assert kinds(outlet) == ["PACKED"] * 3, "256 rows of 16 bytes fill a slot"


def test_the_same_stream_has_one_writer_and_another_tag_another(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    assert outlet.table(Schema(NUMBERS.columns), **WHERE) is writer
    assert outlet.table(NUMBERS, tag="b", **WHERE) is not writer
    assert outlet.raw(**WHERE) is outlet.raw(**WHERE)


def test_values_that_do_not_fit_widen_the_column_and_lose_nothing(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    put = writer.put  # a job may keep it
    put((1, 1.0))
    put((2.5, 2))
    put((3, None))
    put(("four", 4.0))
    put((5, math.inf))
    put((2**100, 6.0))
    put((None, "x" * 9000))
    found = rows(outlet)
    assert found[0] == (1, 1.0)
    assert found[1] == (2.5, 2.0)
    assert found[2][1] is None
    assert [row[0] for row in found[3:5]] == ["four", "5"]
    assert float(found[5][0]) == float(2**100)
    assert found[6] == (None, "x" * 9000)
    assert outlet.out_count == 7


def test_timestamps_take_datetimes_and_integers(outlet: Outlet) -> None:
    schema = Schema((Column("t", "timestamp"),))
    writer = outlet.table(schema, **WHERE)
    writer.put((1_700_000_000_000_000_000,))
    moment = dt.datetime(2026, 5, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    writer.put((moment,))
    (t1,), (t2,) = rows(outlet)
    assert t1 == 1_700_000_000_000_000_000
    assert t2 == int(moment.timestamp()) * 10**9


def test_arrays_and_booleans_are_packed(outlet: Outlet) -> None:
    schema = Schema((Column("ok", "bool"), Column("w", "u2", (4,)), Column("n", "i8")))
    writer = outlet.table(schema, **WHERE)
    writer.put((True, [1, 2, 3, 4], 1))
    writer.put((False, array.array("H", [5, 6, 7, 8]), 2))
    for n in range(400):
        writer.put((n % 2 == 0, (n, 0, 0, 65535), n))
    found = rows(outlet)
    assert found[0] == (True, [1, 2, 3, 4], 1)
    assert found[1] == (False, [5, 6, 7, 8], 2)
    assert found[-1] == (False, [399, 0, 0, 65535], 399)
    assert set(kinds(outlet)) == {"PACKED"}
    writer.put((2, [1, 2, 3, 4], 1))
    assert rows(outlet)[-1][0] == 2, "no number becomes a truth"


def test_text_and_ragged_lists_travel_as_columns(outlet: Outlet) -> None:
    schema = Schema((Column("name", "utf8"), Column("trace", "f8", (-1,)), Column("raw", "bytes")))
    writer = outlet.table(schema, **WHERE)
    for n in range(100):
        writer.put((f"n{n}", [0.5] * n, bytes([n])))
    writer.put((7, array.array("d", [1.0]), None))
    found = rows(outlet)
    assert found[:100] == [(f"n{n}", [0.5] * n, bytes([n])) for n in range(100)]
    assert found[100] == ("7", [1.0], None)


def test_rows_larger_than_a_slot_and_than_a_frame(outlet: Outlet) -> None:
    wide = Schema(tuple(Column(f"c{n}", "f8") for n in range(1000)))
    writer = outlet.table(wide, **WHERE)
    writer.put([float(n) for n in range(1000)])
    writer.put([None] * 1000)
    assert rows(outlet) == [tuple(float(n) for n in range(1000)), (None,) * 1000]
    text = outlet.table(Schema((Column("s", "utf8"),)), **WHERE)
    text.put(("x" * 100_000,))
    with pytest.raises(JobError, match="one row must have at most"):
        text.put(("x" * 600_000,))
    text.put(("y",))
    assert [len(row[0]) for row in rows(outlet) if len(row) == 1] == [100_000, 1]


def test_a_row_of_another_length_is_refused_and_the_rest_goes_on(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    for values in [(1,), (1, 2.0, 3), ()]:
        with pytest.raises(JobError, match=r"2 values \(n, x\)"):
            writer.put(values)
        writer.put((1, 1.0))
    assert rows(outlet) == [(1, 1.0)] * 3
    assert set(kinds(outlet)) == {"PACKED"}


def test_messages_are_anything_with_contiguous_memory(outlet: Outlet) -> None:
    np = pytest.importorskip("numpy")
    writer = outlet.raw(**WHERE)
    samples = np.arange(6, dtype="<i2")
    for message in (b"a", bytearray(b"bb"), memoryview(b"ccc"), array.array("H", [1, 2]), samples,
                    samples.reshape(2, 3), np.zeros(0), b""):  # fmt: skip
        writer.put(message)
    for message in ("text", [1, 2], 5, None, samples[::2]):
        with pytest.raises(JobError, match="contiguous memory"):
            writer.put(message)
    (_, frame), *_ = [pair for pair in left(outlet) if pair[1].rows]
    assert frame.rows == 8
    expected = b"a" + b"bb" + b"ccc" + bytes([1, 0, 2, 0]) + samples.tobytes() * 2
    assert bytes(frame.body[4 * 8 :]) == expected


def test_memory_that_was_put_may_be_used_again(outlet: Outlet) -> None:
    buffer = bytearray(100_000)
    writer = outlet.raw(**WHERE)
    writer.put(buffer)
    writer.put(memoryview(buffer)[:10])
    buffer[:] = b"\xff" * len(buffer)
    assert all(b"\xff" not in bytes(frame.body[8:]) for _, frame in left(outlet) if frame.kind is Kind.RAW)


def _fill(writer: RawWriter) -> None:
    for _ in range(10_000):
        writer.put_within(bytes(1000), 0.05)


def test_a_ring_that_nobody_empties_refuses_after_the_limit(outlet: Outlet) -> None:
    writer = outlet.raw(**WHERE)
    with pytest.raises(PutTimeout) as caught:
        writer.put_within(bytes(2 << 20), 0.05)
    assert caught.value.accepted == 0
    with pytest.raises(PutTimeout):
        _fill(writer)
    assert outlet.put_blocked_s > 0.08
    assert not outlet.is_blocked


def test_a_job_that_opens_a_stream_with_every_message_is_told_why_it_cannot(outlet: Outlet) -> None:
    for n in range(256):
        outlet.table(NUMBERS, tag=str(n), **WHERE).put((n, 1.0))
    with pytest.raises(JobError, match="must not change with every message"):
        outlet.table(NUMBERS, tag="256", **WHERE).put((256, 1.0))
    assert outlet.out_count == 256


def test_events_keep_their_facts_and_payload(outlet: Outlet) -> None:
    outlet.event(**WHERE).put({"kind": "alarm", "value": 3.5}, b"payload")
    with pytest.raises(JobError, match="plain data"):
        outlet.event(**WHERE).put({"kind": object()})
    with pytest.raises(JobError, match="at most"):
        outlet.event(**WHERE).put({}, bytes(1 << 20))
    assert [frame.rows for _, frame in left(outlet) if frame.kind is Kind.EVENT] == [1]


def test_arrow_batches_are_split_by_rows(outlet: Outlet) -> None:
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch({"n": list(range(30_000)), "s": [f"text {n}" for n in range(30_000)]})
    writer = outlet.arrow(bytes(batch.schema.serialize()), **WHERE)
    writer.put_batch(batch.slice(0, 10_000))
    writer.put_batch(batch.slice(0, 0))
    found = [frame_columns(info, frame)[1] for info, frame in left(outlet) if frame.kind is Kind.ARROW]
    assert [n for columns in found for n in columns[0]] == list(range(10_000))
    one = pa.record_batch({"n": [1], "s": ["x" * 600_000]})
    with pytest.raises(JobError, match="one row must have at most"):
        writer.put_batch(one)


def test_a_loss_must_be_a_number(outlet: Outlet) -> None:
    with pytest.raises(JobError, match="at least 0"):
        outlet.report_loss(outlet.table(NUMBERS, **WHERE), -1, "overrun")


def test_the_times_of_a_frame_are_those_of_its_first_row(outlet: Outlet) -> None:
    from edgedaq.clock import mono_ns, utc_ns

    writer = outlet.table(NUMBERS, **WHERE)
    before = utc_ns(), mono_ns()
    writer.put((1, 1.0))
    after = utc_ns(), mono_ns()
    for n in range(100):
        writer.put((n, 1.0))
    (_, frame), *_ = [pair for pair in left(outlet) if pair[1].rows]
    assert before[0] <= frame.t_first_ns <= after[0]
    assert before[1] <= frame.t_put_ns <= after[1]


@pytest.mark.parametrize("count", [7, 8, 9, 100, 255, 256, 257, 1000])
def test_many_rows_at_once_are_the_same_as_one_by_one(outlet: Outlet, count: int) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    expected = [(n, n / 2) for n in range(count)]
    for begin in (0, 3):
        writer.put_rows(expected[begin:])
    assert rows(outlet) == expected + expected[3:]
    assert set(kinds(outlet)) == {"PACKED"}


def test_a_value_that_does_not_fit_amid_many_rows_loses_none_and_moves_none(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    expected: list[tuple[Any, Any]] = [(n, n / 2) for n in range(500)]
    expected[333] = (333, None)
    writer.put_rows(expected)
    assert rows(outlet) == expected


def test_rows_that_are_too_long_and_too_short_are_refused_though_their_sum_fits(outlet: Outlet) -> None:
    writer = outlet.table(NUMBERS, **WHERE)
    with pytest.raises(JobError, match="2 values"):
        writer.put_rows([(0, 0.0)] * 10 + [(1, 1.0, 2), (3.0,)] + [(0, 0.0)] * 10)
    assert rows(outlet) == [(0, 0.0)] * 10
