from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from edgedaq.columns import Column, Schema
from edgedaq.frame import Kind, pack_map
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.commits import read_commits
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.sqlite import OPEN_DATABASES_MAX, SqliteBackend
from edgedaq_aggregator.stores.sqlite_rows import COLUMNS_MAX

from tests.contract.column_contract import ColumnStoreContract
from tests.contract.faulty_storage import EndedHere, KilledStorage, PowerCutStorage
from tests.contract.file_contract import FileStoreContract
from tests.contract.store_feed import DAY_NS, NODE, T0_NS, Feed
from tests.contract.store_under_test import wait_for

OWN = ("edgedaq_marks", "edgedaq_columns", "edgedaq_watermarks", "edgedaq_runs")


class TestStoreSQLite(FileStoreContract, ColumnStoreContract):
    key = "sqlite"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return SqliteBackend(base / "state", base / "out", storage)

    def query(self, base: Path, name: str, sql: str, node: str = NODE) -> list[tuple[Any, ...]]:
        path = base / "out" / node / name
        if not path.exists():
            raise LookupError(name)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return connection.execute(sql).fetchall()

    def read_pairs(self, base, name):
        return self.query(base, name, "SELECT sequence, value FROM data ORDER BY rowid")

    def read_marks(self, base):
        found = []
        for path in sorted((base / "out" / NODE).rglob("*")):
            if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3":
                with closing(sqlite3.connect(path)) as connection:
                    cursor = connection.execute("SELECT * FROM edgedaq_marks ORDER BY rowid")
                    names = [column[0] for column in cursor.description]
                    found += [
                        {k: "" if v is None else str(v) for k, v in zip(names, row, strict=True)}
                        for row in cursor
                    ]
        return found

    def read_columns(self, base, name, schema):
        file_name, _, table = name.partition("#")
        names = ", ".join(quoted(self.stored_name(column.name)) for column in schema.columns)
        try:
            rows = self.query(base, file_name, f'SELECT {names} FROM "{table or "data"}"')  # noqa: S608 -- quoted
        except sqlite3.OperationalError as e:
            raise LookupError(name) from e
        columns = zip(*rows, strict=True)
        return {
            self.stored_name(column.name): [value_of(column, value) for value in values]
            for column, values in zip(schema.columns, columns, strict=True)
        }

    def stored(self, column: Column, value: Any) -> Any:  # noqa: ARG002 -- of any column
        return None if isinstance(value, float) and math.isnan(value) else value

    def other(self, name: str) -> str:
        return f"{name}#data_2"

    def test_without_the_watermark_rows_would_be_stored_twice(self, tmp_path):
        # Here the safety is in the database itself: without its row there, the same frames come in again.
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        path = tmp_path / "out" / NODE / "data.dat"
        for has_watermark in (True, False):
            if not has_watermark:
                with closing(sqlite3.connect(path)) as connection, connection:
                    connection.execute("DELETE FROM edgedaq_watermarks")
            backend = self.make_backend(tmp_path, OsStorage())
            try:
                engine = StoreEngine(self.key, backend, lambda _: None)
                engine.table.streams[1].next_seq = 1
                engine.take(feed.since(0))
                engine.commit()()
                engine.committed_now()
            finally:
                backend.close()
            assert self.read_pairs(tmp_path, "data.dat") == expected * (1 if has_watermark else 2)

    def test_a_power_cut_that_loses_the_commit_record_repeats_nothing(self, tmp_path):
        feed, a, b = self.mixed_feed()
        (tmp_path / "whole").mkdir()
        whole = KilledStorage()
        self.feed_all(tmp_path / "whole", feed, whole, per_commit=2)
        marks = self.read_marks(tmp_path / "whole")
        for at in range(whole.count):
            base = tmp_path / str(at)
            (base / "state").mkdir(parents=True)
            storage = PowerCutStorage([base / "state"], at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=2)
            storage.cut()
            self.feed_all(base, feed)
            assert self.read_pairs(base, "a.dat") == a, f"operation {at}"
            assert self.read_pairs(base, "b.dat") == b, f"operation {at}"
            assert self.read_marks(base) == marks, f"operation {at}"

    def test_rows_of_two_days_within_one_frame_run_are_stored_once_whatever_database_was_first(
        self, tmp_path
    ):
        feed = Feed()
        feed.open(1, self.config(add_date=True))
        first = feed.pairs(1, 0, 5, T0_NS)
        second = feed.pairs(1, 5, 5, T0_NS + DAY_NS)
        first += feed.pairs(1, 10, 5, T0_NS)
        second += feed.pairs(1, 15, 5, T0_NS + DAY_NS)
        for at in range(100):
            base = tmp_path / str(at)
            try:
                self.feed_all(base, feed, KilledStorage(at), per_commit=10)
            except EndedHere:
                self.feed_all(base, feed, per_commit=1)
            else:
                break
            assert self.read_pairs(base, "2026-05-01_data.dat") == first
            assert self.read_pairs(base, "2026-05-02_data.dat") == second
        assert at > 10

    def test_a_frame_refused_before_a_death_is_counted_as_missing_after_it_too(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.put_bad_frame(feed, 1)
        expected += feed.pairs(1, 20, 10)
        for at in range(100):
            base = tmp_path / str(at)
            try:
                self.feed_all(base, feed, KilledStorage(at), per_commit=10)
            except EndedHere:
                self.feed_all(base, feed)
            else:
                break
            assert self.read_pairs(base, "data.dat") == expected
            state, _ = read_commits(base / "state", OsStorage())
            account = state.table.streams[1]
            assert (account.rows, account.gap_rows) == (20, 10), f"operation {at}"
        assert at > 10

    def test_it_is_read_while_it_is_written_without_either_waiting(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        backend = self.make_backend(tmp_path, OsStorage())
        path = tmp_path / "out" / NODE / "data.dat"
        with closing(backend):
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            engine.commit()()
            engine.committed_now()
            with closing(sqlite3.connect(path, isolation_level=None)) as reader:
                assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                reader.execute("BEGIN")
                assert reader.execute("SELECT * FROM data").fetchall() == expected
                position = feed.position
                more = feed.pairs(1, 10, 10)
                engine.take(feed.since(position))
                engine.commit()()
                engine.committed_now()
                assert reader.execute("SELECT * FROM data").fetchall() == expected
                reader.execute("COMMIT")
                assert reader.execute("SELECT * FROM data").fetchall() == expected + more

    def test_a_reader_that_locks_everything_holds_it_up_only_as_long_as_it_does(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 10, 10)
        path = tmp_path / "out" / NODE / "data.dat"
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.looping(tmp_path, feed, OsStorage()) as (loop, _):
                wait_for(lambda: "locked" in (loop.report()["error"] or ""))
                other.execute("ROLLBACK")
                wait_for(lambda: loop.report()["error"] is None and loop.report().get("lag_bytes") == 0)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    @pytest.mark.parametrize("content", [b"something of somebody", b"SQLite format 3\0" + b"\xff" * 5000])
    def test_a_file_that_is_no_database_is_left_alone(self, tmp_path, content):
        path = tmp_path / "out" / NODE / "data.dat"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 10, 10)
        self.feed_all(tmp_path, feed)
        assert path.read_bytes() == content
        assert self.read_pairs(tmp_path, "data.2.dat") == expected

    def test_a_database_that_is_damaged_while_it_is_written_is_left_alone_and_nothing_more_is_lost(
        self, tmp_path
    ):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 5000)
        self.feed_all(tmp_path, feed)
        path = tmp_path / "out" / NODE / "data.dat"
        size = path.stat().st_size
        with path.open("r+b") as file:
            for page in range(1, size // 4096):
                file.seek(4096 * page)
                file.write(b"\xff" * 4096)
        expected = feed.pairs(1, 5000, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, _):
            wait_for(lambda: loop.report()["error"] is None and loop.report().get("lag_bytes") == 0)
        assert self.read_pairs(tmp_path, "data.2.dat") == expected

    def test_more_databases_than_are_kept_open_fit_into_one_commit(self, tmp_path):
        feed = Feed()
        count = 2 * OPEN_DATABASES_MAX
        for stream in range(1, count + 1):
            feed.open(stream, self.config(f"{stream}.dat"))
        expected = {stream: feed.pairs(stream, stream, 2) for stream in range(1, count + 1)}
        expected[1] += feed.pairs(1, 7, 2)
        self.feed_all(tmp_path, feed, per_commit=10 * count)
        self.feed_all(tmp_path, feed)
        assert {stream: self.read_pairs(tmp_path, f"{stream}.dat") for stream in expected} == expected

    @pytest.mark.parametrize(
        "table", ['x"; DROP TABLE data; --', "select", "'", "läufe ☢", "a b", "Data", "_", "1"]
    )
    def test_a_table_of_any_name_is_only_a_name(self, tmp_path, table):
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2, self.config(table_name=table))
        data = feed.pairs(1, 0, 3)
        other = feed.pairs(2, 10, 3)
        self.feed_all(tmp_path, feed)
        found = self.query(tmp_path, "data.dat", f"SELECT * FROM {quoted(table)} ORDER BY rowid")  # noqa: S608
        assert found == (data + other if table == "Data" else other)

    @pytest.mark.parametrize("table", ["sqlite_master", "edgedaq_marks", "", "x" * 65, "a\0b"])
    def test_a_table_name_that_is_taken_or_none_is_redirected_and_nothing_is_lost(self, tmp_path, table):
        feed = Feed()
        feed.open(1, self.config(table_name=table))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"_refused/{1:016x}.sqlite") == expected
        assert [mark["kind"] for mark in self.read_marks(tmp_path)] == ["redirected"]

    def test_a_view_or_an_index_of_that_name_is_left_alone(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 5)
        path = tmp_path / "out" / NODE / "data.dat"
        path.parent.mkdir(parents=True)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE VIEW data AS SELECT 1 AS sequence, 2 AS value")
            connection.execute("CREATE TABLE other (x)")
            connection.execute("CREATE INDEX data_2 ON other (x)")
        self.feed_all(tmp_path, feed)
        assert self.query(tmp_path, "data.dat", "SELECT * FROM data_3") == expected

    def test_columns_that_differ_in_case_alone_are_numbered(self, tmp_path):
        schema = Schema((Column("a", "i8"), Column("A", "i8"), Column("a_2", "i8")))
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, [[1, 2, 3]])
        self.feed_all(tmp_path, feed)
        assert self.query(tmp_path, "data.dat", 'SELECT a, "A_2", "a_2_2" FROM data') == [(1, 2, 3)]

    def test_more_columns_than_a_table_can_have_are_refused_and_the_next_stream_is_stored(self, tmp_path):
        schema = Schema(tuple(Column(f"c{index}", "i1") for index in range(COLUMNS_MAX + 1)))
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.open(2, self.config())
        feed.rows(1, [[0] * (COLUMNS_MAX + 1)])
        expected = feed.pairs(2, 0, 3)
        refusals = self.feed_all(tmp_path, feed)
        assert "at most 2000 columns" in refusals[0].reason
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_dtypes_and_units_are_told_beside_the_rows(self, tmp_path):
        schema = Schema((Column("t", "timestamp"), Column("u", "f8", unit="kV"), Column("w", "u2", (3,))))
        feed = Feed()
        feed.open(1, self.config(table_name="hv"), schema=schema)
        feed.rows(1, [[T0_NS, 1.5, [1, 2, 3]]])
        self.feed_all(tmp_path, feed)
        assert self.query(tmp_path, "data.dat", "SELECT * FROM edgedaq_columns") == [
            ("hv", "t", "timestamp", ""),
            ("hv", "u", "f8", "kV"),
            ("hv", "w", "u2[3]", ""),
        ]
        assert self.query(tmp_path, "data.dat", "SELECT json_extract(w, '$[2]') FROM hv") == [(3,)]

    def test_raw_messages_and_events_have_columns_too(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("raw.dat"), form="raw", schema=None)
        feed.messages(1, [b"\0\1", b"", b"x"])
        feed.pieces(1, [b"ab", b"cd"])
        feed.open(2, self.config("event.dat"), form="event", schema=None)
        metadata = pack_map({"run": 5, "raw": b"\xff"})
        feed.put(Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"pay", rows=1)
        self.feed_all(tmp_path, feed)
        messages = [(b"\0\1",), (b"",), (b"x",), (b"abcd",)]
        assert self.query(tmp_path, "raw.dat", "SELECT message FROM data ORDER BY rowid") == messages
        found = self.query(tmp_path, "event.dat", "SELECT metadata, payload FROM data")
        assert found == [('{"run":5,"raw":"ff"}', b"pay")]

    def test_watermarks_of_ended_streams_do_not_stay(self, tmp_path):
        feed = Feed()
        for stream in range(1, 30):
            feed.open(stream, self.config())
            feed.pairs(stream, stream, 1)
            feed.close(stream)
        self.feed_all(tmp_path, feed, per_commit=3)
        assert len(self.query(tmp_path, "data.dat", "SELECT * FROM edgedaq_watermarks")) <= 2

    def test_everything_is_in_the_one_file_after_an_orderly_end(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        assert [path.name for path in (tmp_path / "out" / NODE).iterdir()] == ["data.dat"]


def quoted(name: str) -> str:
    """Return a name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def value_of(column: Column, value: Any) -> Any:
    """Return a value in plain form, as the table of ``sqlite.py`` says."""
    if value is None:
        return None
    if column.shape:
        return json.loads(value)
    if column.dtype == "bool":
        return {0: False, 1: True}[value]
    return int(value) if column.dtype == "u8" else value
