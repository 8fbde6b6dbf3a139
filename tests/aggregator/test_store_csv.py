from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.csv
import pytest
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.frame import Kind, pack_map
from edgedaq.schema import Column, Schema
from edgedaq.storage import Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.file_backend import FileBackend

from tests.contract.column_contract import ColumnStoreContract
from tests.contract.faulty_storage import EndedHere, KilledStorage
from tests.contract.file_contract import AppendStoreContract
from tests.contract.store_feed import NODE, T0_NS, Feed


class TestStoreCSV(AppendStoreContract, ColumnStoreContract):
    key = "csv"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(CsvFormat(), base / "state", base / "out", storage)

    def read_pairs(self, base, name):
        with (base / "out" / NODE / name).open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["sequence", "value"]
        return [(int(sequence), float(value)) for sequence, value in rows[1:]]

    def read_marks(self, base):
        path = base / "out" / NODE / "_marks.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def read_columns(self, base, name, schema):
        path = base / "out" / NODE / name
        if not path.exists():
            raise LookupError(name)
        as_text = {column.name: pa.string() for column in schema.columns}
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=as_text,
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        texts = {column.name: table[column.name].to_pylist() for column in schema.columns}
        return {
            column.name: [None if text is None else value_of(column, text) for text in texts[column.name]]
            for column in schema.columns
        }

    def other(self, name: str) -> str:
        return name.replace(".dat", ".2.dat")

    def lines(self, base: Path, name: str = "data.dat") -> list[str]:
        return (base / "out" / NODE / name).read_text().splitlines()

    def test_every_dtype_has_its_form(self, tmp_path):
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
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(
            1,
            [
                [-5, 0.1, 0.5, True, T0_NS, 'a "b", c', b"\0\xff", [1, 2], [[1, 2], [3, 4]], [0.5, 2]],
                [None] * 10,
                [2**62, float("nan"), 1, False, T0_NS + 1, "", b"", [0, 0], [0] * 4, []],
                [
                    0,
                    float("inf"),
                    0,
                    False,
                    T0_NS + 123_000_000,
                    "line\nbreak µ",
                    b"x",
                    [9, 9],
                    [1] * 4,
                    [1e300],
                ],
            ],
        )
        self.feed_all(tmp_path, feed)
        with (tmp_path / "out" / NODE / "data.dat").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [
            ["i", "f", "g", "ok", "t", "s", "y", "w", "m", "r"],
            [
                "-5",
                "0.1",
                "0.5",
                "true",
                "2026-05-01T00:00:00Z",
                'a "b", c',
                "00ff",
                "[1,2]",
                "[[1,2],[3,4]]",
                "[0.5,2]",
            ],
            [""] * 10,
            [
                str(2**62),
                "nan",
                "1",
                "false",
                "2026-05-01T00:00:00.000000001Z",
                "",
                "",
                "[0,0]",
                "[[0,0],[0,0]]",
                "[]",
            ],
            [
                "0",
                "inf",
                "0",
                "false",
                "2026-05-01T00:00:00.123Z",
                "line\nbreak µ",
                "78",
                "[9,9]",
                "[[1,1],[1,1]]",
                "[1e+300]",
            ],
        ]
        assert '""' in (tmp_path / "out" / NODE / "data.dat").read_text()

    def test_floats_read_back_as_they_were(self, tmp_path):
        values = [
            (index, value) for index, value in enumerate([0.1 + 0.2, 1e-310, -0.0, 5e300, 1 / 3, 2.0**60])
        ]
        feed = Feed()
        feed.open(1, self.config())
        feed.rows(1, values)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == values

    def test_a_column_that_widens_goes_on_in_the_same_file(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 2)
        feed.rows(1, [[2, "off"], [None, 1.5]], general=True)
        feed.pairs(1, 3, 1)
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path) == ["sequence,value", "0,0", "1,0.25", "2,off", ",1.5", "3,0.75"]

    def test_other_columns_go_to_a_numbered_file_and_come_back_to_their_own(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("sub/data.csv"))
        feed.open(2, self.config("sub/data.csv"), schema=Schema((Column("other", "i8"),)))
        feed.open(3, self.config("sub/data.csv"))
        feed.pairs(1, 0, 1)
        feed.rows(2, [[5]])
        self.feed_all(tmp_path, feed)
        feed.pairs(3, 1, 1)
        feed.rows(2, [[6]])
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path, "sub/data.csv") == ["sequence,value", "0,0", "1,0.25"]
        assert self.lines(tmp_path, "sub/data.2.csv") == ["other", "5", "6"]

    def test_names_of_columns_are_quoted_where_they_must_be(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(), schema=Schema((Column('a,"b"', "i8"), Column("µ ☢", "i8"))))
        feed.rows(1, [[1, 2]])
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path) == ['"a,""b""",µ ☢', "1,2"]

    def test_a_file_of_an_earlier_installation_is_continued_if_its_columns_are_the_same(self, tmp_path):
        (tmp_path / "out" / NODE).mkdir(parents=True)
        (tmp_path / "out" / NODE / "data.dat").write_text("sequence,value\n7,1\n")
        (tmp_path / "out" / NODE / "b.dat").write_text("sequence,value\n7,")
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2, self.config("b.dat"))
        feed.pairs(1, 8, 1)
        feed.pairs(2, 8, 1)
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path) == ["sequence,value", "7,1", "8,2"]
        assert self.lines(tmp_path, "b.dat") == ["sequence,value", "7,"]
        assert self.lines(tmp_path, "b.2.dat") == ["sequence,value", "8,2"]

    def test_zstd_writes_one_frame_per_commit_that_any_reader_joins(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("data.csv", use_zstd=True, add_date=True))
        expected = feed.pairs(1, 0, 1000)
        expected += feed.pairs(1, 1000, 1000)
        self.feed_all(tmp_path, feed, per_commit=2)
        expected += feed.pairs(1, 2000, 5)
        self.feed_all(tmp_path, feed)
        path = tmp_path / "out" / NODE / "2026-05-01_data.csv.zst"
        assert path.read_bytes().count(b"\x28\xb5\x2f\xfd") == 3
        with pa.input_stream(str(path), compression="zstd") as stream:
            lines = stream.read().decode().splitlines()
        assert lines[0] == "sequence,value"
        assert [(int(a), float(b)) for a, b in (line.split(",") for line in lines[1:])] == expected

    def test_zstd_survives_an_end_at_any_operation(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("data.csv", use_zstd=True))
        expected = feed.pairs(1, 0, 10) + feed.pairs(1, 10, 10) + feed.pairs(1, 20, 10)
        for at in range(100):
            base = tmp_path / str(at)
            try:
                self.feed_all(base, feed, KilledStorage(at), per_commit=1)
            except EndedHere:
                self.feed_all(base, feed)
            else:
                break
            with pa.input_stream(str(base / "out" / NODE / "data.csv.zst"), compression="zstd") as stream:
                lines = stream.read().decode().splitlines()[1:]
            assert [(int(a), float(b)) for a, b in (line.split(",") for line in lines)] == expected
        assert at > 10

    def test_raw_messages_and_events_have_columns_too(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("raw.csv"), form="raw", schema=None)
        feed.messages(1, [b"\0\1", b"", b"x"])
        feed.pieces(1, [b"ab", b"cd"])
        feed.open(2, self.config("event.csv"), form="event", schema=None)
        metadata = pack_map({"run": 5, "raw": b"\xff"})
        feed.put(Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"pay", rows=1)
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path, "raw.csv") == ["message", "0001", '""', "78", "61626364"]
        assert self.lines(tmp_path, "event.csv") == [
            "metadata,payload",
            '"{""run"":5,""raw"":""ff""}",706179',
        ]

    def test_arrow_batches_of_any_type_have_a_form(self, tmp_path):
        batch = pa.record_batch(
            {
                "d": pa.array(["x", "y,z"]).dictionary_encode().dictionary_decode(),
                "l": pa.array([["a", None], None]),
                "n": pa.array([{"k": 1}, None]),
                "z": pa.nulls(2),
                "t": pa.array([1, None], pa.timestamp("s")),
                "h": pa.array([1.5, None], pa.float16()),
                "v": pa.array(['a,"b"', None], pa.string_view()),
                "s": pa.array([[{"k": 1}], None]),
            }
        )
        feed = Feed()
        feed.open(1, self.config(), schema=None, arrow_schema=arrow_schema_bytes(batch.schema))
        feed.put(Kind.ARROW, 1, bytes(memoryview(arrow_body(batch))), rows=2, t_first_ns=T0_NS)
        self.feed_all(tmp_path, feed)
        assert self.lines(tmp_path) == [
            "d,l,n,z,t,h,v,s",
            'x,"[""a"",null]","{""k"":1}",,1970-01-01T00:00:01Z,1.5,"a,""b""","[{""k"":1}]"',
            '"y,z",,,,,,,',
        ]

    @pytest.mark.parametrize(
        "metadata", [{"a": {b"key": 1}}, {"a": {None: 1}}, {"a": [[[1]]]}, {"a": float("nan")}, {"t": "\n,"}]
    )
    def test_an_event_of_any_metadata_is_stored_or_set_aside_and_the_next_is_stored(self, tmp_path, metadata):
        feed = Feed()
        feed.open(1, self.config(), form="event", schema=None)
        for held in (msgpack.packb(metadata), pack_map({"good": 1})):
            feed.put(Kind.EVENT, 1, len(held).to_bytes(4, "little") + held, rows=1, t_first_ns=T0_NS)
        refused = len(self.feed_all(tmp_path, feed))
        assert len(self.lines(tmp_path)) == 1 + 2 - refused
        assert self.lines(tmp_path)[-1] == '"{""good"":1}",""'


def value_of(column: Column, text: str) -> Any:
    """Return the value of a field, as the table of ``csv.py`` says."""
    if column.shape:
        text = re.sub(r"\b(inf|nan)\b", lambda m: {"inf": "Infinity", "nan": "NaN"}[m[0]], text)
        return json.loads(text, parse_int=float if column.dtype[0] == "f" else int)
    if column.dtype == "utf8":
        return text
    if column.dtype == "bytes":
        return bytes.fromhex(text)
    if column.dtype == "timestamp":
        return pa.scalar(text.removesuffix("Z")).cast(pa.timestamp("ns")).cast(pa.int64()).as_py()
    if column.dtype == "bool":
        return {"true": True, "false": False}[text]
    return float(text) if column.dtype[0] == "f" else int(text)
