"""Time series, on a server in this process that knows them: Debian's has no module for them."""

from __future__ import annotations

import math
import select
import threading
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis
from edgedaq.schema import Column, Schema
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.redis import DAQJobStoreRedisConfig
from edgedaq_aggregator.stores.redis_server import RedisServer
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects
from fakeredis._clients._tcp_server import TCPFakeRequestHandler

from tests.contract.server_contract import begun
from tests.contract.store_feed import NODE, T0_NS, Feed
from tests.contract.store_under_test import StoreUnderTest

T0_MS = T0_NS // 1_000_000
TIMED = Schema(
    (Column("t", "timestamp"), Column("value", "f8"), Column("ok", "bool"), Column("note", "utf8"))
)


class PatientHandler(TCPFakeRequestHandler):
    """Goes on after an error, as a real server does."""

    def handle(self) -> None:
        asked = self.current_client.get_socket()
        while not self.server._shutdown_event.is_set():
            if self.current_client.can_read():
                try:
                    reply = self.current_client.read_response()
                except redis.RedisError as e:
                    reply = e
                self.writer.dump(reply)
                continue
            readable, _, _ = select.select([self.connection], [], [], 0.01)
            if readable:
                data = self.rfile.read1()
                if not data:
                    return
                asked.sendall(data)


@pytest.fixture
def place() -> Iterator[Any]:
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    server.RequestHandlerClass = PatientHandler
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestRedisSeries(StoreUnderTest):
    key = "redis"

    @pytest.fixture(autouse=True)
    def _client(self, place):
        self.host, self.port = place
        with redis.Redis(self.host, self.port, protocol=2) as client:
            self.client = client
            yield

    def make_backend(self, base, storage):  # noqa: ARG002 -- it has no files
        config = DAQJobStoreRedisConfig(daq_job_type="DAQJobStoreRedis", host=self.host, port=self.port)
        return ServerBackend(RedisServer(config), base / "state", Suspects())

    def config(self, name="temp", **options):
        return {"redis": {"key": name, "use_timeseries": True, **options}}

    def samples(self, column, name="temp"):
        found = self.client.execute_command("TS.RANGE", f"{NODE}:{name}:{column}", "-", "+")
        return [(int(stamp), float(value)) for stamp, value in found]

    def test_each_column_of_numbers_is_a_series_and_the_rest_are_entries(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(key_expiration_days=30), schema=TIMED)
        rows = [[T0_NS + 1_000_000 * n, n / 4, n % 2 == 0, f"note {n}"] for n in range(5)]
        feed.rows(1, rows[:3])
        feed.rows(1, rows[3:])
        self.feed_all(tmp_path, feed)
        assert self.samples("value") == [(T0_MS + n, n / 4) for n in range(5)]
        assert self.samples("ok") == [(T0_MS + n, float(n % 2 == 0)) for n in range(5)]
        entries = [fields for _, fields in self.client.xrange(f"{NODE}:temp")]
        assert [(int(f[b"t"]), f[b"note"].decode()) for f in entries] == [(row[0], row[3]) for row in rows]
        info = self.client.execute_command("TS.INFO", f"{NODE}:temp:value")
        facts = dict(zip(info[::2], info[1::2], strict=True))
        assert facts[b"retentionTime"] == 30 * 86_400_000
        assert facts[b"duplicatePolicy"] == b"last"
        assert facts[b"labels"] == [[b"node", NODE.encode()], [b"job", b"job1"], [b"column", b"value"]]

    def test_what_is_missing_or_no_finite_number_is_no_sample(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(), schema=TIMED)
        values = [0.5, None, math.nan, math.inf, 1.5]
        rows = [[T0_NS + 1_000_000 * n, value, None, None] for n, value in enumerate(values)]
        feed.rows(1, rows, general=True)
        self.feed_all(tmp_path, feed)
        assert self.samples("value") == [(T0_MS, 0.5), (T0_MS + 4, 1.5)]

    def test_samples_of_one_time_are_counted_and_the_last_one_stays(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 10)  # no column tells the time: all have that of their frame
        feed.pairs(1, 10, 10, T0_NS + 5_000_000)
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = begun("redis", backend, feed)
            engine.commit()()
            assert backend.facts()["collision_count"] == 2 * 2 * 9
        finally:
            backend.close()
        assert self.samples("sequence") == [(T0_MS, 9.0), (T0_MS + 5, 19.0)]

    def test_a_column_called_timestamp_is_the_time_in_milliseconds(self, tmp_path):
        schema = Schema((Column("timestamp", "f8"), Column("x", "i8")))
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, [[1000.9, 7], [2000.0, 8]])
        self.feed_all(tmp_path, feed)
        assert self.samples("x") == [(1000, 7.0), (2000, 8.0)]

    def test_a_time_before_1970_is_set_aside_and_the_rest_is_stored(self, tmp_path):
        schema = Schema((Column("timestamp", "i8"), Column("x", "i8")))
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, [[-5, 7]])
        feed.rows(1, [[2000, 8]])
        assert [refusal.frame.seq for refusal in self.feed_all(tmp_path, feed)] == [1]
        assert self.samples("x") == [(2000, 8.0)]

    def test_a_series_that_someone_deletes_while_it_is_written_is_made_again(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 1)
        self.feed_all(tmp_path, feed)
        self.client.delete(f"{NODE}:temp:sequence")
        feed.pairs(1, 1, 1, T0_NS + 5_000_000)
        self.feed_all(tmp_path, feed)
        assert self.samples("sequence") == [(T0_MS + 5, 1.0)]
