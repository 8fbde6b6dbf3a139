"""A store as its contract sees it: how it is made, what goes in, and how its data is read back."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from edgedaq.clock import mono_ns
from edgedaq.frame import Frame, Kind
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores import READERS
from edgedaq_aggregator.stores.backend import Backend, Refusal
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.loop import Cadence, StoreLoop
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader

from tests.contract.ended_calls import EndedCalls
from tests.contract.faulty_storage import KilledStorage
from tests.contract.store_feed import Feed, FeedFollower

__all__ = ["Pairs", "StoreUnderTest", "wait_for"]

Pairs = list[tuple[int, float]]
CADENCE = Cadence()


class NothingRetained:
    """A journal that has nothing any more."""

    def take(self, wanted: Mapping[int, tuple[int, int]]) -> dict[int, list[Frame]]:
        return {stream: [] for stream in wanted}

    def follow(self, streams: Collection[int]) -> Iterator[Frame]:  # noqa: ARG002
        return iter(())


class StoreUnderTest:
    """Inherit it, and fill in what is marked."""

    key: ClassVar[str]
    ends_between_calls: ClassVar[bool] = True
    """False for a store that does everything through ``Storage``, and is ended there."""

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        """Return a backend, of data that another ``base`` knows nothing of.

        Args:
            storage: For whatever it writes to files; those lie in ``base/state`` and ``base/out``.
        """
        raise NotImplementedError

    def read_pairs(self, base: Path, name: str) -> Pairs:
        """Return the (sequence, value) rows of ``NODE`` that went where ``config(name)`` says, in order."""
        raise NotImplementedError

    def read_marks(self, base: Path) -> list[dict[str, str]]:
        """Return the marks of ``NODE`` in order."""
        raise NotImplementedError

    def config(self, name: str = "data.dat", **options: Any) -> dict[str, Any]:
        """Return the ``store_config`` that has rows go to what is called ``name``."""
        return {self.key: {"file_path": name, **options}}

    def put_bad_frame(self, feed: Feed, stream: int) -> int:
        """Append a frame of 10 rows that cannot be stored; return its seq."""
        return feed.put(Kind.PACKED, stream, b"not ten rows", rows=10).seq

    def backend(self, base: Path, storage: Storage) -> Backend:
        """Return the backend, which ends where ``storage`` ends."""
        made = self.make_backend(base, storage)
        if self.ends_between_calls and isinstance(storage, KilledStorage):
            return EndedCalls(made, storage)
        return made

    def environment(self) -> dict[str, str]:
        """Return what a process needs to know to make this backend, besides ``base``."""
        return {}

    def feed_all(
        self, base: Path, feed: Feed, storage: Storage | None = None, *, per_commit: int = 3
    ) -> list[Refusal]:
        """Bring everything that is not committed yet to the store, as a new process would; ends orderly."""
        backend = self.backend(base, storage or OsStorage())
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

    def check_recorded(self, base: Path) -> None:
        """Ask the reader of the store, if it has one: all that was committed is there as it was."""
        target = READERS.get(self.key)
        if target is None:
            return
        module, _, make = target.partition(":")
        place = StorePlace("store", base / "state", base / "out", self.reader_config(base))
        reader: StoreReader = getattr(importlib.import_module(module), make)(place)
        found = reader.check(NothingRetained())
        assert (found.problems, found.notes, found.is_whole) == ([], [], True)
        for account in [*reader.table.streams.values(), *reader.table.tombstones.values()]:
            assert found.rows.get(account.stream, 0) == account.rows
            assert found.marked.get(account.stream, 0) in (account.gap_rows, None)

    def reader_config(self, base: Path) -> Any:  # noqa: ARG002
        """Return the configuration of the store itself, where its reader needs one."""
        return None

    @contextmanager
    def looping(
        self,
        base: Path,
        feed: Feed,
        storage: Storage,
        wrap: Callable[[Backend], Backend] = lambda backend: backend,
        cadence: Cadence = CADENCE,
    ) -> Iterator[tuple[StoreLoop, list[FeedFollower]]]:
        """Run the store on a feed in a thread of its own, until the block is left."""
        stop = threading.Event()
        followers: list[FeedFollower] = []

        def follow(position: int | None, wants: Callable[[int], bool]) -> FeedFollower:
            followers.append(FeedFollower(feed, position, wants))
            return followers[-1]

        loop = StoreLoop(
            self.key,
            make_backend=lambda: wrap(self.make_backend(base, storage)),
            follow=follow,
            bad_dir=base / "bad",
            stop=stop,
            cadence=cadence,
        )
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield loop, followers
        finally:
            stop.set()
            thread.join()


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Return once the condition holds."""
    end = mono_ns() + int(limit_s * 1e9)
    pause = threading.Event()
    while not condition():
        assert mono_ns() < end, "the condition did not come true"
        pause.wait(0.01)
