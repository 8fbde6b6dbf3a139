from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pymysql
import pytest
from edgedaq.dtypes import INT_RANGES
from edgedaq.errors import StoreError
from edgedaq.schema import Column, Schema
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.mysql import DAQJobStoreMySQL, DAQJobStoreMySQLConfig
from edgedaq_aggregator.stores.mysql_server import MySQLServer
from edgedaq_aggregator.stores.mysql_session import Session
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

from tests.contract.column_contract import ColumnStoreContract
from tests.contract.server_contract import ServerContract, begun, move_away
from tests.contract.store_feed import NODE, Feed, flat
from tests.contract.store_under_test import wait_for
from tests.servers import MariaDB

_SOCKET = "EDGEDAQ_TEST_MARIADB"

pytestmark = pytest.mark.timeout(300)  # a database for each of many ends


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    server = MariaDB("--local-infile=1")
    try:
        server.start()
        yield server
    finally:
        server.close()


class MySQLContract(ColumnStoreContract):
    key = "mysql"
    timeout_s = 10.0
    suspects = Suspects()
    databases: frozenset[str] | set[str] = frozenset()

    @pytest.fixture(autouse=True)
    def _server(self, mariadb):
        self.server = mariadb
        self.suspects = Suspects()
        os.environ[_SOCKET] = str(mariadb.socket)
        yield
        mariadb.revive()
        for (name,) in mariadb.rows(r"SHOW DATABASES LIKE 'test\_%'"):
            mariadb.rows(f"DROP DATABASE `{name}`")

    def database(self, base: Path) -> str:
        """Return the name of the database of a base."""
        return "test_" + hashlib.sha256(str(base).encode()).hexdigest()[:16]

    def store_config(self, base: Path) -> DAQJobStoreMySQLConfig:
        return DAQJobStoreMySQLConfig(
            daq_job_type="DAQJobStoreMySQL",
            unix_socket=os.environ[_SOCKET],
            user="root",
            database=self.database(base),
            timeout=self.timeout_s,
        )

    def reader_config(self, base):
        return self.store_config(base)

    def make_backend(self, base, storage):  # noqa: ARG002 -- it has no files
        name = self.database(base)
        if name not in self.databases:
            with pymysql.connect(unix_socket=os.environ[_SOCKET], user="root") as connection:
                connection.query(f"CREATE DATABASE IF NOT EXISTS `{name}`")
            self.databases = {*self.databases, name}
        return ServerBackend(MySQLServer(self.store_config(base)), base / "state", self.suspects)

    def config(self, name="data.dat", **options):
        return {"mysql": {"table_name": name, **options}}

    def rows(self, base, query, *values):
        return self.server.rows(query, *values, database=self.database(base))

    def environment(self):
        return {_SOCKET: os.environ[_SOCKET]}

    def tables(self, base):
        return {name for (name,) in self.rows(base, "SHOW TABLES") if not name.startswith("edgedaq_")}

    def read_pairs(self, base, name):
        return self.rows(base, f"SELECT sequence, value FROM {quoted(name)} ORDER BY edgedaq_id")  # noqa: S608

    def read_marks(self, base):
        columns = ("kind", "stream", "first_seq", "last_seq", "rows", "reason", "node", "job")
        found = self.rows(
            base,
            "SELECT kind, LOWER(LPAD(HEX(stream), 16, '0')), first_seq, last_seq, rows_missing, reason, "
            "node, job "
            "FROM edgedaq_marks ORDER BY id",
        )
        return [{k: "" if v is None else str(v) for k, v in zip(columns, row, strict=True)} for row in found]

    def read_columns(self, base, name, schema):
        if name not in self.tables(base):
            raise LookupError(name)
        with self.server.connect(self.database(base)) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM {quoted(name)} ORDER BY edgedaq_id")  # noqa: S608
            names = [column[0] for column in cursor.description]
            rows = cursor.fetchall()
        found = {name: [row[index] for row in rows] for index, name in enumerate(names)}
        del found["edgedaq_id"], found["edgedaq_stream"]
        for column in schema.columns:
            stored = self.stored_name(column.name)
            if stored in found:
                found[stored] = [None if v is None else value_of(column, v) for v in found[stored]]
        return found

    def stored(self, column, value):  # noqa: ARG002 -- of every column
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value

    def stored_name(self, name):
        return {" ": "column"}.get(name, name)

    def other(self, name):
        return f"{name}_2"


