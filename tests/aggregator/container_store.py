"""The contract of stores that write containers (ROOT, HDF5)."""

from __future__ import annotations

import csv
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedaq.columns import Column, Schema
from edgedaq.storage import Buffer, OsStorage
from edgedaq_aggregator.stores.commits import FILES_MAX, Change, CommitLog, FileMark
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.put_away import put_files_away
from edgedaq_aggregator.stores.reader import StorePlace
from edgedaq_aggregator.stores.undo_log import UNDO_NAME

from tests.contract.column_contract import ColumnStoreContract
from tests.contract.file_contract import ROTATE_BYTES, AppendStoreContract
from tests.contract.store_feed import NODE, Feed
from tests.contract.store_under_test import Pairs

LOSSES_MAX = 40
MISSING = {
    "bool": 255,
    "timestamp": -(2**63),
    "f4": math.nan,
    "f8": math.nan,
    **{f"i{size}": -(2 ** (8 * size - 1)) for size in (1, 2, 4, 8)},
    **{f"u{size}": 2 ** (8 * size) - 1 for size in (1, 2, 4, 8)},
}


class UnsyncedStorage(OsStorage):
    """Knows which changes of each file were not synced, and makes a copy of a directory that lost some."""

    def __init__(self) -> None:
        self.synced: dict[Path, bytes] = {}
        self.unsynced: dict[Path, list[tuple[int, bytes | None]]] = {}

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._changes(fd).append((offset, b"".join(buffers)))
        return super().pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._changes(fd).append((size_bytes, None))
        super().truncate(fd, size_bytes)

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        path = _path_of(fd)
        self.synced[path] = path.read_bytes()
        self.unsynced.pop(path, None)

    def copy(self, source: Path, target: Path, lost: set[int]) -> None:
        """Copy what a power cut leaves if the unsynced changes of these numbers are lost."""
        shutil.copytree(source, target)
        number = 0
        for path, changes in self.unsynced.items():
            content = bytearray(self.synced[path])
            for offset, data in changes:
                if number not in lost:
                    end = offset + len(data or b"")
                    content.extend(bytes(max(end - len(content), 0)))
                    content[offset:end] = data or b""
                    if data is None:
                        del content[offset:]
                number += 1
            (target / path.relative_to(source)).write_bytes(content)

    def _changes(self, fd: int) -> list[tuple[int, bytes | None]]:
        path = _path_of(fd)
        self.synced.setdefault(path, path.read_bytes())
        return self.unsynced.setdefault(path, [])


def _path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


