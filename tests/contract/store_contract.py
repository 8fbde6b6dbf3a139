"""The contract of every store: what is put is stored exactly once, through any end at any moment.

A store's test inherits ``StoreContract`` and says how its backend is made, and how its data is read back.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend, Refusal
from edgedaq_aggregator.stores.data_files import OPEN_FILES_MAX
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.loop import StoreLoop

from tests.contract.faulty_storage import (
    EndedHere,
    FullStorage,
    KilledStorage,
    PowerCutStorage,
    ReadOnlyStorage,
)
from tests.contract.store_feed import DAY_NS, NODE, T0_NS, Feed, FeedFollower, flat

Pairs = list[tuple[int, float]]


class StoreContract:
    """Inherit it, and fill in what is marked."""

    key: ClassVar[str]

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        """Return a backend whose state lies in ``base/state`` and whose data in ``base/out``."""
        raise NotImplementedError

    def read_pairs(self, base: Path, file_path: str) -> Pairs:
        """Return the (sequence, value) rows of a file of ``NODE``, numbered parts in order."""
        raise NotImplementedError

    def read_marks(self, base: Path) -> list[dict[str, str]]:
        """Return the marks of ``NODE`` in order."""
        raise NotImplementedError

    def config(self, file_path: str = "data.dat", **options: Any) -> dict[str, Any]:
        return {self.key: {"file_path": file_path, **options}}

    def feed_all(
        self, base: Path, feed: Feed, storage: Storage | None = None, *, per_commit: int = 3
    ) -> list[Refusal]:
        """Bring everything that is not committed yet to the store, as a new process would; ends orderly."""
        backend = self.make_backend(base, storage or OsStorage())
        refusals: list[Refusal] = []
        try:
            engine = StoreEngine(self.key, backend, refusals.append)
            position = engine.position or 0
            engine.begin(position, feed.table_at(position))
            entries = feed.since(position)
            for start in range(0, len(entries), per_commit):
                engine.take(entries[start : start + per_commit])
                engine.commit()()
                engine.committed_now()
            engine.commit(is_clean=True)()
            engine.committed_now()
        finally:
            backend.close()
        return refusals

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

    # What every store promises

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

    def put_bad_frame(self, feed: Feed, stream: int) -> int:
        """Append a frame of 10 rows that cannot be stored; return its seq."""
        raise NotImplementedError

    def test_a_kill_at_any_operation_loses_and_repeats_nothing(self, tmp_path):
        self.check_every_end(tmp_path, lambda _, at: KilledStorage(at))

    def test_a_power_cut_at_any_operation_loses_and_repeats_nothing(self, tmp_path):
        self.check_every_end(tmp_path, lambda base, at: PowerCutStorage([base], at))

    def check_every_end(self, tmp_path: Path, make: Callable[[Path, int], KilledStorage]) -> None:
        feed, a, b = self.mixed_feed()
        (tmp_path / "whole").mkdir()
        whole = make(tmp_path / "whole", -1)
        self.feed_all(tmp_path / "whole", feed, whole, per_commit=2)
        marks = self.read_marks(tmp_path / "whole")
        _end(whole)
        assert whole.count > 20
        for at in range(whole.count):
            base = tmp_path / str(at)
            base.mkdir()
            storage = make(base, at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=2)
            _end(storage, is_cut=True)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "a.dat") == a, f"operation {at}"
            assert self.read_pairs(base, "b.dat") == b, f"operation {at}"
            assert self.read_marks(base) == marks, f"operation {at}"

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
        (mark,) = self.read_marks(tmp_path)
        assert (mark["kind"], mark["rows"]) == ("gap", "10")

    def test_a_full_disk_holds_the_store_up_and_it_goes_on_by_itself(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        storage = FullStorage(tmp_path / "out")
        with self.looping(tmp_path, feed, storage) as (loop, followers):
            _wait_for(lambda: bool(followers and followers[-1].reported))
            reported = followers[-1].reported[-1]
            storage.is_full = True
            expected += feed.pairs(1, 10, 10)
            _wait_for(lambda: loop.report()["error"] is not None and storage.refused_count > 0)
            assert "No space left" in loop.report()["error"]
            assert max(flat(f.reported for f in followers)) == reported
            _wait_for(lambda: loop.report()["lag_s"] > 0.3)
            storage.is_full = False
            _wait_for(lambda: max(flat(f.reported for f in followers)) == feed.position)
            _wait_for(lambda: loop.report()["error"] is None and loop.report()["lag_bytes"] == 0)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        report = loop.report()
        assert report["streams"][f"{1:016x}"] == [3, 20, 0, False]
        assert report["stored_rows"] == report["in_count"] == 20

    def test_frames_of_other_stores_at_the_end_of_the_journal_do_not_make_it_lag(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.open(9, {"other": {}})
        feed.pairs(1, 0, 10)
        feed.pairs(9, 0, 10)
        with self.looping(tmp_path, feed, OsStorage()) as (loop, followers):
            _wait_for(lambda: bool(followers and feed.position in followers[-1].reported))
            _wait_for(lambda: loop.report().get("lag_bytes") == 0)
            feed.pairs(9, 10, 10)
            _wait_for(lambda: feed.position in followers[-1].reported)
            _wait_for(lambda: loop.report()["lag_bytes"] == 0 and loop.report()["lag_s"] == 0.0)

    @contextmanager
    def looping(
        self, base: Path, feed: Feed, storage: Storage
    ) -> Iterator[tuple[StoreLoop, list[FeedFollower]]]:
        """Run the store on a feed in a thread of its own, until the block is left."""
        stop = threading.Event()
        followers: list[FeedFollower] = []

        def follow(position: int | None, wants: Callable[[int], bool]) -> FeedFollower:
            followers.append(FeedFollower(feed, position, wants))
            return followers[-1]

        loop = StoreLoop(
            self.key,
            make_backend=lambda: self.make_backend(base, storage),
            follow=follow,
            bad_dir=base / "bad",
            stop=stop,
        )
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield loop, followers
        finally:
            stop.set()
            thread.join()


class FileStoreContract(StoreContract):
    """What stores that append to files promise besides."""

    @pytest.mark.parametrize("is_overwriting", [False, True])
    def test_a_file_replaced_by_a_directory_holds_nothing_up(self, tmp_path, is_overwriting):
        feed = Feed()
        feed.open(1, self.config(overwrite=is_overwriting))
        feed.open(2, self.config("other.dat"))
        first = feed.pairs(1, 0, 500)
        other = feed.pairs(2, 0, 5)
        self.feed_all(tmp_path, feed)
        data = tmp_path / "out" / NODE / "data.dat"
        data.rename(data.with_name("old.dat"))
        data.mkdir()
        second = feed.pairs(1, 500, 5)
        other += feed.pairs(2, 5, 5)
        self.feed_all(tmp_path, feed)
        assert data.is_dir()
        assert self.read_pairs(tmp_path, "old.dat") == first
        assert self.read_pairs(tmp_path, "other.dat") == other
        redirected = f"_refused/{1:016x}.{self.key}"
        assert self.read_pairs(tmp_path, redirected if is_overwriting else "data.2.dat") == second

    def test_more_files_than_a_process_may_open_fit_into_one_commit(self, tmp_path):
        feed = Feed()
        count = OPEN_FILES_MAX + 100
        for stream in range(1, count + 1):
            feed.open(stream, self.config(f"{stream}.dat"))
        expected = {stream: feed.pairs(stream, stream, 2) for stream in range(1, count + 1)}
        expected[1] += feed.pairs(1, 7, 2)
        open_count = len(list(Path("/proc/self/fd").iterdir()))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_count + count - 50, hard))
        try:
            self.feed_all(tmp_path, feed, per_commit=10 * count)
            self.feed_all(tmp_path, feed)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert {stream: self.read_pairs(tmp_path, f"{stream}.dat") for stream in expected} == expected

    def test_a_file_that_may_not_be_written_any_more_is_left_alone(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        first = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        second = feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed, ReadOnlyStorage("data.dat"))
        second += feed.pairs(1, 10, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == first
        assert self.read_pairs(tmp_path, "data.2.dat") == second

    def test_rows_go_to_the_file_of_their_own_date(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(add_date=True))
        first = feed.pairs(1, 0, 5, T0_NS + DAY_NS - 1)
        second = feed.pairs(1, 5, 5, T0_NS + DAY_NS)
        first += feed.pairs(1, 10, 5, T0_NS)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "2026-05-01_data.dat") == first
        assert self.read_pairs(tmp_path, "2026-05-02_data.dat") == second

    def test_overwrite_keeps_the_newest_stream_only_and_replaces_in_one_step(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(overwrite=True))
        first = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == first
        feed.open(2, self.config(overwrite=True))
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == first
        second = feed.pairs(2, 50, 5)
        feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == second
        second += feed.pairs(2, 55, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == second

    @pytest.mark.parametrize("kind", [KilledStorage, PowerCutStorage])
    def test_overwrite_survives_an_end_at_any_operation(self, tmp_path, kind):
        feed = Feed()
        feed.open(1, self.config(overwrite=True))
        feed.pairs(1, 0, 5)
        feed.pairs(1, 5, 5)
        feed.open(2, self.config(overwrite=True))
        expected = feed.pairs(2, 50, 7)
        expected += feed.pairs(2, 57, 2)

        def make(base: Path, at: int) -> KilledStorage:
            return PowerCutStorage([base], at) if kind is PowerCutStorage else KilledStorage(at)

        (tmp_path / "whole").mkdir()
        whole = make(tmp_path / "whole", -1)
        self.feed_all(tmp_path / "whole", feed, whole, per_commit=1)
        _end(whole)
        for at in range(whole.count):
            base = tmp_path / str(at)
            base.mkdir()
            storage = make(base, at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=1)
            _end(storage, is_cut=True)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "data.dat") == expected, f"operation {at}"

    @pytest.mark.parametrize(
        "path",
        [
            "../up.dat",
            "/etc/up.dat",
            "a/../../up.dat",
            "sub/./x",
            "",
            "a//b",
            ".hidden/x",
            "nul\0",
            "_marks.csv",
        ],
    )
    def test_a_path_that_leads_elsewhere_is_redirected_and_nothing_is_lost(self, tmp_path, path):
        feed = Feed()
        feed.open(1, self.config(path))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"_refused/{1:016x}.{self.key}") == expected
        assert "redirected" in [mark["kind"] for mark in self.read_marks(tmp_path)]
        assert {p.name for p in (tmp_path / "out").iterdir()} == {NODE}

    def test_a_symbolic_link_is_not_followed(self, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "out" / NODE).mkdir(parents=True)
        (tmp_path / "out" / NODE / "link").symlink_to(outside)
        (tmp_path / "out" / NODE / "data.dat").symlink_to(outside / "data.dat")
        feed = Feed()
        feed.open(1, self.config("link/data.dat"))
        feed.open(2, self.config("data.dat"))
        first = feed.pairs(1, 0, 5)
        second = feed.pairs(2, 0, 5)
        self.feed_all(tmp_path, feed)
        assert list(outside.iterdir()) == []
        assert self.read_pairs(tmp_path, f"_refused/{1:016x}.{self.key}") == first
        assert self.read_pairs(tmp_path, "data.2.dat") == second

    def test_names_in_unicode_and_parent_directories_are_made(self, tmp_path):
        feed = Feed()
        path = "läufe/μ ☢/données.dat"
        feed.open(1, self.config(path))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, path) == expected

    def test_a_file_that_was_moved_away_is_complete_and_a_new_one_goes_on(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        first = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        data = tmp_path / "out" / NODE / "data.dat"
        data.rename(data.with_name("old.dat"))
        second = feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "old.dat") == first
        assert self.read_pairs(tmp_path, "data.dat") == second

    def test_a_file_moved_away_while_it_is_written_is_noticed_at_the_next_commit(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        first = feed.pairs(1, 0, 5)
        data = tmp_path / "out" / NODE / "data.dat"
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            engine.commit()()
            engine.committed_now()
            data.rename(data.with_name("old.dat"))
            begun = feed.position
            second = feed.pairs(1, 5, 5)
            engine.take(feed.since(begun))
            engine.commit()()
            engine.committed_now()
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "old.dat") == first
        assert self.read_pairs(tmp_path, "data.dat") == second

    def test_a_file_that_someone_else_made_longer_is_left_alone(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        first = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        data = tmp_path / "out" / NODE / "data.dat"
        written = data.read_bytes()
        with data.open("ab") as file:
            file.write(b"a note of somebody")
        second = feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert data.read_bytes() == written + b"a note of somebody"
        assert self.read_pairs(tmp_path, "data.2.dat") == second
        assert first

    def test_a_file_that_is_shorter_than_recorded_is_put_aside_and_storing_goes_on(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        data = tmp_path / "out" / NODE / "data.dat"
        kept = data.read_bytes()[:7]
        data.write_bytes(kept)
        second = feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert (data.parent / "data.dat.1.bad").read_bytes() == kept
        assert self.read_pairs(tmp_path, "data.dat") == second

    def test_two_stores_never_write_one_file(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 5)
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            engine.take(feed.since(0))
            engine.commit()()
            other = tmp_path / "other"
            other.mkdir()
            (other / "out").symlink_to(tmp_path / "out")
            self.feed_all(other, feed)
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected
        assert self.read_pairs(tmp_path, "data.2.dat") == expected


def _end(storage: KilledStorage, *, is_cut: bool = False) -> None:
    if isinstance(storage, PowerCutStorage):
        if is_cut:
            storage.cut()
        storage.close_all()


def _wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    from edgedaq.clock import mono_ns

    end = mono_ns() + int(limit_s * 1e9)
    pause = threading.Event()
    while not condition():
        assert mono_ns() < end, "the condition did not come true"
        pause.wait(0.01)
