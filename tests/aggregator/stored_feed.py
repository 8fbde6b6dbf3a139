"""An aggregator's directory made from a ``Feed``: a journal, stores fed from it, and what they stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgedaq.segment_file import list_segments
from edgedaq.segment_format import Record
from edgedaq.segment_reader import SegmentReader
from edgedaq.segments import SegmentLog
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.hdf5 import Hdf5Format
from edgedaq_aggregator.stores.parquet import ParquetBackend
from edgedaq_aggregator.stores.raw import RawFormat
from edgedaq_aggregator.stores.root import RootFormat
from edgedaq_aggregator.stores.sqlite import SqliteBackend

from tests.contract.store_feed import Feed

MakeBackend = Callable[[Path, Path, Storage], Backend]

BACKENDS: dict[str, MakeBackend] = {
    "csv": lambda *place: FileBackend(CsvFormat(), *place),
    "raw": lambda *place: FileBackend(RawFormat(), *place),
    "hdf5": lambda *place: FileBackend(Hdf5Format(), *place),
    "root": lambda *place: FileBackend(RootFormat(), *place),
    "parquet": ParquetBackend,
    "sqlite": SqliteBackend,
}


class StoredFeed:
    """``out_dir`` with ``.state`` within.

    Args:
        servers: What makes the backends of stores with a server behind.
    """

    def __init__(self, out_dir: Path, servers: Mapping[str, MakeBackend] | None = None) -> None:
        self._backends = {**BACKENDS, **(servers or {})}
        self.out_dir = out_dir
        self.state_dir = out_dir / ".state"
        self._journaled = 0
        self._fed: dict[str, int] = {}
        (self.state_dir / "stores").mkdir(parents=True)

    def journal(self, feed: Feed) -> None:
        """Append what is new; positions of the feed are not those of the journal."""
        with SegmentLog(self.state_dir / "journal", segment_bytes=1 << 20, limit_bytes=64 << 20) as log:
            log.append([e.frame for e in feed.records[self._journaled :] if isinstance(e, Record)])
            log.sync()
        self._journaled = len(feed.records)

    def store(self, key: str, until: int | None = None, *, per_commit: int = 2) -> None:
        """Let a store take what is journaled and new to it, up to so many records of it."""
        journal = self.state_dir / "journal"
        own = self.state_dir / "stores" / f"store_{key}"
        backend = self._backends[key](own, self.out_dir, OsStorage())
        try:
            engine = StoreEngine(key, backend, lambda _: None)
            begin = engine.position
            with SegmentReader(journal, begin or list_segments(OsStorage(), journal)[0]) as reader:
                if begin is None:
                    engine.begin(reader.position, reader.table_at_start())
                records = []
                while found := reader.read((1 << 64) - 1):
                    records += [entry for entry in found if isinstance(entry, Record)]
            records = records[:until]
            for at in range(0, len(records), per_commit):
                engine.take(records[at : at + per_commit])
                engine.commit()()
                engine.committed_now()
            engine.commit(is_clean=True)()
            engine.committed_now()
        finally:
            backend.close()