class ContainerStoreContract(AppendStoreContract, ColumnStoreContract):
    """Inherit it, and say how a file is read."""

    # A file is left after the commit that made it so large, and has a chunk of 256 KiB in HDF5.
    rotated_bytes_max = 5 * ROTATE_BYTES

    def read_file(self, path: Path) -> list[tuple[Any, ...]]:
        """Return the rows of a file by its own library."""
        raise NotImplementedError

    def read_pairs(self, base: Path, file_path: str) -> Pairs:
        return self.read_file(base / "out" / NODE / file_path)

    def read_marks(self, base: Path) -> list[dict[str, str]]:
        path = base / "out" / NODE / f"_marks.{self.key}.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def read_columns(self, base: Path, name: str, schema: Schema) -> dict[str, list[Any]]:
        path = base / "out" / NODE / name
        if not path.exists():
            raise LookupError(name)
        found = self.read_values(path)
        for column in schema.columns:
            if column.dtype == "bytes":
                found[column.name] = [bytes(value) for value in found[column.name]]
        return found

    def read_values(self, path: Path) -> dict[str, list[Any]]:
        """Return the columns of a file by its own library; bytes may be lists."""
        raise NotImplementedError

    def stored(self, column: Column, value: Any) -> Any:
        if value is not None:
            return value
        if column.is_ragged or column.dtype in ("utf8", "bytes"):
            return {"utf8": "", "bytes": b""}.get(column.dtype, [])
        missing: Any = MISSING[column.dtype]
        for extent in reversed(column.shape):
            missing = [missing] * extent
        return missing

    def other(self, name: str) -> str:
        return name.replace(".dat", ".2.dat")

    # A container holds what several streams have put; it is never replaced by a newer one.
    test_overwrite_keeps_the_newest_stream_only_and_replaces_in_one_step = None  # type: ignore[assignment]
    test_overwrite_survives_an_end_at_any_operation = None

    def test_a_file_replaced_by_a_directory_holds_nothing_up(self, tmp_path, is_overwriting=False):
        super().test_a_file_replaced_by_a_directory_holds_nothing_up(tmp_path, is_overwriting)

    def commit_cut_before_its_sync(self, base: Path) -> tuple[Feed, Pairs, Pairs, UnsyncedStorage]:
        """Leave a commit of two files whose undo is durable, and its writes are not; return what was put."""
        feed = Feed()
        feed.open(1, self.config("a.dat"))
        feed.open(2, self.config("b.dat"))
        a, b = feed.pairs(1, 0, 50), feed.pairs(2, 0, 9)
        for part in range(1, 5):
            a += feed.pairs(1, 50 * part, 50)
        self.feed_all(base, feed, per_commit=2)
        storage = UnsyncedStorage()
        backend = self.make_backend(base, storage)
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            begun = feed.position
            for part in range(5, 8):
                a += feed.pairs(1, 50 * part, 50)
                b += feed.pairs(2, 9 * part, 9)
                engine.take(feed.since(begun))
                begun = feed.position
                make_durable = engine.commit()
                if part < 7:
                    make_durable()
                    engine.committed_now()
        finally:
            backend.close()
        return feed, a, b, storage

    def losses(self, count: int) -> list[set[int]]:
        """Return sets of changes to lose: each prefix kept, each one lost, each one kept, some at random.

        Of many, a sample that is another one in each run.
        """
        every = set(range(count))
        found = [set(range(kept, count)) for kept in range(count + 1)]
        found += [{number} for number in every] + [every - {number} for number in every]
        found += [{n for n in every if random.random() < 0.5} for _ in range(10)]
        return random.sample(found, min(len(found), LOSSES_MAX))

    def test_any_loss_of_unsynced_writes_of_a_commit_is_undone(self, tmp_path):
        feed, a, b, storage = self.commit_cut_before_its_sync(tmp_path / "base")
        count = sum(map(len, storage.unsynced.values()))
        assert count >= 4
        for number, lost in enumerate(self.losses(count)):
            base = tmp_path / str(number)
            storage.copy(tmp_path / "base", base, lost)
            backend = self.make_backend(base, OsStorage())
            backend.recover()
            backend.close()
            recovered = self.read_pairs(base, "a.dat"), self.read_pairs(base, "b.dat")
            assert recovered == (a[:-50], b[:-9]), f"lost {sorted(lost)}: not the last commit"
            self.feed_all(base, feed)
            assert self.read_pairs(base, "a.dat") == a, f"lost {sorted(lost)}"
            assert self.read_pairs(base, "b.dat") == b, f"lost {sorted(lost)}"
            shutil.rmtree(base)

    def test_without_the_undo_log_such_a_loss_would_be_seen(self, tmp_path):
        # The same with the safety removed, so that the test above is known to see damage.
        feed, a, b, storage = self.commit_cut_before_its_sync(tmp_path / "base")
        harmed, needed = 0, 3
        for number, lost in enumerate(self.losses(sum(map(len, storage.unsynced.values())))):
            base = tmp_path / str(number)
            storage.copy(tmp_path / "base", base, lost)
            (base / "state" / UNDO_NAME).unlink()
            try:
                self.feed_all(base, feed)
                harmed += (self.read_pairs(base, "a.dat"), self.read_pairs(base, "b.dat")) != (a, b)
            except Exception:
                harmed += 1
            shutil.rmtree(base)
            if harmed == needed:
                break
        assert harmed == needed

    def test_each_commit_can_be_read_while_the_store_goes_on(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected: Pairs = []
        backend = self.make_backend(tmp_path, OsStorage())
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            begun = 0
            for part in range(50):
                expected += feed.pairs(1, 10 * part, 10)
                engine.take(feed.since(begun))
                begun = feed.position
                engine.commit()()
                engine.committed_now()
                assert self.read_pairs(tmp_path, "data.dat") == expected
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected

    def test_a_file_of_somebody_is_left_as_it_is(self, tmp_path):
        data = tmp_path / "out" / NODE / "data.dat"
        data.parent.mkdir(parents=True)
        data.write_bytes(b"a thesis")
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        assert data.read_bytes() == b"a thesis"
        assert self.read_pairs(tmp_path, "data.2.dat") == expected

    def test_a_file_that_its_library_cannot_continue_is_left_alone_and_storing_goes_on(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        data = tmp_path / "out" / NODE / "data.dat"
        damaged = bytes(data.stat().st_size)
        data.write_bytes(damaged)
        expected = feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed)
        assert data.read_bytes() == damaged
        assert self.read_pairs(tmp_path, "data.2.dat") == expected

    def test_files_put_away_after_an_end_in_a_commit_are_as_they_were_committed(self, tmp_path):
        _, a, b, storage = self.commit_cut_before_its_sync(tmp_path / "base")
        count = sum(map(len, storage.unsynced.values()))
        for number, lost in enumerate(({0}, {count - 1}, set(range(1, count)), set())):
            base = tmp_path / str(number)
            storage.copy(tmp_path / "base", base, lost)
            moved = put_files_away(StorePlace("store", base / "state", base / "out"))
            assert sorted(path.name for path in moved) == ["a.dat.1.old", "b.dat.1.old"]
            found = {path.name[0]: self.read_file(path) for path in moved}
            assert found == {"a": a[:-50], "b": b[:-9]}, f"lost {sorted(lost)}"

    def test_a_file_written_long_ago_is_continued_when_its_mark_was_forgotten_for_newer_ones(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("a.dat"))
        a = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        log = CommitLog(tmp_path / "state", self.key, OsStorage())
        others = {f"{NODE}/{number}": FileMark(1, sealed=True) for number in range(FILES_MAX - 1)}
        log.append(Change(log.state.position, dict(others)))
        log.close()
        feed.open(2, self.config("b.dat"))
        b = feed.pairs(2, 0, 5)
        a += feed.pairs(1, 5, 5)
        self.feed_all(tmp_path, feed, per_commit=2)
        assert (self.read_pairs(tmp_path, "a.dat"), self.read_pairs(tmp_path, "b.dat")) == (a, b)