class TestStoreMySQL(MySQLContract, ServerContract):
    def forget_everything(self, base):
        for table in ("edgedaq_stores", "edgedaq_streams", "edgedaq_marks", "data.dat"):
            self.rows(base, f"DELETE FROM {quoted(table)}")  # noqa: S608

    def test_a_transaction_that_hangs_on_a_lost_connection_is_ended_and_not_waited_for(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        lost = self.make_backend(tmp_path, OsStorage())
        try:
            lost.recover()
            session = lost._server._live
            session.execute("UPDATE edgedaq_stores SET position = position")  # holds the row
            move_away(tmp_path)
            expected += feed.pairs(1, 10, 10)
            with self.looping(tmp_path, feed, OsStorage()) as (_, followers):
                wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
        finally:
            lost.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_row_that_the_table_refuses_is_set_aside_marked_and_the_rest_is_stored(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        self.rows(tmp_path, "ALTER TABLE `data.dat` ADD CHECK (sequence <> 17)")
        for part in range(1, 6):
            feed.pairs(1, 5 * part, 5)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
        assert [n for n, _ in self.read_pairs(tmp_path, "data.dat")] == [*range(15), *range(20, 30)]
        (mark,) = self.read_marks(tmp_path)
        assert (mark["kind"], mark["first_seq"], mark["last_seq"], mark["rows"]) == ("refused", "4", "4", "5")
        assert loop.report()["refused_count"] == 1
        assert [path.name for path in (tmp_path / "bad").iterdir()] == [f"{1:016x}-4.bad"]

    @pytest.mark.parametrize(
        ("change", "goes_on", "is_running"),
        [
            ("DROP TABLE `data.dat`", "data.dat", True),
            ("ALTER TABLE `data.dat` DROP COLUMN value", "data.dat_2", True),
            ("ALTER TABLE `data.dat` ADD UNIQUE (sequence)", "data.dat_2", True),
            ("ALTER TABLE `data.dat` ADD extra INT NULL, ADD INDEX (sequence)", "data.dat", True),
            ("ALTER TABLE `data.dat` ADD extra INT NOT NULL", "data.dat_2", False),
            ("ALTER TABLE `data.dat` MODIFY value INT", "data.dat_2", False),
            ("ALTER TABLE `data.dat` ENGINE=MyISAM", "data.dat_2", False),
        ],
    )
    def test_a_table_that_someone_changes_holds_nothing_up(self, tmp_path, change, goes_on, is_running):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 7, 1)
        if not is_running:
            self.feed_all(tmp_path, feed)
            self.rows(tmp_path, change)
        with self.looping(tmp_path, feed, OsStorage()) as (_, followers):
            wait_for(lambda: bool(followers) and feed.position in followers[-1].reported)
            if is_running:
                self.rows(tmp_path, change)
            feed.rows(1, [(7, 0.5)])
            wait_for(lambda: feed.position in followers[-1].reported)
        assert self.read_pairs(tmp_path, goes_on)[-1:] == [(7, 0.5)]
        assert not self.read_marks(tmp_path)

    @pytest.mark.parametrize("name", ["x" * 65, "edgedaq_marks", "emoji 😀", "end ", "", 7])
    def test_a_table_name_that_cannot_be_is_redirected_and_nothing_is_lost(self, tmp_path, name):
        feed = Feed()
        feed.open(1, self.config(name))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"refused_{1:016x}") == expected
        assert [mark["kind"] for mark in self.read_marks(tmp_path)] == ["redirected"]

    def test_a_table_too_wide_for_mysql_is_set_aside_and_others_are_stored(self, tmp_path):
        wide = Schema(tuple(Column(f"c{n}", "i8") for n in range(1200)))
        feed = Feed()
        feed.open(1, self.config("wide"), schema=wide)
        feed.open(2, self.config())
        feed.rows(1, [list(range(1200))])
        expected = feed.pairs(2, 0, 5)
        assert len(self.feed_all(tmp_path, feed)) == 1
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_rows_of_streams_in_one_table_tell_whose_they_are(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2**64 - 1, self.config(), node="node2", job="other")
        feed.pairs(1, 0, 2)
        feed.pairs(2**64 - 1, 5, 1)
        self.feed_all(tmp_path, feed)
        query = (
            "SELECT node, job, sequence FROM `data.dat` JOIN edgedaq_streams ON stream = edgedaq_stream "
            "ORDER BY edgedaq_id"
        )
        expected = [(NODE, "job1", 0), (NODE, "job1", 1), ("node2", "other", 5)]
        assert self.rows(tmp_path, query) == expected
        streams = self.rows(
            tmp_path, "SELECT node, table_name, rows_stored FROM edgedaq_streams ORDER BY stream"
        )
        assert streams == [(NODE, "data.dat", 2), ("node2", "data.dat", 1)]

    @pytest.mark.parametrize("flush", [0, 2])
    def test_where_the_server_flushes_late_the_journal_waits_for_its_log(self, tmp_path, flush):
        self.server.rows(f"SET GLOBAL innodb_flush_log_at_trx_commit = {flush}")
        try:
            feed = Feed()
            feed.open(1, self.config())
            expected = feed.pairs(1, 0, 10)
            backend = self.make_backend(tmp_path, OsStorage())
            try:
                engine = begun("mysql", backend, feed)
                engine.commit()()
                engine.committed_now()
                assert engine.committed_position == feed.position
                backend._server._asked_s = float("inf")  # not asked yet
                assert engine.durable_position() is None
                backend._server._asked_s = 0.0
                wait_for(lambda: engine.durable_position() == feed.position)
            finally:
                backend.close()
            assert self.read_pairs(tmp_path, "data.dat") == expected
            (doubt,) = DAQJobStoreMySQL.doubts(self.store_config(tmp_path))
            assert f"innodb_flush_log_at_trx_commit is {flush}" in doubt
        finally:
            self.server.rows("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        assert DAQJobStoreMySQL.doubts(self.store_config(tmp_path)) == []

    def test_a_server_that_asks_for_a_file_gets_none(self, tmp_path):
        self.make_backend(tmp_path, OsStorage())
        session = Session(self.store_config(tmp_path))
        try:
            session.execute("CREATE TABLE t (a TEXT)")
            with pytest.raises(StoreError):
                session.execute("LOAD DATA LOCAL INFILE '/etc/hostname' INTO TABLE t")
        finally:
            session.close()


class TestStoreMySQLWithoutLoadData(MySQLContract):
    @pytest.fixture(autouse=True)
    def _without(self, _server):
        self.server.rows("SET GLOBAL local_infile = 0")
        yield
        self.server.rows("SET GLOBAL local_infile = 1")

    def test_check_says_that_it_is_slower(self, tmp_path):
        self.make_backend(tmp_path, OsStorage())
        (doubt,) = DAQJobStoreMySQL.doubts(self.store_config(tmp_path))
        assert "local_infile is OFF" in doubt

    def test_rows_larger_than_a_packet_of_the_server_are_set_aside_and_the_rest_is_stored(self, tmp_path):
        self.server.rows("SET GLOBAL max_allowed_packet = 1048576")
        try:
            feed = Feed()
            feed.open(1, self.config(), form="raw", schema=None)
            feed.messages(1, [b"first"])
            feed.messages(1, [os.urandom(2 << 20)])
            feed.messages(1, [b"'last\\"])
            with self.looping(tmp_path, feed, OsStorage()) as (_, followers):
                wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            found = self.rows(tmp_path, "SELECT message FROM `data.dat` ORDER BY edgedaq_id")
            assert found == [(b"first",), (b"'last\\",)]
            assert [mark["kind"] for mark in self.read_marks(tmp_path)] == ["refused"]
        finally:
            self.server.rows("SET GLOBAL max_allowed_packet = 16777216")


def quoted(name):
    return "`" + name.replace("`", "``") + "`"


def value_of(column, value):
    """Return a value of a table in plain form, as ``mysql_tables.py`` draws it."""
    if column.shape:
        dtype = {"bool": "u1", "timestamp": "i8"}.get(column.dtype, column.dtype)
        array = np.frombuffer(value, f"<{dtype}")
        if column.dtype == "bool":
            array = array.astype(bool)
        return array.reshape(column.shape).tolist()
    if column.dtype == "bool":
        return bool(value)
    if column.dtype in INT_RANGES or column.dtype == "timestamp":
        return int(value)
    if column.dtype == "f4":
        return float(np.float32(value))
    return value
