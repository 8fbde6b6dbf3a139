"""What a server that keeps things late, or not at all, means for the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from edgedaq.errors import StoreError
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.redis import DAQJobStoreRedis, DAQJobStoreRedisConfig
from edgedaq_aggregator.stores.redis_server import RedisServer as RedisBackendServer
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

from tests.contract.store_feed import NODE, Feed, flat
from tests.contract.store_under_test import StoreUnderTest, wait_for
from tests.servers import RedisServer


class Store(StoreUnderTest):
    key = "redis"

    def __init__(self, server: RedisServer, **options):
        self.server = server
        self.store_config = DAQJobStoreRedisConfig(
            daq_job_type="DAQJobStoreRedis", unix_socket=str(server.socket), **options
        )

    def make_backend(self, base, storage):  # noqa: ARG002 -- it has no files
        return ServerBackend(RedisBackendServer(self.store_config), base / "state", Suspects())

    def config(self, name="data.dat", **options):
        return {"redis": {"key": name, **options}}

    def read_pairs(self, base, name):  # noqa: ARG002 -- there is one
        with self.server.client() as client:
            found = client.xrange(f"{NODE}:{name}")
        return [(int(fields[b"sequence"]), float(fields[b"value"])) for _, fields in found]

    def doubts(self):
        return DAQJobStoreRedis.doubts(self.store_config)


@contextmanager
def serving(*options: str) -> Iterator[RedisServer]:
    server = RedisServer(*options)
    try:
        server.start()
        yield server
    finally:
        server.close()


def test_without_an_append_only_file_the_journal_keeps_what_is_in_no_dump_and_a_kill_loses_nothing(tmp_path):
    with serving("--save", "3600 1000000") as server:
        store = Store(server)
        assert "everything since the last save" in store.doubts()[0]
        feed = Feed()
        feed.open(1, store.config())
        expected = feed.pairs(1, 0, 10)
        with store.looping(tmp_path, feed, OsStorage()) as (loop, followers), server.client() as client:
            wait_for(lambda: loop.report().get("stored_rows") == 10)
            saved = feed.position
            assert not flat(f.reported for f in followers)
            end = client.time()[0] + 3
            wait_for(lambda: client.time()[0] >= end)  # a dump counts by whole seconds
            client.bgsave()
            wait_for(lambda: flat(f.reported for f in followers)[-1:] == [saved])
            expected += feed.pairs(1, 10, 10)
            wait_for(lambda: loop.report().get("stored_rows") == 20)
            server.kill()
            server.start()
            wait_for(lambda: loop.report().get("stored_rows") == 30)  # the second ten were stored twice
            wait_for(lambda: len(store.read_pairs(tmp_path, "data.dat")) == 20)
            assert max(flat(f.reported for f in followers)) == saved
        assert store.read_pairs(tmp_path, "data.dat") == expected


def test_with_an_fsync_every_second_the_journal_waits_until_it_has_passed(tmp_path):
    with serving("--appendonly", "yes", "--appendfsync", "everysec") as server:
        store = Store(server)
        assert "some seconds" in store.doubts()[0]
        feed = Feed()
        feed.open(1, store.config())
        expected = feed.pairs(1, 0, 10)
        with store.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: loop.report().get("stored_rows") == 10)
            assert not flat(f.reported for f in followers)
            wait_for(lambda: feed.position in flat(f.reported for f in followers))
        assert store.read_pairs(tmp_path, "data.dat") == expected


def test_a_server_that_keeps_nothing_is_refused_until_that_is_said_to_be_fine(tmp_path):
    with serving() as server:
        store = Store(server)
        assert "the server keeps nothing on disk" in store.doubts()[0]
        refused = store.make_backend(tmp_path, OsStorage())
        with pytest.raises(StoreError, match="accept_volatile = true"):
            refused.recover()
        refused.close()
        willing = Store(server, accept_volatile=True)
        feed = Feed()
        feed.open(1, willing.config())
        expected = feed.pairs(1, 0, 10)
        willing.feed_all(tmp_path, feed)
        assert willing.read_pairs(tmp_path, "data.dat") == expected


def test_a_server_that_syncs_each_write_leaves_no_doubt():
    with serving("--appendonly", "yes", "--appendfsync", "always") as server:
        assert Store(server).doubts() == []


def test_a_password_is_asked_for_and_may_come_from_a_file(tmp_path):
    word = "s3cret"
    with serving("--appendonly", "yes", "--appendfsync", "always") as server:
        with server.client() as client:
            client.config_set("requirepass", word)
        (doubt,) = Store(server).doubts()
        assert "the server refuses" in doubt
        assert Store(server, password=word).doubts() == []
        (tmp_path / "password").write_text(f"{word}\n")
        assert Store(server, password_file=str(tmp_path / "password")).doubts() == []
        (doubt,) = Store(server, password_file=str(tmp_path / "absent")).doubts()
        assert "cannot be read from" in doubt
        server.kill()
