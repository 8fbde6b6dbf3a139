from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.errors import StoreError
from edgedaq.frame import Kind, pack_map
from edgedaq.schema import Column, Schema
from edgedaq_aggregator.reading import open_out

from tests.aggregator.stored_feed import StoredFeed
from tests.contract.store_feed import DAY_NS, NODE, T0_NS, Feed

CSV = {"csv": {"file_path": "a.csv"}}
RAW = {"raw": {"file_path": "a.bin", "length_prefix": True}}
BOTH = {**CSV, "raw": {"file_path": "a.bin"}}


def stored(tmp_path: Path, feed: Feed, *keys: str) -> Path:
    made = StoredFeed(tmp_path / "out")
    made.journal(feed)
    for key in keys or ("csv",):
        made.store(key)
    return made.out_dir


def pairs(table: pa.Table) -> list[Any]:
    return list(zip(table["sequence"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_a_job_is_read_over_all_of_its_lives_in_order_from_either_store(tmp_path):
    feed = Feed()
    expected = []
    for stream in (1, 2, 3):
        feed.open(stream, BOTH, t_open_ns=T0_NS + stream)
        expected += feed.pairs(stream, stream * 100, 20)
        feed.close(stream)
    out = open_out(stored(tmp_path, feed, "csv", "raw"))
    assert [one.rows for one in out.streams(store="csv")] == [20, 20, 20]
    assert out.stores == {"store_csv": "csv", "store_raw": "raw"}
    for store in ("csv", "store_raw", ""):
        table = out.read(store=store, node=NODE, job="job1")
        assert table.schema.types == [pa.int64(), pa.float64()]
        assert pairs(table) == expected
    assert pairs(out.read(stream=f"{2:016x}")) == expected[20:40]
    assert pairs(out.read(store="raw", stream=f"{3:016x}")) == expected[40:]


def test_streams_that_take_turns_in_a_file_are_read_together_or_refused_with_their_names(tmp_path):
    feed = Feed()
    feed.open(1, CSV)
    feed.open(2, CSV, job="job2")
    made = StoredFeed(tmp_path / "out")
    for part in range(3):
        feed.pairs(1, part, 1)
        feed.pairs(2, 100 + part, 1)
    made.journal(feed)
    made.store("csv")
    out = open_out(made.out_dir)
    assert sorted(pairs(out.read())) == [(n, n / 4) for n in (0, 1, 2, 100, 101, 102)]
    with pytest.raises(StoreError, match=f"rows of stream {2:016x} lie among these"):
        out.read(job="job1")


def test_every_type_comes_back_as_it_was(tmp_path):
    schema = Schema(
        (
            Column("i", "i8"),
            Column("f", "f8"),
            Column("g", "f4"),
            Column("ok", "bool"),
            Column("t", "timestamp"),
            Column("s", "utf8"),
            Column("y", "bytes"),
            Column("w", "u2", (2,)),
            Column("m", "i4", (2, 2)),
            Column("r", "f8", (-1,)),
        )
    )
    rows: list[list[Any]] = [
        [-5, 0.1, 0.5, True, T0_NS, 'a "b", c', b"\0\xff", [1, 2], [[1, 2], [3, 4]], [0.5, math.inf]],
        [None] * 10,
        [2**62, -math.inf, 1.0, False, T0_NS + 1, "", b"", [0, 0], [[0, 0], [0, 0]], []],
        [0, 5e300, 0.0, False, T0_NS + 123_000_000, "line\nbreak µ", b"x", [9, 9], [[1, 1], [1, 1]], [1e300]],
    ]
    feed = Feed()
    feed.open(1, CSV, schema=schema)
    feed.rows(1, rows)
    table = open_out(stored(tmp_path, feed)).read()
    in_ns = table.set_column(4, "t", table["t"].cast(pa.int64()))
    assert [[row[name] for name in table.column_names] for row in in_ns.to_pylist()] == rows
    assert table.schema.field("t").type == pa.timestamp("ns", tz="UTC")
    assert table.schema.field("m").type == pa.list_(pa.list_(pa.int32(), 2), 2)


def test_nan_comes_back_alone_and_in_arrays(tmp_path):
    feed = Feed()
    feed.open(1, CSV, schema=Schema((Column("f", "f8"), Column("r", "f8", (-1,)))))
    feed.rows(1, [[math.nan, [1.0, math.nan, -math.inf]]])
    (row,) = open_out(stored(tmp_path, feed)).read().to_pylist()
    assert math.isnan(row["f"])
    assert row["r"][0] == 1.0 and math.isnan(row["r"][1]) and row["r"][2] == -math.inf


def test_a_column_that_was_widened_comes_back_as_text(tmp_path):
    feed = Feed()
    feed.open(1, CSV)
    feed.pairs(1, 0, 2)
    feed.rows(1, [[2, "off"]], general=True)
    table = open_out(stored(tmp_path, feed)).read()
    assert table["value"].to_pylist() == ["0", "0.25", "off"]
    assert table["sequence"].to_pylist() == [0, 1, 2]


def test_arrow_batches_come_back_with_their_types(tmp_path):
    batch = pa.record_batch(
        {
            "t": pa.array([1, None], pa.timestamp("s")),
            "l": pa.array([["a", None], None]),
            "n": pa.array([{"k": 1}, None]),
            "u": pa.array([1, 2], pa.uint8()),
        }
    )
    feed = Feed()
    feed.open(1, CSV, schema=None, arrow_schema=arrow_schema_bytes(batch.schema))
    feed.put(Kind.ARROW, 1, bytes(memoryview(arrow_body(batch))), rows=2, t_first_ns=T0_NS)
    assert open_out(stored(tmp_path, feed)).read() == pa.Table.from_batches([batch])


def test_messages_and_events_come_back(tmp_path):
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "m.csv"}, **RAW}, form="raw", schema=None)
    feed.messages(1, [b"one", b"", b"\0\xff"])
    feed.pieces(1, [b"ab", b"cd"])
    feed.open(2, {"csv": {"file_path": "e.csv"}}, form="event", schema=None, job="job2")
    metadata = pack_map({"run": 5})
    feed.put(Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"pay", rows=1)
    out = open_out(stored(tmp_path, feed, "csv", "raw"))
    for store in ("csv", "raw"):
        table = out.read(store=store, job="job1")
        assert table["message"].to_pylist() == [b"one", b"", b"\0\xff", b"abcd"]
    assert out.read(job="job2").to_pylist() == [{"metadata": '{"run":5}', "payload": b"pay"}]


