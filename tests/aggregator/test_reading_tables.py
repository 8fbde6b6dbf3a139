"""Every store of tables gives back what was put, by the one way of reading, and is asked by verify."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.frame import Kind, pack_map
from edgedaq.schema import Column, Schema
from edgedaq_aggregator.cli import main

from tests.aggregator.stored_places import Place, made_places
from tests.contract.store_feed import NODE, T0_NS, Feed

KEYS = ("sqlite", "parquet", "mysql", "redis", "packed", "root", "hdf5")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=KEYS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with made_places(request.param, tmp_path) as made:
        yield made


def pairs(table: pa.Table) -> list[Any]:
    return list(zip(table["sequence"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_a_job_is_read_over_all_of_its_lives_in_order(place):
    feed = Feed()
    expected = []
    for stream in (1, 2, 3):
        feed.open(stream, place.config(), t_open_ns=T0_NS + stream)
        expected += feed.pairs(stream, stream * 100, 20)
        feed.close(stream)
    out = place.stored(feed)
    table = out.read(node=NODE, job="job1")
    assert table.schema.types == [pa.int64(), pa.float64()]
    assert pairs(table) == expected
    assert [one.rows for one in out.streams()] == [20, 20, 20]
    assert place.verify().is_proven


def test_every_type_comes_back_as_it_was(place):
    schema = Schema(
        (
            Column("i", "i8"),
            Column("u", "u8"),
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
        [
            -5,
            2**64 - 1,
            0.1,
            0.5,
            True,
            T0_NS,
            'a "b", c',
            b"\0\xff",
            [1, 2],
            [[1, 2], [3, 4]],
            [0.5, math.inf],
        ],
        [None] * 11,
        [2**62, 0, -1e300, 1.0, False, T0_NS + 1, "", b"", [0, 0], [[0, 0], [0, 0]], []],
        [
            0,
            1,
            5e300,
            0.0,
            False,
            T0_NS + 123_000_000,
            "line\nbreak µ",
            b"x",
            [9, 9],
            [[1, 1], [1, 1]],
            [1e300],
        ],
    ]
    feed = Feed()
    feed.open(1, place.config(), schema=schema)
    feed.rows(1, rows)
    table = place.stored(feed).read()
    in_ns = table.set_column(5, "t", table["t"].cast(pa.int64()))
    rows[1] = place.missing
    found = [[row[name] for name in table.column_names] for row in in_ns.to_pylist()]
    assert repr(found) == repr(rows)
    assert table.schema.field("t").type == pa.timestamp("ns", tz="UTC")
    assert table.schema.field("m").type == pa.list_(pa.list_(pa.int32(), 2), 2)
    assert place.verify().is_proven


def test_nan_and_infinity_come_back_where_the_store_has_them_and_are_missing_elsewhere(place):
    feed = Feed()
    feed.open(1, place.config(), schema=Schema((Column("f", "f8"), Column("n", "i8"))))
    feed.rows(1, [[math.nan, 1], [math.inf, 2], [-math.inf, 3]])
    found = place.stored(feed).read()["f"].to_pylist()
    kept = {"mysql": [None, None, None], "sqlite": [None, math.inf, -math.inf]}
    expected = kept.get(place.key, [math.nan, math.inf, -math.inf])
    assert repr(found) == repr(expected)
    assert place.verify().is_proven


def test_a_column_that_was_widened_comes_back_as_text(place):
    feed = Feed()
    feed.open(1, place.config())
    feed.pairs(1, 0, 2)
    feed.rows(1, [[2, "off"]], general=True)
    table = place.stored(feed).read()
    assert table["sequence"].to_pylist() == [0, 1, 2]
    assert [str(float(v)) if v != "off" else v for v in table["value"].to_pylist()] == ["0.0", "0.25", "off"]
    assert not place.verify().problems


def test_arrow_batches_come_back_with_their_types(place):
    batch = pa.record_batch(
        {
            "t": pa.array([1, None], pa.timestamp("ns")),
            "l": pa.array([["a", None], None]),
            "e": pa.array([[1, None], [2]], pa.list_(pa.int32())),
            "u": pa.array([1, 2], pa.uint8()),
        }
    )
    feed = Feed()
    feed.open(1, place.config(), schema=None, arrow_schema=arrow_schema_bytes(batch.schema))
    feed.put(Kind.ARROW, 1, bytes(memoryview(arrow_body(batch))), rows=2, t_first_ns=T0_NS)
    table = place.stored(feed).read()
    assert table.schema.types == batch.schema.types
    if place.key in ("root", "hdf5"):
        assert table["t"].cast(pa.int64()).to_pylist() == [1, None]
        assert table["l"].to_pylist() == [["a", None], None]
        assert table["e"].to_pylist() == [[1, -(2**31)], [2]]
    else:
        assert table == pa.Table.from_batches([batch])
    assert place.verify().is_proven


def test_messages_events_and_marks_come_back(place):
    feed = Feed()
    feed.open(1, place.config("m"), form="raw", schema=None)
    feed.messages(1, [b"one", b"", b"\0\xff"])
    feed.pieces(1, [b"ab", b"cd"])
    feed.open(2, place.config("e"), form="event", schema=None, job="job2")
    metadata = pack_map({"run": 5})
    feed.put(Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"pay", rows=1)
    feed.gap(2, 3, 30, "dropped by policy")
    out = place.stored(feed)
    assert out.read(job="job1")["message"].to_pylist() == [b"one", b"", b"\0\xff", b"abcd"]
    assert out.read(job="job2").to_pylist() == [{"metadata": '{"run":5}', "payload": b"pay"}]
    (gap,) = out.marks(kind="gap").to_pylist()
    assert (gap["node"], gap["job"], gap["first_seq"], gap["rows"]) == (NODE, "job2", 2, 30)
    assert place.verify().is_proven


def test_streams_that_share_a_place_are_proven_and_read(place):
    feed = Feed()
    feed.open(1, place.config())
    feed.open(2, place.config(), job="job2")
    for part in range(3):
        feed.pairs(1, part, 1)
        feed.pairs(2, 100 + part, 1)
    feed.gap(1, 2, 5, "dropped by policy")
    feed.pairs(1, 8, 3)
    out = place.stored(feed)
    report = place.verify()
    assert report.is_proven, report
    numbers = (0, 1, 2, 8, 9, 10, 100, 101, 102)
    assert sorted(pairs(out.read())) == [(n, n / 4) for n in numbers]
    if place.key in ("sqlite", "mysql", "packed"):
        assert [n for n, _ in pairs(out.read(job="job2"))] == [100, 101, 102]


@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_value_that_was_changed_is_named_with_its_place(place, row):
    feed = Feed()
    feed.open(1, place.config())
    for part in range(4):
        feed.pairs(1, part * 10, 10)
    place.stored(feed)
    assert place.verify().is_proven
    where, number = place.change(row)
    problem = place.verify().problems[0]
    assert where in problem.where
    assert number in problem.place, problem
    assert f"row {row} of stream {1:016x} (seq {1 + row // 10})" in problem.what
    assert "value: stored was" in problem.what


@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_row_that_was_removed_is_named_with_its_place(place, row):
    feed = Feed()
    feed.open(1, place.config())
    for part in range(4):
        feed.pairs(1, part * 10, 10)
    place.stored(feed)
    where, number = place.remove(row)
    problem = place.verify().problems[0]
    assert where in problem.where
    assert number in problem.place, problem


def test_rows_that_the_journal_no_longer_has_are_counted_and_the_verdict_says_so(place):
    feed = Feed()
    feed.open(1, place.config())
    feed.pairs(1, 0, 10)
    place.stored(feed)
    place.forget_journal()
    report = place.verify()
    assert report.is_proven
    assert report.counted_rows == (0 if place.key == "parquet" else 10)
    place.remove(3)
    assert place.verify().problems


def test_a_value_changed_among_rows_of_several_streams_is_named(place):
    feed = Feed()
    feed.open(1, place.config())
    feed.open(2, place.config(), job="job2")
    for part in range(4):
        feed.pairs(1, part * 10, 10)
        feed.pairs(2, 1000 + part * 10, 10)
    place.stored(feed)
    report = place.verify()
    assert report.is_proven and not report.counted_rows
    where, number = place.change(25)
    problem = place.verify().problems[0]
    assert where in problem.where
    if place.key != "parquet":  # of rows that take turns in a part only the part is known
        assert number in problem.place, problem
        assert "value: stored was" in problem.what


@pytest.mark.parametrize("kind", ["mysql", "redis"])
def test_a_store_that_cannot_be_asked_is_never_proven(kind, tmp_path, capsys):
    with made_places(kind, tmp_path) as place:
        feed = Feed()
        feed.open(1, place.config())
        feed.pairs(1, 0, 10)
        place.stored(feed)
        assert main(["verify", str(place.path)]) == 0
        place.server.kill()
        for options in ([], ["--moved-ok"]):
            assert main(["verify", str(place.path), *options]) == 1
            verdict = capsys.readouterr().out.splitlines()[-1]
            assert verdict.startswith(f"verify: not refuted, but store_{kind} could not be asked")
        assert main(["verify", str(place.root / "out")]) == 1
        assert "give the directory of TOML files" in capsys.readouterr().out
        place.server.start()
        assert main(["verify", str(place.path)]) == 0
