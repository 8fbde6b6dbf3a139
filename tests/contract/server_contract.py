"""What stores with a server behind promise: the server may be killed, away or hang at any moment."""

from __future__ import annotations

import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from edgedaq.errors import StoreError
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.loop import StoreLoop

from tests.contract.store_feed import Feed, flat
from tests.contract.store_under_test import StoreUnderTest, wait_for

__all__ = ["ServerContract"]


class ServerContract(StoreUnderTest):
    """Inherit it, and fill in what is marked."""

    server: Any
    """Of ``tests.servers``."""

    def test_a_server_killed_again_and_again_in_the_middle_of_writes_has_every_row_once(self, tmp_path):
        seed = random.randrange(1 << 30)
        print(f"seed {seed}")
        chance = random.Random(seed)
        feed = Feed()
        feed.open(1, self.config())
        expected: list[tuple[int, float]] = []
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            for _ in range(4):
                for _ in range(chance.randrange(1, 12)):
                    expected += feed.pairs(1, len(expected), chance.choice([1, 50, 5_000, 20_000]))
                if chance.random() < 0.5:
                    wait_for(partial(has_committed, loop, loop.report().get("commit_count", 0)))
                threading.Event().wait(chance.uniform(0, 0.3))
                self.server.kill()
                expected += feed.pairs(1, len(expected), 10)
                self.server.start()
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position, 60)
        assert len(followers) > 1
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_server_that_is_away_at_the_start_is_waited_for(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.make_backend(tmp_path, OsStorage()).close()
        self.server.kill()
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: loop.report().get("error") is not None)
            assert "does not let us in" in loop.report()["error"]
            self.server.start()
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            wait_for(lambda: loop.report()["error"] is None)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_server_that_hangs_is_given_up_and_found_again(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.timeout_s = 0.5
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            self.server.suspend()
            try:
                expected += feed.pairs(1, 10, 10)
                wait_for(lambda: loop.report()["error"] is not None)
            finally:
                self.server.resume()
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_an_earlier_process_of_the_store_can_commit_nothing_any_more(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        earlier = self.make_backend(tmp_path, OsStorage())
        try:
            commit = begun(self.key, earlier, feed).commit()
            move_away(tmp_path)
            self.feed_all(tmp_path, feed)
            with pytest.raises(StoreError, match="another process writes as this store"):
                commit()
        finally:
            earlier.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_second_process_on_this_machine_keeps_nobody_out(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        first = self.make_backend(tmp_path, OsStorage())
        try:
            commit = begun(self.key, first, feed).commit()
            second = self.make_backend(tmp_path, OsStorage())
            with pytest.raises(BlockingIOError):
                second.recover()
            second.close()
            commit()
        finally:
            first.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_store_whose_server_was_set_back_says_so_and_stores_again_what_is_missing(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: max(flat(f.reported for f in followers), default=0) == feed.position)
            self.forget_everything(tmp_path)
            expected += feed.pairs(1, 10, 10)
            wait_for(lambda: loop.report()["error"] is not None)
            wait_for(lambda: len(followers) > 1 and followers[-1].reported[-1:] == [feed.position])
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def forget_everything(self, base: Any) -> None:
        """Let the server lose what it had of a base, as a restored backup may."""
        raise NotImplementedError


def has_committed(loop: StoreLoop, count: int) -> bool:
    """Tell whether a store has made more commits than so many."""
    return bool(loop.report().get("commit_count", 0) > count)


def move_away(base: Path) -> None:
    """Let the process that has the state directory be one of another machine that calls itself this store."""
    state = base / "state"
    state.rename(base / "elsewhere")
    state.mkdir()
    (state / "store_id").write_bytes((base / "elsewhere" / "store_id").read_bytes())


def begun(key: str, backend: Backend, feed: Feed) -> StoreEngine:
    """Return an engine that has taken all of a feed, and committed nothing."""
    engine = StoreEngine(key, backend, lambda _: None)
    position = engine.position or 0
    engine.begin(position, feed.table_at(position))
    engine.take(feed.since(position))
    return engine
