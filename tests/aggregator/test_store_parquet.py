from __future__ import annotations

import csv
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.columns import Column, Schema
from edgedaq.errors import StoreError
from edgedaq.frame import Kind, pack_map
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.commits import LOG_NAME
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.loop import Cadence
from edgedaq_aggregator.stores.parquet import ParquetBackend

from tests.contract.column_contract import ColumnStoreContract, arrow_values
from tests.contract.faulty_storage import EndedHere, KilledStorage
from tests.contract.file_contract import FileStoreContract, StorageStoreContract
from tests.contract.store_feed import NODE, T0_NS, Feed
from tests.contract.store_under_test import wait_for


class TestStoreParquet(FileStoreContract, StorageStoreContract, ColumnStoreContract):
    key = "parquet"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return ParquetBackend(base / "state", base / "out", storage)

    def parts(self, base: Path, name: str = "data.dat") -> list[Path]:
        return sorted((base / "out" / NODE / name).glob("*.parquet"))

    def table(self, base: Path, name: str = "data.dat") -> pa.Table:
        parts = self.parts(base, name)
        if not parts:
            raise LookupError(name)
        return pa.concat_tables([pq.ParquetFile(part).read() for part in parts])

    def read_pairs(self, base, name):
        table = self.table(base, name)
        return list(zip(table["sequence"].to_pylist(), table["value"].to_pylist(), strict=True))

    def read_columns(self, base, name, schema):
        table = self.table(base, name)
        assert table.schema.names == list(schema.names)
        return {column.name: arrow_values(table[column.name]) for column in schema.columns}

    def other(self, name: str) -> str:
        return name.replace(".dat", ".2.dat")

    def read_marks(self, base):
        path = base / "out" / NODE / "_marks.parquet.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def test_what_has_its_name_is_committed_and_complete_at_any_moment(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        with closing(self.make_backend(tmp_path, OsStorage())) as backend:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            make_durable = engine.commit()
            assert self.parts(tmp_path) == []
            make_durable()
            assert self.read_pairs(tmp_path, "data.dat") == expected
            engine.committed_now()
            position = feed.position
            more = feed.pairs(1, 10, 10)
            engine.take(feed.since(position))
            make_durable = engine.commit()
            assert self.read_pairs(tmp_path, "data.dat") == expected
            make_durable()
            assert self.read_pairs(tmp_path, "data.dat") == expected + more
        assert [part.name for part in self.parts(tmp_path)] == ["000001.parquet", "000002.parquet"]

    def test_the_directory_is_read_as_one_table_by_those_who_know_nothing_of_us(self, tmp_path):
        import pyarrow.dataset

        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10) + feed.pairs(1, 10, 10) + feed.pairs(1, 20, 10)
        with pytest.raises(EndedHere):
            self.feed_all(tmp_path, feed, KilledStorage(24), per_commit=1)
        assert any(path.name.endswith(".new") for path in (tmp_path / "out" / NODE / "data.dat").iterdir())
        found = pyarrow.dataset.dataset(tmp_path / "out" / NODE / "data.dat").to_table()
        pairs = list(zip(found["sequence"].to_pylist(), found["value"].to_pylist(), strict=True))
        assert pairs
        assert pairs == expected[: len(pairs)]

    def test_no_hidden_file_stays_behind_a_death(self, tmp_path):
        feed, a, _ = self.mixed_feed()
        for at in range(10, 40):
            base = tmp_path / str(at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, KilledStorage(at), per_commit=2)
            self.feed_all(base, feed)
            feed.open(1000 + at, self.config("a.dat"))
            more = feed.pairs(1000 + at, 1, 1)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "a.dat")[len(a) :][-1:] == more
            assert not list((base / "out").rglob("*.new"))

    def test_rows_beyond_a_row_group_are_written_before_the_commit(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = []
        for index in range(13):
            expected += feed.pairs(1, index * 100_000, 100_000)
        self.feed_all(tmp_path, feed, per_commit=100)
        (part,) = self.parts(tmp_path)
        assert pq.ParquetFile(part).num_row_groups == 2
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_units_are_kept_with_their_columns(self, tmp_path):
        schema = Schema((Column("u", "f8", unit="kV"), Column("n", "i8")))
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, [[1.5, 2]])
        self.feed_all(tmp_path, feed)
        feed.rows(1, [[2.5, 3]])
        self.feed_all(tmp_path, feed)
        assert len(self.parts(tmp_path)) == 2
        held = pq.read_schema(self.parts(tmp_path)[0])
        assert held.field("u").metadata == {b"unit": b"kV"}
        assert self.table(tmp_path)["u"].to_pylist() == [1.5, 2.5]

    @pytest.mark.parametrize("compression", ["zstd", "snappy", "lz4", "none"])
    def test_parts_are_compressed_as_asked(self, tmp_path, compression):
        feed = Feed()
        feed.open(1, self.config(compression=compression))
        expected = feed.pairs(1, 0, 1000)
        self.feed_all(tmp_path, feed)
        (part,) = self.parts(tmp_path)
        told = pq.ParquetFile(part).metadata.row_group(0).column(1).compression
        assert told == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_arrow_types_of_any_kind_are_kept_or_refused_and_the_next_frame_is_stored(self, tmp_path):
        kept = pa.record_batch(
            {
                "l": pa.array([["a", None], None]),
                "n": pa.array([{"k": 1}, None]),
                "z": pa.nulls(2),
                "t": pa.array([1, None], pa.timestamp("s")),
                "h": pa.array([1.5, None], pa.float16()),
                "d": pa.array([1, None], pa.decimal128(10)),
            }
        )
        worse = pa.record_batch({"x": pa.array([None], pa.month_day_nano_interval())})
        late = pa.record_batch({"t": pa.array([2**62], pa.timestamp("s"))})
        feed = Feed()
        for stream, batch in enumerate((kept, worse, late), 1):
            feed.open(
                stream,
                self.config(f"{stream}.dat"),
                schema=None,
                arrow_schema=arrow_schema_bytes(batch.schema),
            )
            body = bytes(memoryview(arrow_body(batch)))
            feed.put(Kind.ARROW, stream, body, rows=batch.num_rows, t_first_ns=T0_NS)
        feed.open(9, self.config())
        expected = feed.pairs(9, 0, 3)
        refusals = self.feed_all(tmp_path, feed)
        assert self.table(tmp_path, "1.dat").to_pylist() == kept.to_pylist()
        assert [refusal.frame.stream for refusal in refusals] == [2, 3]
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_raw_messages_and_events_have_columns_too(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("raw.dat"), form="raw", schema=None)
        feed.messages(1, [b"\0\1", b"", b"x"])
        feed.pieces(1, [b"ab", b"cd"])
        feed.open(2, self.config("event.dat"), form="event", schema=None)
        metadata = pack_map({"run": 5, "raw": b"\xff"})
        feed.put(Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"pay", rows=1)
        self.feed_all(tmp_path, feed)
        assert self.table(tmp_path, "raw.dat")["message"].to_pylist() == [b"\0\1", b"", b"x", b"abcd"]
        found = self.table(tmp_path, "event.dat").to_pylist()
        assert found == [{"metadata": '{"run":5,"raw":"ff"}', "payload": b"pay"}]

    def test_a_directory_of_somebody_with_other_columns_is_left_alone(self, tmp_path):
        directory = tmp_path / "out" / NODE / "data.dat"
        directory.mkdir(parents=True)
        pq.write_table(pa.table({"other": [1]}), directory / "000007.parquet")
        (tmp_path / "out" / NODE / "data.2.dat").write_bytes(b"a file")
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 3)
        self.feed_all(tmp_path, feed)
        assert [path.name for path in directory.iterdir()] == ["000007.parquet"]
        assert self.read_pairs(tmp_path, "data.3.dat") == expected

    def test_a_directory_moved_away_before_its_commit_holds_nothing_up(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 3)
        data = tmp_path / "out" / NODE / "data.dat"
        with closing(self.make_backend(tmp_path, OsStorage())) as backend:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            make_durable = engine.commit()
            data.rename(data.with_name("old.dat"))
            with pytest.raises((StoreError, OSError)):
                make_durable()
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_parts_that_were_moved_away_leave_the_numbers_of_the_next_ones_alone(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 3)
        self.feed_all(tmp_path, feed)
        self.parts(tmp_path)[0].unlink()
        feed.pairs(1, 3, 3)
        self.feed_all(tmp_path, feed)
        assert [part.name for part in self.parts(tmp_path)] == ["000002.parquet"]

    def test_after_damaged_commit_records_datasets_are_left_alone_and_rows_go_on_beside_them(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 3) + feed.pairs(1, 3, 3) + feed.pairs(1, 6, 3)
        self.feed_all(tmp_path, feed, per_commit=1)
        log = tmp_path / "state" / LOG_NAME
        image = bytearray(log.read_bytes())
        salt = bytes(image[8:16])
        second = image.find(salt, image.find(salt, 64) + 8)
        image[second + 40] ^= 1
        log.write_bytes(image)
        more = feed.pairs(1, 9, 3)
        for _ in range(2):
            self.feed_all(tmp_path, feed)
            assert self.read_pairs(tmp_path, "data.dat") == expected
            assert self.read_pairs(tmp_path, "data.2.dat") == more

    def test_two_stores_never_write_parts_of_one_node(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 5)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "out").symlink_to(tmp_path / "out")
        with closing(self.make_backend(tmp_path, OsStorage())) as backend:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            engine.commit()()
            (tmp_path / "out").mkdir(exist_ok=True)
            with pytest.raises(StoreError, match="another store writes Parquet files of node1"):
                self.feed_all(tmp_path / "other", feed)


def test_a_quiet_stream_is_sealed_by_time_and_a_loud_one_by_size(tmp_path: Any) -> None:
    store = TestStoreParquet()
    feed = Feed()
    feed.open(1, store.config())
    expected = feed.pairs(1, 0, 10)
    with store.looping(tmp_path, feed, OsStorage(), cadence=Cadence(1 << 20, 4.0, at_once=False)) as (
        loop,
        _,
    ):
        wait_for(lambda: loop.report().get("in_count") == 10)
        wait_for(lambda: loop.report()["files"] == 1)  # written, and not held in what was read with it
        assert loop.report()["commit_count"] == 0
        wait_for(lambda: loop.report()["commit_count"] == 1)
        assert store.read_pairs(tmp_path, "data.dat") == expected
        for part in range(20):
            expected += feed.pairs(1, 10 + part * 10_000, 10_000)
        wait_for(lambda: loop.report()["commit_count"] >= 3)
    assert store.read_pairs(tmp_path, "data.dat") == expected
