"""The contract of every store: what is put is stored exactly once, through any end at any moment.

A store's test inherits, of these, all that are about it, and fills in what ``StoreUnderTest`` and they mark::

    StoreContract          every store, whatever it writes to                        store_contract
    ColumnStoreContract    those that hold tables: dtypes, missing values, names, schemascolumn_contract
    FileStoreContract      those whose data lies in files below out_dir/<node>/      file_contract
    StorageStoreContract   those that write through ``Storage``: power cuts, a full diskfile_contract
    AppendStoreContract    those that append to one file, and cut it back            file_contract

Where a test kills a store at every operation: a store that writes through ``Storage`` is ended before each of
its operations, and within its writes; any other before and after each call of its backend (``ended_calls``).
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from edgedaq.frame import Kind, pack_map
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.engine import StoreEngine

from tests.contract import killed_process
from tests.contract.ended_calls import AwayBackend
from tests.contract.faulty_storage import EndedHere, KilledStorage, end_storage
from tests.contract.store_feed import NODE, T0_NS, Feed, flat
from tests.contract.store_under_test import Pairs, StoreUnderTest, wait_for

__all__ = ["StoreContract"]

HOSTILE_NAMES = [
    'a"b',
    "'; DROP TABLE data; --",
    "`select`",
    "läufe μ ☢",
    "x.dat; rm",
    "%s {} $(x) [y]",
    "with space",
]
"""Each is the name of a file, a table or a key, and means nothing else."""


class StoreContract(StoreUnderTest):
    """What every store promises."""

    def mixed_feed(self) -> tuple[Feed, Pairs, Pairs]:
        """Return a feed of two files that exercises every kind of step, and what is to be in them."""
        feed = Feed()
        feed.open(1, self.config("a.dat"))
        feed.open(2, self.config("b.dat"))
        feed.open(9, {"other": {"file_path": "a.dat"}})
        a = feed.pairs(1, 0, 5)
        b = feed.pairs(2, 100, 3)
        feed.pairs(9, 7, 7)
        a += feed.pairs(1, 5, 2)
        feed.gap(1, 3, 30, "dropped by policy")
        a += feed.pairs(1, 37, 4)
        feed.close(1)
        feed.open(3, self.config("a.dat"))
        b += feed.pairs(2, 103, 9)
        a += feed.pairs(3, 0, 6)
        feed.close(2, tail_unknown=True)
        a += feed.pairs(3, 6, 1)
        return feed, a, b

    @pytest.mark.parametrize("size", [1, 100_000])
    def test_rows_are_stored_in_order_exactly_once(self, tmp_path, size):
        feed = Feed()
        feed.open(1, self.config())
        expected = flat(feed.pairs(1, part * size, size) for part in range(3))
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_second_life_of_the_store_goes_on_where_the_first_ended(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 10, 10)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_frames_that_come_again_are_dropped(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        expected += feed.pairs(1, 10, 10)
        for record in list(feed.records):
            feed.append(record.frame)  # type: ignore[union-attr]
        expected += feed.pairs(1, 20, 10)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_streams_of_one_file_share_it_and_others_are_left_alone(self, tmp_path):
        feed, a, b = self.mixed_feed()
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "a.dat") == a
        assert self.read_pairs(tmp_path, "b.dat") == b

    def test_gaps_and_unknown_ends_are_stored_as_marks(self, tmp_path):
        feed, _, _ = self.mixed_feed()
        self.feed_all(tmp_path, feed)
        marks = self.read_marks(tmp_path)
        assert [(m["kind"], m["stream"], m["first_seq"], m["last_seq"], m["rows"]) for m in marks] == [
            ("gap", f"{1:016x}", "3", "5", "30"),
            ("close", f"{2:016x}", "3", "3", ""),
        ]
        assert marks[0]["reason"] == "dropped by policy"
        assert marks[0]["node"] == NODE
        assert marks[0]["job"] == "job1"

    def test_frames_missing_in_the_journal_become_a_mark_with_their_rows(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        feed.skip(1, 2, 25)
        expected += feed.pairs(1, 35, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        (mark,) = self.read_marks(tmp_path)
        assert (mark["kind"], mark["first_seq"], mark["last_seq"], mark["rows"]) == ("gap", "2", "3", "25")

    def test_a_frame_that_is_not_what_its_stream_says_is_set_aside_marked_and_passed(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        bad = self.put_bad_frame(feed, 1)
        expected += feed.pairs(1, 20, 10)
        refusals = self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        assert [refusal.frame.seq for refusal in refusals] == [bad]
        (mark,) = self.read_marks(tmp_path)
        assert (mark["kind"], mark["first_seq"], mark["rows"]) == ("refused", str(bad), "10")

    def test_names_that_mean_something_elsewhere_are_only_names(self, tmp_path):
        feed = Feed()
        feed.open(99, self.config())
        expected = {"data.dat": feed.pairs(99, 0, 3)}
        for stream, name in enumerate(HOSTILE_NAMES, 1):
            feed.open(stream, self.config(name))
            expected[name] = feed.pairs(stream, 100 * stream, 5)
        self.feed_all(tmp_path, feed)
        expected["data.dat"] += feed.pairs(99, 3, 3)
        for stream, name in enumerate(HOSTILE_NAMES, 1):
            expected[name] += feed.pairs(stream, 100 * stream + 5, 5)
        self.feed_all(tmp_path, feed)
        assert {name: self.read_pairs(tmp_path, name) for name in expected} == expected
        assert not self.read_marks(tmp_path)

    def test_streams_of_two_nodes_that_say_the_same_name_are_both_stored(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2, self.config(), node="node2")
        first = feed.pairs(1, 0, 10)
        second = feed.pairs(2, 1000, 10)
        self.feed_all(tmp_path, feed, per_commit=10)
        held = self.read_pairs(tmp_path, "data.dat")
        assert [pair for pair in held if pair not in second] == first
        assert not [pair for pair in held if pair not in first + second]

    def test_run_boundaries_are_stored_as_marks(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 5)
        feed.put(Kind.START, 1, pack_map({"run": 7}), t_first_ns=T0_NS)
        expected += feed.pairs(1, 5, 5)
        feed.put(Kind.STOP, 1, pack_map({"run": 7}), t_first_ns=T0_NS)
        expected += feed.pairs(1, 10, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        marks = self.read_marks(tmp_path)
        assert [(m["kind"], m["first_seq"], m["last_seq"]) for m in marks] == [
            ("start", "2", "2"),
            ("stop", "4", "4"),
        ]

    def test_a_kill_at_any_operation_loses_and_repeats_nothing(self, tmp_path):
        self.check_every_end(tmp_path, lambda _, at: KilledStorage(at))

    def check_every_end(self, tmp_path: Path, make: Callable[[Path, int], KilledStorage]) -> None:
        feed, a, b = self.mixed_feed()
        (tmp_path / "whole").mkdir()
        whole = make(tmp_path / "whole", -1)
        self.feed_all(tmp_path / "whole", feed, whole, per_commit=2)
        marks = self.read_marks(tmp_path / "whole")
        end_storage(whole)
        assert whole.count > 20
        for at in range(whole.count):
            base = tmp_path / str(at)
            base.mkdir()
            storage = make(base, at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=2)
            end_storage(storage, is_cut=True)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "a.dat") == a, f"operation {at}"
            assert self.read_pairs(base, "b.dat") == b, f"operation {at}"
            assert self.read_marks(base) == marks, f"operation {at}"
            self.check_recorded(base)

    def test_a_killed_process_is_continued_by_the_next_one(self, tmp_path):
        feed, expected = killed_process.long_feed(self.config())
        seed = random.randrange(1 << 30)
        print(f"seed {seed}")
        chance = random.Random(seed)
        kills = 0
        for _ in range(4):
            with killed_process.started(type(self), tmp_path, self.environment()) as process:
                assert process.stdout is not None
                for _ in range(chance.randrange(1, 12)):
                    process.stdout.readline()
                try:
                    process.wait(chance.uniform(0, 0.02))
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
        assert kills
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        self.check_recorded(tmp_path)

    def test_a_kill_during_recovery_is_recovered_too(self, tmp_path):
        feed, a, b = self.mixed_feed()
        first = KilledStorage(25)
        with pytest.raises(EndedHere):
            self.feed_all(tmp_path, feed, first, per_commit=2)
        for at in range(6):
            with pytest.raises(EndedHere):
                self.feed_all(tmp_path, feed, KilledStorage(at))
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "a.dat") == a
        assert self.read_pairs(tmp_path, "b.dat") == b
        self.check_recorded(tmp_path)

    def test_without_the_watermark_rows_would_be_stored_twice(self, tmp_path):
        # The same feed with the safety removed, so that the tests above are known to see a repetition.
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        self.feed_all(tmp_path, feed)
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.table.streams[1].next_seq = 1
            engine.take(feed.since(0))
            engine.commit()()
            engine.committed_now()
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected * 2

    def test_a_store_that_comes_late_says_what_was_before_it(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 10)
        feed.open(2, self.config("done.dat"))
        feed.pairs(2, 0, 4)
        feed.close(2)
        start = feed.position
        expected = feed.pairs(1, 10, 10)
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(start, feed.table_at(start))
            engine.take(feed.since(start))
            engine.commit()()
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected
        marks = self.read_marks(tmp_path)
        assert sorted((mark["kind"], mark["rows"]) for mark in marks) == [("gap", "10"), ("gap", "4")]

    @pytest.mark.parametrize("where", ["recover", "write", "commit", "make_durable"])
    def test_a_backend_that_is_away_holds_up_only_its_store_which_stores_the_backlog_then(
        self, tmp_path, where
    ):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        away = AwayBackend(where)
        with self.looping(tmp_path, feed, OsStorage(), away.wrap) as (loop, followers):
            wait_for(lambda: max(flat(f.reported for f in followers), default=-1) == feed.position)
            reported = feed.position
            away.is_away = True
            expected += flat(feed.pairs(1, 10 + part * 50, 50) for part in range(40))
            away.fail_once()
            wait_for(lambda: loop.report()["error"] is not None and away.refused_count > 1)
            assert "is away" in loop.report()["error"]
            assert max(flat(f.reported for f in followers)) == reported
            wait_for(lambda: loop.report()["lag_s"] > 0.3)
            away.is_away = False
            wait_for(lambda: max(flat(f.reported for f in followers)) == feed.position)
            wait_for(lambda: loop.report()["error"] is None and loop.report()["lag_bytes"] == 0)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        report = loop.report()
        assert report["streams"][f"{1:016x}"] == [42, 2010, 0, False]
        assert report["stored_rows"] == report["in_count"] == 2010

    def test_frames_of_other_stores_at_the_end_of_the_journal_do_not_make_it_lag(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.open(9, {"other": {}})
        feed.pairs(1, 0, 10)
        feed.pairs(9, 0, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            wait_for(lambda: bool(followers and feed.position in followers[-1].reported))
            wait_for(lambda: loop.report().get("lag_bytes") == 0)
            feed.pairs(9, 10, 10)
            wait_for(lambda: feed.position in followers[-1].reported)
            wait_for(lambda: loop.report()["lag_bytes"] == 0 and loop.report()["lag_s"] == 0.0)