def test_messages_without_lengths_are_refused_with_the_reason(tmp_path):
    feed = Feed()
    feed.open(1, {"raw": {"file_path": "m.bin"}}, form="raw", schema=None)
    feed.messages(1, [b"one", b"three"])
    with pytest.raises(StoreError, match="only with length_prefix"):
        open_out(stored(tmp_path, feed, "raw")).read()


def test_a_range_of_time_is_read_from_dated_and_compressed_files(tmp_path):
    feed = Feed()
    options = {"csv": {"file_path": "a.csv", "add_date": True, "use_zstd": True}}
    feed.open(1, options, schema=Schema((Column("t", "timestamp"), Column("n", "i8"))))
    for number in range(6):
        t_ns = T0_NS + number * DAY_NS // 2
        feed.rows(1, [[t_ns, number]], t_ns)
    out = open_out(stored(tmp_path, feed))
    read = out.read(start="2026-05-01T12:00:00Z", end="2026-05-03")
    assert read["n"].to_pylist() == [1, 2, 3]
    assert out.read(start=datetime(2026, 5, 3, tzinfo=UTC))["n"].to_pylist() == [4, 5]
    assert out.read(end=T0_NS + 1)["n"].to_pylist() == [0]
    assert out.read(start=4, time_column="n")["n"].to_pylist() == [4, 5]
    with pytest.raises(StoreError, match="ISO 8601"):
        out.read(start="yesterday")


def test_marks_are_a_table_with_their_types(tmp_path):
    feed = Feed()
    feed.open(1, CSV)
    feed.pairs(1, 0, 2)
    feed.gap(1, 3, 30, "dropped by policy")
    feed.pairs(1, 32, 2)
    feed.close(1, tail_unknown=True)
    out = open_out(stored(tmp_path, feed))
    (gap,) = out.marks(kind="gap").to_pylist()
    assert (gap["store"], gap["node"], gap["first_seq"], gap["rows"]) == ("store_csv", NODE, 2, 30)
    assert gap["time"].year == 2026
    assert out.marks().column("kind").to_pylist() == ["gap", "close"]
    assert out.marks(job="none").num_rows == 0


def test_damaged_bytes_are_never_returned(tmp_path):
    feed = Feed()
    feed.open(1, CSV)
    feed.pairs(1, 0, 20)
    out_dir = stored(tmp_path, feed)
    path = out_dir / NODE / "a.csv"
    path.write_bytes(path.read_bytes().replace(b"7,1.75", b"7,1.85"))
    with pytest.raises(StoreError, match="are not those that were stored"):
        open_out(out_dir).read()


def test_a_stream_that_is_not_there_is_told_with_those_that_are(tmp_path):
    feed = Feed()
    feed.open(1, CSV)
    out = open_out(stored(tmp_path, feed))
    with pytest.raises(StoreError, match=r"did you mean 'job1'.*there are node1/job1"):
        out.read(job="job11")
    assert out.read(job="job1").num_rows == 0
