from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from edgedaq.dtypes import INT_RANGES
from edgedaq.errors import StoreError
from edgedaq.schema import Column, Schema
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.redis import DAQJobStoreRedisConfig
from edgedaq_aggregator.stores.redis_server import RedisServer as RedisBackendServer
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

from tests.contract.column_contract import ColumnStoreContract
from tests.contract.server_contract import ServerContract, begun
from tests.contract.store_feed import NODE, Feed, flat
from tests.contract.store_under_test import wait_for
from tests.servers import RedisServer

_SOCKET = "EDGEDAQ_TEST_REDIS"
_DATABASES = 4096


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always", "--databases", str(_DATABASES))
    try:
        server.start()
        yield server
    finally:
        server.close()


class RedisContract(ColumnStoreContract):
    key = "redis"
    timeout_s = 10.0
    databases = 0

    @pytest.fixture(autouse=True)
    def _server(self, redis_server):
        self.server = redis_server
        os.environ[_SOCKET] = str(redis_server.socket)
        yield
        redis_server.revive()
        with redis_server.client() as client:
            client.flushall()

    def database(self, base):
        """Return the number of the database of a base: a file says it, to a process of its own too."""
        path = base / "database"
        if not path.exists():
            self.databases += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(self.databases))
        return int(path.read_text())

    def store_config(self, base):
        return DAQJobStoreRedisConfig(
            daq_job_type="DAQJobStoreRedis",
            unix_socket=os.environ[_SOCKET],
            db=self.database(base),
            timeout=self.timeout_s,
        )

    def reader_config(self, base):
        return self.store_config(base)

    def make_backend(self, base, storage):  # noqa: ARG002 -- it has no files
        return ServerBackend(RedisBackendServer(self.store_config(base)), base / "state", Suspects())

    def config(self, name="data.dat", **options):
        return {"redis": {"key": name, **options}}

    def environment(self):
        return {_SOCKET: os.environ[_SOCKET]}

    def client(self, base):
        return redis.Redis(unix_socket_path=str(self.server.socket), db=self.database(base))

    def entries(self, base, key):
        with self.client(base) as client:
            return [fields for _, fields in client.xrange(key)]

    def read_pairs(self, base, name):
        found = self.entries(base, f"{NODE}:{name}")
        return [(int(fields[b"sequence"]), float(fields[b"value"])) for fields in found]

    def read_marks(self, base):
        found = self.entries(base, f"{NODE}:_marks")
        return [{key.decode(): value.decode() for key, value in fields.items()} for fields in found]

    def read_columns(self, base, name, schema):
        found = self.entries(base, f"{NODE}:{name}")
        if not found:
            raise LookupError(name)
        return {
            column.name: [value_of(column, fields.get(column.name.encode())) for fields in found]
            for column in schema.columns
        }

    def other(self, name):
        return f"{name} has all"  # nothing goes elsewhere: each entry has its own fields

    def test_rows_with_other_columns_go_elsewhere_and_come_back_to_their_own(self, tmp_path):
        schema = Schema((Column("sequence", "i8"), Column("other", "utf8")))
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2, self.config(), schema=schema)
        feed.pairs(1, 0, 1)
        feed.rows(2, [[5, "x"]])
        feed.pairs(1, 1, 1)
        self.feed_all(tmp_path, feed)
        expected = [
            {"sequence": 0, "value": 0.0},
            {"sequence": 5, "other": "x"},
            {"sequence": 1, "value": 0.25},
        ]
        assert self.read_dicts(tmp_path, "data.dat") == expected

    def read_dicts(self, base, name):
        """Return rows as maps of what they have."""
        kinds: dict[bytes, Any] = {b"sequence": int, b"value": float, b"other": bytes.decode}
        found = self.entries(base, f"{NODE}:{name}")
        return [{key.decode(): kinds[key](value) for key, value in fields.items()} for fields in found]


