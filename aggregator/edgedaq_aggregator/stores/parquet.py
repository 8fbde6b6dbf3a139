"""The Parquet store: an archive of sealed parts, each complete and never changed again.

A commit of this store *is* its parts: every dataset that got rows since the last one gets one more part,
drawn in ``parquet_parts.py``. It commits when a part is worth it (``seal_size``) or old enough
(``seal_every``), and the journal keeps what is not committed; so a quiet stream is sealed by time, and the
journal waits no longer. Values are those of Arrow, nothing is converted.

::

    write        rows to the open part of their dataset, under a hidden name
    commit       parts complete ─► fdatasync ─► directories ─► commit record ─► rename
    recover      rename what the last record names, and drop what no record does

Files in the commit record: ``end`` and ``digest`` of the whole part, which is a block, ``sealed`` once its
name is durable. A directory in it is a dataset that is left alone. Marks go to ``_marks.parquet.csv``, in
the same commit.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
from edgedaq.clock import utc_date
from edgedaq.config import Bytes, DAQJobConfig, Seconds
from edgedaq.errors import ConfigError, StoreError
from edgedaq.frame import Frame
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage, Storage
from edgedaq.store_config import DAQJobStoreConfigParquet

from edgedaq_aggregator.stores.backend import Backend, Recovered, Refusal
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.commits import Change, CommitLog, FileMark
from edgedaq_aggregator.stores.data_file import DataFile
from edgedaq_aggregator.stores.data_files import DataFiles
from edgedaq_aggregator.stores.file_names import PathRefusedError, numbered, resolve
from edgedaq_aggregator.stores.file_reader import FileReader
from edgedaq_aggregator.stores.loop import Cadence
from edgedaq_aggregator.stores.marks import MARKS_HEADER, Mark, mark_line, marks_file
from edgedaq_aggregator.stores.parquet_batches import BatchEncoder
from edgedaq_aggregator.stores.parquet_parts import SUFFIX, Dataset, Part, hidden
from edgedaq_aggregator.stores.parquet_reader import find_row, located, parse_part
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.streams import REFUSED, redirected_to, redirection, reopened
from edgedaq_aggregator.stores.tables import by_time, each_or_refused
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["DAQJobStoreParquet", "ParquetBackend"]

KEY = "parquet"
BUFFERED_BYTES_MAX = 64 << 20
DATASETS_MAX = 1024
_NUMBERS_MAX = 1000
_NS_PER_DAY = 86_400_000_000_000


@dataclass(slots=True)
class _Stream:
    info: OpenInfo
    options: DAQJobStoreConfigParquet
    encoder: BatchEncoder
    datasets: dict[tuple[int, pa.Schema], Dataset] = field(default_factory=dict)


class ParquetBackend:
    """Writes parts below ``out_dir``; see ``backend.Backend`` for the contract.

    Args:
        state_dir: Of this store alone: the commit records.
    """

    def __init__(self, state_dir: Path, out_dir: Path, storage: Storage) -> None:
        self._state_dir = state_dir
        self._out_dir = out_dir
        self._storage = storage
        self._commits: CommitLog | None = None
        self._marks: DataFiles | None = None
        self._streams: dict[int, _Stream] = {}
        self._datasets: dict[str, Dataset] = {}
        self._changes: dict[str, FileMark | None] = {}
        self._directories: set[Path] = set()
        self._newest: dict[str, int] = {}
        self._left_alone: set[str] = set()
        self._committing = Change(None)
        self._locks: dict[str, int] = {}
        self._under_way: tuple[list[Part], list[DataFile]] = [], []
        self._clock = 0
        self._log = get_logger().bind(store=KEY)

    def recover(self) -> Recovered:
        """See ``Backend``."""
        self.close()
        commits = self._commits = CommitLog(self._state_dir, KEY, self._storage)
        state = commits.state
        undo = UndoLog(self._state_dir, self._storage, state.files)  # of no file: marks are appended
        own = marks_file(KEY)
        marks = {name: mark for name, mark in state.files.items() if name.endswith(own)}
        self._marks = DataFiles(self._out_dir, marks, self._storage, commits.declare, undo)
        self._marks.recover(is_clean=state.clean, is_damaged=bool(commits.damage))
        for name, mark in state.files.items():
            if name not in marks:
                self._recover_file(name, mark)
        if commits.damage:
            self._log.error("commits.damaged", reason=commits.damage, path=str(self._state_dir))
            self._changes.update(dict.fromkeys(self._newest, _LEFT_ALONE))
            self._left_alone |= set(self._newest)
        return Recovered(reopened(state, self.open, self._log), state.position)

    def open(self, stream: int, info: OpenInfo) -> None:
        """See ``Backend``."""
        encoder = BatchEncoder(info)
        try:
            options = msgspec.convert(info.store_config.get(KEY), DAQJobStoreConfigParquet)
        except (msgspec.ValidationError, ConfigError) as e:
            self._redirect(stream, info, encoder, f"store_config.parquet: {e}")
        else:
            self._streams[stream] = _Stream(info, options, encoder)

    def write(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        """See ``Backend``."""
        held = self._streams[stream]
        refused: list[Refusal] = []
        groups: Iterable[tuple[int, Sequence[Frame]]] = [(-1, frames)]
        if held.options.add_date:
            groups = by_time(frames, held.info.t_open_ns, _NS_PER_DAY)
        for day, group in groups:
            for batch in each_or_refused(held.encoder.encode, group, refused):
                self._append(stream, day, batch, (group[0].seq, group[-1].seq))
        return refused

    def write_mark(self, mark: Mark) -> None:
        """See ``Backend``."""
        marks = self._files_of_marks
        try:
            file = marks.locate(mark.info.node, marks_file(KEY), header=MARKS_HEADER, is_ours=True)
        except PathRefusedError as e:
            raise StoreError(str(e)) from e
        line = mark_line(mark)
        file.append([MARKS_HEADER, line] if file.is_empty else [line])

    def end(self, stream: int) -> None:
        """See ``Backend``."""
        self._streams.pop(stream, None)

    def commit(self, change: Change) -> Callable[[], None]:
        """See ``Backend``."""
        if self._commits is None:
            raise RuntimeError(_NOT_RECOVERED)
        commits, storage = self._commits, self._storage
        files, directories = self._files_of_marks.changes(change)
        change.files.update(self._changes)
        parts = [dataset.part for dataset in self._datasets.values() if dataset.part is not None]
        change.blocks.update({part.name: part.held for part in parts})
        directories |= self._directories | {part.path.parent for part in parts}
        self._changes, self._directories = {}, set()
        for dataset in self._datasets.values():
            dataset.part = None
        self._under_way = parts, files

        def make_durable() -> None:
            for part in parts:
                change.files[part.name] = part.finish()
            for file in files:
                storage.fdatasync(file.fd)
            for directory in directories:
                storage.sync_directory(directory)
            commits.append(change)
            for part in parts:
                part.publish()

        self._committing = change
        return make_durable

    def committed(self) -> None:
        """See ``Backend``."""
        parts, files = self._under_way
        self._under_way = [], []
        self._files_of_marks.committed(files)
        for part in parts:
            mark = self._committing.files[part.name]
            if mark is not None:
                self._changes[part.name] = mark._replace(sealed=True)
            self._directories.add(part.path.parent)
        if len(self._datasets) > DATASETS_MAX:
            idle = sorted((d for d in self._datasets.values() if d.part is None), key=lambda d: d.last_used)
            for dataset in idle[: len(self._datasets) - DATASETS_MAX]:
                del self._datasets[dataset.name]

    def facts(self) -> dict[str, Any]:
        """See ``Backend``."""
        return {"files": sum(dataset.part is not None for dataset in self._datasets.values())}

    def close(self) -> None:
        """See ``Backend``."""
        for part in [dataset.part for dataset in self._datasets.values()] + self._under_way[0]:
            if part is not None:
                part.close()
        for lock in self._locks.values():
            self._storage.close(lock)
        for held in (self._datasets, self._locks, self._streams, self._newest, self._changes):
            held.clear()
        self._left_alone.clear()
        self._directories.clear()
        self._under_way = [], []
        if self._marks is not None:
            self._marks.close()
            self._marks = None
        if self._commits is not None:
            self._commits.close()
            self._commits = None

    @property
    def _files_of_marks(self) -> DataFiles:
        if self._marks is None:
            raise RuntimeError(_NOT_RECOVERED)
        return self._marks

    def _recover_file(self, name: str, mark: FileMark) -> None:
        """Give a recorded part its name, where death came before."""
        path = self._out_dir / name
        if path.suffix != SUFFIX or not path.stem.isdigit():
            self._left_alone.add(name)
            return
        dataset = str(path.parent.relative_to(self._out_dir))
        self._newest[dataset] = max(self._newest.get(dataset, 0), int(path.stem))
        if mark.sealed:
            return
        unnamed = hidden(path)
        if unnamed.is_file() and unnamed.stat().st_size == mark.end:
            self._storage.rename(unnamed, path)
            self._directories.add(path.parent)
        self._changes[name] = mark._replace(sealed=True)

    def _redirect(self, stream: int, info: OpenInfo, encoder: BatchEncoder, reason: str) -> None:
        """Give a stream whose dataset cannot be had one of its own."""
        path = redirected_to(stream, KEY)
        self._streams[stream] = _Stream(info, DAQJobStoreConfigParquet(path), encoder)
        mark = redirection(stream, info, reason, path, self._log)
        if f"{info.node}/{path}" not in self._newest:
            self.write_mark(mark)

    def _append(self, stream: int, day: int, batch: pa.RecordBatch, seqs: tuple[int, int]) -> None:
        held = self._streams[stream]
        try:
            dataset = self._dataset(held, day, batch.schema)
        except PathRefusedError as e:
            if held.options.file_path.startswith(REFUSED):
                raise StoreError(str(e)) from e
            self._redirect(stream, held.info, held.encoder, str(e))
            return self._append(stream, -1, batch, seqs)
        part = dataset.part or dataset.new_part(held.options.compression, self._storage)
        part.append(batch, stream, *seqs)
        open_parts = [d.part for d in self._datasets.values() if d.part is not None]
        if sum(part.buffered_bytes for part in open_parts) > BUFFERED_BYTES_MAX:
            max(open_parts, key=lambda part: part.buffered_bytes).write_group()
        return None

    def _dataset(self, held: _Stream, day: int, schema: pa.Schema) -> Dataset:
        dataset = held.datasets.get((day, schema))
        if dataset is None or self._datasets.get(dataset.name) is not dataset or self._is_gone(dataset):
            if len(held.datasets) > 8:
                held.datasets.clear()
            dataset = held.datasets[day, schema] = self._locate(held, day, schema)
        self._clock += 1
        dataset.last_used = self._clock
        return dataset

    def _is_gone(self, dataset: Dataset) -> bool:
        """Tell whether a dataset was moved away since the last commit; it is complete as it is, then."""
        if dataset.part is not None or dataset.is_there:
            return False
        self._log.warning("file.moved", path=dataset.name)
        del self._datasets[dataset.name]
        return True

    def _locate(self, held: _Stream, day: int, schema: pa.Schema) -> Dataset:
        node = held.info.node
        directory, base, changed = resolve(self._out_dir, node, held.options.file_path, is_ours=False)
        self._directories |= changed
        self._lock(node)
        if day >= 0:
            base = f"{utc_date(day * _NS_PER_DAY)}_{base}"
        for number in range(1, _NUMBERS_MAX):
            path = directory / numbered(base, number, "")
            name = str(path.relative_to(self._out_dir))
            known = self._datasets.get(name)
            if known is not None and not self._is_gone(known):
                if known.schema.equals(schema):
                    return known
                continue
            if name in self._left_alone or path.is_symlink():
                continue
            try:
                path.mkdir()
                self._directories.add(directory)
            except FileExistsError:
                if not path.is_dir():
                    continue
            except OSError as e:
                if e.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                    raise
                message = f"{name}: {e.strerror}"
                raise PathRefusedError(message) from e
            told = _with_units(schema, held.info)
            found = Dataset.at(path, name, told, self._newest.get(name, 0), self._storage)
            if found is not None:
                self._datasets[name] = found
                return found
        message = f"{node}: {held.options.file_path}: all of {_NUMBERS_MAX} numbers are taken"
        raise PathRefusedError(message)

    def _lock(self, node: str) -> None:
        """Keep other processes from writing parts of this node as long as this one does."""
        if node in self._locks:
            return
        try:
            self._locks[node] = self._storage.lock(self._out_dir / node / ".parquet.lock")
        except BlockingIOError as e:
            message = f"another store writes Parquet files of {node}"
            raise StoreError(message) from e


def _with_units(schema: pa.Schema, info: OpenInfo) -> pa.Schema:
    """Return a schema whose fields tell their units, as the stream does."""
    units = {column.name: column.unit for column in info.schema.columns} if info.schema else {}
    return pa.schema([f.with_metadata({"unit": units[f.name]}) if units.get(f.name) else f for f in schema])


_LEFT_ALONE = FileMark(0, sealed=True)
_NOT_RECOVERED = "a backend must be recovered before it is used"


class DAQJobStoreParquetConfig(DAQJobConfig):
    """When parts are sealed: the journal keeps their rows until then."""

    seal_size: Annotated[Bytes, msgspec.Meta(ge=1 << 20, le=1 << 30)] = 128 << 20
    seal_every: Annotated[Seconds, msgspec.Meta(ge=1, le=3600)] = 60


class DAQJobStoreParquet(DAQJobStore):
    """Stores streams whose ``store_config`` has ``parquet``."""

    key = KEY
    config_type = DAQJobStoreParquetConfig
    config: DAQJobStoreParquetConfig

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return ParquetBackend(state_dir, out_dir, OsStorage())

    def cadence(self) -> Cadence:
        """See ``DAQJobStore``."""
        return Cadence(self.config.seal_size, self.config.seal_every, at_once=False)


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a Parquet store back."""
    return FileReader(place, KEY, parse_part, find_row, locate=located)
