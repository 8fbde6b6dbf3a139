"""What stores promise whose data lies in files: names, dates, what happens to files under their hands."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import ClassVar

import pytest
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.data_files import OPEN_FILES_MAX
from edgedaq_aggregator.stores.engine import StoreEngine

from tests.contract.faulty_storage import (
    EndedHere,
    FullStorage,
    KilledStorage,
    PowerCutStorage,
    ReadOnlyStorage,
    end_storage,
)
from tests.contract.store_contract import StoreContract
from tests.contract.store_feed import DAY_NS, NODE, T0_NS, Feed, flat
from tests.contract.store_under_test import wait_for

__all__ = ["AppendStoreContract", "FileStoreContract", "StorageStoreContract"]

ROTATE_BYTES = 64 << 10


class FileStoreContract(StoreContract):
    """What stores that make files below ``out_dir/<node>/`` promise besides."""

    def test_rows_go_to_the_file_of_their_own_date(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(add_date=True))
        first = feed.pairs(1, 0, 5, T0_NS + DAY_NS - 1)
        second = feed.pairs(1, 5, 5, T0_NS + DAY_NS)
        first += feed.pairs(1, 10, 5, T0_NS)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "2026-05-01_data.dat") == first
        assert self.read_pairs(tmp_path, "2026-05-02_data.dat") == second

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


class StorageStoreContract(StoreContract):
    """What stores promise besides that write through ``Storage``, and nothing but it."""

    ends_between_calls = False

    def test_a_power_cut_at_any_operation_loses_and_repeats_nothing(self, tmp_path):
        self.check_every_end(tmp_path, lambda base, at: PowerCutStorage([base], at))

    def test_a_full_disk_holds_the_store_up_and_it_goes_on_by_itself(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 10)
        storage = FullStorage(tmp_path / "out")
        with self.looping(tmp_path, feed, storage) as (loop, followers):
            wait_for(lambda: bool(followers and followers[-1].reported))
            reported = followers[-1].reported[-1]
            storage.is_full = True
            expected += feed.pairs(1, 10, 10)
            wait_for(lambda: loop.report()["error"] is not None and storage.refused_count > 0)
            assert "No space left" in loop.report()["error"]
            assert max(flat(f.reported for f in followers)) == reported
            wait_for(lambda: loop.report()["lag_s"] > 0.3)
            storage.is_full = False
            wait_for(lambda: max(flat(f.reported for f in followers)) == feed.position)
            wait_for(lambda: loop.report()["error"] is None and loop.report()["lag_bytes"] == 0)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        report = loop.report()
        assert report["streams"][f"{1:016x}"] == [3, 20, 0, False]
        assert report["stored_rows"] == report["in_count"] == 20


class AppendStoreContract(FileStoreContract, StorageStoreContract):
    """What stores that append to files promise besides."""

    rotated_bytes_max: ClassVar[int] = 2 * ROTATE_BYTES
    """How large a file becomes that is left at ``ROTATE_BYTES``."""

    def rotated(self, base: Path, name: str = "data.dat") -> list[str]:
        """Return the names of a rotated file, in order."""
        stem, suffix = name.split(".")
        names = [name, *(f"{stem}.{number}.{suffix}" for number in range(2, 100))]
        return [held for held in names if (base / "out" / NODE / held).exists()]

    def test_a_file_that_is_full_is_left_and_rows_go_on_in_the_next_one(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(rotate_size=ROTATE_BYTES))
        expected = []
        for part in range(40):
            expected += feed.pairs(1, part * 1000, 1000)
            if part % 7 == 6:
                self.feed_all(tmp_path, feed, per_commit=2)
        self.feed_all(tmp_path, feed)
        names = self.rotated(tmp_path)
        assert len(names) > 2
        assert flat(self.read_pairs(tmp_path, name) for name in names) == expected
        sizes = [(tmp_path / "out" / NODE / name).stat().st_size for name in names]
        assert min(sizes[:-1]) >= ROTATE_BYTES
        assert max(sizes) < self.rotated_bytes_max

    @pytest.mark.parametrize("kind", [KilledStorage, PowerCutStorage])
    def test_rotation_survives_an_end_at_any_operation(self, tmp_path, kind):
        feed = Feed()
        feed.open(1, self.config(rotate_size=ROTATE_BYTES))
        expected = flat(feed.pairs(1, part * 3000, 3000) for part in range(6))
        for at in range(200):
            base = tmp_path / str(at)
            base.mkdir()
            storage = PowerCutStorage([base], at) if kind is PowerCutStorage else KilledStorage(at)
            try:
                self.feed_all(base, feed, storage, per_commit=3)
            except EndedHere:
                end_storage(storage, is_cut=True)
                self.feed_all(base, feed)
            else:
                end_storage(storage)
                break
            found = flat(self.read_pairs(base, name) for name in self.rotated(base))
            assert found == expected, f"operation {at}"
        assert at > 10

    def test_a_file_is_rotated_by_the_time_of_its_data(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(rotate_every=3600.0))
        hour_ns = DAY_NS // 24
        first = feed.pairs(1, 0, 5, T0_NS)
        second = feed.pairs(1, 5, 5, T0_NS + hour_ns)
        first += feed.pairs(1, 10, 5, T0_NS + hour_ns - 1)
        third = feed.pairs(1, 15, 5, T0_NS + DAY_NS + 23 * hour_ns + 1)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "2026-05-01T00-00_data.dat") == first
        assert self.read_pairs(tmp_path, "2026-05-01T01-00_data.dat") == second
        assert self.read_pairs(tmp_path, "2026-05-02T23-00_data.dat") == third

    @pytest.mark.parametrize("is_overwriting", [False, True])
    def test_a_file_replaced_by_a_directory_holds_nothing_up(self, tmp_path, is_overwriting):
        feed = Feed()
        feed.open(1, self.config("data.dat", **({"overwrite": True} if is_overwriting else {})))
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
        self.check_recorded(tmp_path)

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
        end_storage(whole)
        for at in range(whole.count):
            base = tmp_path / str(at)
            base.mkdir()
            storage = make(base, at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=1)
            end_storage(storage, is_cut=True)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "data.dat") == expected, f"operation {at}"

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