class TestStoreRedis(RedisContract, ServerContract):
    def forget_everything(self, base):
        with self.client(base) as client:
            client.flushdb()

    def test_a_commit_of_many_rows_is_several_transactions_and_a_kill_between_them_repeats_nothing(
        self, tmp_path
    ):
        feed = Feed()
        feed.open(1, self.config())
        expected = flat(feed.pairs(1, part * 20_000, 20_000) for part in range(5))
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            commit = begun("redis", backend, feed).commit()
            killer = threading.Thread(target=self.kill_in_the_middle, args=(tmp_path, 20_000))
            killer.start()
            with pytest.raises(StoreError):
                commit()
            killer.join()
        finally:
            backend.close()
        self.server.start()
        assert 20_000 <= len(self.read_pairs(tmp_path, "data.dat")) < 100_000
        self.feed_all(tmp_path, feed, per_commit=4)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        with self.client(tmp_path) as client:
            (own,) = client.keys(".edgedaq:*")
            assert not [name for name in client.hkeys(own) if name.startswith(b"d:")]

    def kill_in_the_middle(self, base, rows):
        with self.client(base) as client:
            while client.xlen(f"{NODE}:data.dat") < rows:
                pass
        self.server.kill()

    def test_a_full_memory_holds_the_store_up_and_it_goes_on_by_itself(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers), self.client(tmp_path) as client:
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            client.config_set("maxmemory", 1)
            try:
                expected += feed.pairs(1, 10, 10)
                wait_for(lambda: "maxmemory" in (loop.report()["error"] or ""))
            finally:
                client.config_set("maxmemory", 0)
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_readers_that_trim_a_key_while_it_is_written_hold_nothing_up(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = flat(feed.pairs(1, part * 100, 100) for part in range(100))
        stop = threading.Event()
        self.database(tmp_path)  # chosen before two ask for it at once

        def trim() -> None:
            with self.client(tmp_path) as client:
                while not stop.wait(0.001):
                    client.xtrim(f"{NODE}:data.dat", maxlen=50, approximate=False)

        trimmer = threading.Thread(target=trim)
        trimmer.start()
        try:
            self.feed_all(tmp_path, feed)
        finally:
            stop.set()
            trimmer.join()
        found = self.read_pairs(tmp_path, "data.dat")
        assert found == expected[-len(found) :]

    def test_a_key_that_holds_something_else_is_left_alone(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        with self.client(tmp_path) as client:
            client.set(f"{NODE}:data.dat", "mine")
            self.feed_all(tmp_path, feed)
            assert client.get(f"{NODE}:data.dat") == b"mine"
        assert self.read_pairs(tmp_path, "data.dat.2") == expected

    def test_a_key_that_becomes_something_else_while_it_is_written_loses_no_row(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (_, followers), self.client(tmp_path) as client:
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            client.set(f"{NODE}:data.dat", "mine")
            expected = feed.pairs(1, 10, 10)
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
        assert self.read_pairs(tmp_path, "data.dat.2") == expected

    @pytest.mark.parametrize("key", ["", "x" * 600, "_marks", 7])
    def test_a_key_that_cannot_be_is_redirected_and_nothing_is_lost(self, tmp_path, key):
        feed = Feed()
        feed.open(1, self.config(key))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"_refused:{1:016x}") == expected
        assert [mark["kind"] for mark in self.read_marks(tmp_path)] == ["redirected"]

    def test_rows_older_than_asked_are_dropped_and_a_stream_at_rest_vanishes(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(key_expiration_days=2))
        key = f"{NODE}:data.dat"
        with self.client(tmp_path) as client:
            for number in range(300):  # more than a node of the stream, which is what "~" drops
                client.xadd(key, {"old": 1}, id=f"1000-{number + 1}")
            expected = feed.pairs(1, 0, 300)
            self.feed_all(tmp_path, feed)
            assert client.xlen(key) < 600
            assert 0 < client.pttl(key) <= 2 * 86_400_000
            newest = client.xrevrange(key, count=300)[::-1]
        assert [int(fields[b"sequence"]) for _, fields in newest] == [n for n, _ in expected]


class TestPackedRedis(RedisContract):
    def config(self, name="data.dat", **options):
        return super().config(name, packed=True, **options)

    def batches(self, base, name):
        found = [
            (fields, pa.ipc.open_stream(fields[b"arrow"]).read_all())
            for fields in self.entries(base, f"{NODE}:{name}")
        ]
        assert all(int(fields[b"rows"]) == table.num_rows for fields, table in found)
        return [table for _, table in found]

    def read_pairs(self, base, name):
        tables = self.batches(base, name)
        return [
            pair
            for t in tables
            for pair in zip(t["sequence"].to_pylist(), t["value"].to_pylist(), strict=True)
        ]

    def read_dicts(self, base, name):
        return [row for table in self.batches(base, name) for row in table.to_pylist()]

    def read_columns(self, base, name, schema):
        tables = self.batches(base, name)
        if not tables:
            raise LookupError(name)
        return {
            column.name: [value for table in tables for value in plain(table, column.name)]
            for column in schema.columns
        }


def plain(table, name):
    if name not in table.column_names:
        return []
    column = table[name]
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    return column.to_pylist()


def value_of(column, value):
    """Return the value of a field in plain form, as ``cells.py`` draws it."""
    if value is None:
        return None
    if column.shape:
        dtype = {"bool": "u1", "timestamp": "i8"}.get(column.dtype, column.dtype)
        array = np.frombuffer(value, f"<{dtype}")
        if column.dtype == "bool":
            array = array.astype(bool)
        return array.reshape(column.shape).tolist()
    if column.dtype == "bool":
        return value == b"1"
    if column.dtype in INT_RANGES:
        return int(value)
    if column.dtype == "utf8":
        return value.decode()
    return value if column.dtype == "bytes" else float(value)
