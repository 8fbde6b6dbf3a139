"""The SQLite store: SQL without a server. A database per ``file_path``, a table per ``table_name``.

A table has the columns of its rows and no others, and no declared types: SQLite then keeps each value as
it is given (a column that widens from number to text holds both). Rows with other columns go to ``name_2``.
What a value becomes:

=============== =========================================================================================
whole numbers   INTEGER; above 2^63 - 1 TEXT, which no arithmetic rounds
floats          REAL, ``inf`` included; ``nan`` is NULL, as SQLite has none
booleans        INTEGER, 0 or 1
timestamps      INTEGER, UTC nanoseconds
text, bytes     TEXT, BLOB
arrays          TEXT, JSON, fixed and ragged ones alike: ``json_each(samples)``
missing         NULL
=============== =========================================================================================

A raw stream that is put here has one column, ``message``; an event stream has ``metadata`` (JSON) and
``payload``.

Beside the tables of rows each database has::

    edgedaq_marks       time, node, job, life, stream, tag, kind, first_seq, last_seq, rows, reason
    edgedaq_columns     table_name, column_name, dtype, unit    of the first rows; dtype as in ``dtypes.py``
    edgedaq_watermarks  stream (16 hex), next_seq               what of a stream is in this database
    edgedaq_runs        table_name, first_row, last_row, stream, first_seq, last_seq    whose rows those are

One transaction of a database holds rows, marks and watermarks (``sqlite_database.py``). A commit may write
to several databases; behind all of them the commit record says how far the journal is consumed, and after a
death in between the databases drop what they have already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from edgedaq.clock import utc_date
from edgedaq.errors import ConfigError, StoreError
from edgedaq.frame import Frame
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage, Storage
from edgedaq.store_config import DAQJobStoreConfigSQLite

from edgedaq_aggregator.stores.backend import Backend, Recovered, Refusal
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.commits import Change, CommitLog, FileMark
from edgedaq_aggregator.stores.file_names import PathRefusedError, numbered, resolve
from edgedaq_aggregator.stores.marks import Mark, mark_values
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.sqlite_database import Database, Load, UnusableError
from edgedaq_aggregator.stores.sqlite_reader import SqliteReader
from edgedaq_aggregator.stores.sqlite_rows import RowEncoder
from edgedaq_aggregator.stores.streams import REFUSED, redirected_to, redirection, reopened
from edgedaq_aggregator.stores.tables import by_time, each_or_refused, units_of

__all__ = ["DAQJobStoreSQLite", "SqliteBackend"]

KEY = "sqlite"
OPEN_DATABASES_MAX = 64
_NUMBERS_MAX = 1000
_NS_PER_DAY = 86_400_000_000_000


@dataclass(slots=True)
class _Stream:
    info: OpenInfo
    options: DAQJobStoreConfigSQLite
    encoder: RowEncoder
    databases: dict[int, Database] = field(default_factory=dict)


class SqliteBackend:
    """Writes to databases under ``out_dir``; see ``backend.Backend`` for the contract.

    Args:
        state_dir: Of this store alone: the commit records.
    """

    def __init__(self, state_dir: Path, out_dir: Path, storage: Storage) -> None:
        self._state_dir = state_dir
        self._out_dir = out_dir
        self._storage = storage
        self._commits: CommitLog | None = None
        self._streams: dict[int, _Stream] = {}
        self._open: dict[str, Database] = {}
        self._left_alone: set[str] = set()
        self._changes: dict[str, FileMark | None] = {}
        self._new_directories: set[Path] = set()
        self._ended: list[int] = []
        self._under_way: tuple[list[Database], list[int]] = [], []
        self._clock = 0
        self._log = get_logger().bind(store=KEY)

    def recover(self) -> Recovered:
        """See ``Backend``."""
        self.close()
        self._commits = commits = CommitLog(self._state_dir, KEY, self._storage)
        if commits.damage:
            self._log.error("commits.damaged", reason=commits.damage, path=str(self._state_dir))
        self._left_alone = {name for name, mark in commits.state.files.items() if mark.sealed}
        table = reopened(commits.state, self.open, self._log)
        return Recovered(table, commits.state.position)

    def open(self, stream: int, info: OpenInfo) -> None:
        """See ``Backend``."""
        encoder = RowEncoder(info)
        try:
            options = msgspec.convert(info.store_config.get(KEY), DAQJobStoreConfigSQLite)
        except (msgspec.ValidationError, ConfigError) as e:
            self._redirect(stream, info, encoder, f"store_config.sqlite: {e}")
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
            database = self._database(stream, held, day)
            first = database.watermarks.get(stream, 0)
            there = [frame for unit in units_of(group) if unit[-1].seq < first for frame in unit]
            fresh = group[len(there) :]
            if there:  # the database has them, but the account wants to know what was refused of them
                each_or_refused(held.encoder.encode, there, refused)
            if fresh:
                rows = each_or_refused(held.encoder.encode, fresh, refused)
                name, last = held.options.table_name, fresh[-1].seq
                database.pending.rows += [Load(name, part, stream, fresh[0].seq, last) for part in rows]
                database.watermarks[stream] = database.pending.watermarks[stream] = last + 1
        return refused

    def write_mark(self, mark: Mark) -> None:
        """See ``Backend``."""
        held = self._streams[mark.stream]
        day = (mark.t_utc_ns or held.info.t_open_ns) // _NS_PER_DAY if held.options.add_date else -1
        self._database(mark.stream, held, day).pending.marks.append(mark_values(mark))

    def end(self, stream: int) -> None:
        """See ``Backend``."""
        if self._streams.pop(stream, None) is not None:
            self._ended.append(stream)

    def commit(self, change: Change) -> Callable[[], None]:
        """See ``Backend``."""
        commits = self._log_of_commits
        databases = [database for database in self._open.values() if database.has_pending]
        batches = [(database, database.take_pending()) for database in databases]
        change.files, self._changes = self._changes, {}
        directories, self._new_directories = self._new_directories, set()
        for database in databases:
            database.pins += 1
        self._under_way = databases, self._ended
        self._ended = []

        def make_durable() -> None:
            for database, batch in batches:
                try:
                    database.apply(batch)
                except UnusableError as e:
                    commits.declare(database.name, FileMark(0, sealed=True))
                    message = f"{e}; it is left alone, rows go to another file"
                    raise StoreError(message) from e
            for directory in directories:
                self._storage.sync_directory(directory)
            commits.append(change)

        return make_durable

    def committed(self) -> None:
        """See ``Backend``."""
        databases, ended = self._under_way
        self._under_way = [], []
        for database in databases:
            database.pins -= 1
        for database in self._open.values():
            database.pending.ended += [stream for stream in ended if database.watermarks.pop(stream, 0)]
        self._make_room()

    def facts(self) -> dict[str, Any]:
        """See ``Backend``."""
        return {"files": len(self._open)}

    def close(self) -> None:
        """See ``Backend``."""
        for database in self._open.values():
            database.close()
        self._open.clear()
        self._streams.clear()
        self._changes.clear()
        self._ended.clear()
        self._under_way = [], []
        if self._commits is not None:
            self._commits.close()
            self._commits = None

    @property
    def _log_of_commits(self) -> CommitLog:
        if self._commits is None:
            message = "a backend must be recovered before it is used"
            raise RuntimeError(message)
        return self._commits

    def _redirect(self, stream: int, info: OpenInfo, encoder: RowEncoder, reason: str) -> None:
        """Give a stream whose database cannot be had one of its own."""
        path = redirected_to(stream, KEY)
        self._streams[stream] = _Stream(info, DAQJobStoreConfigSQLite(path), encoder)
        self.write_mark(redirection(stream, info, reason, path, self._log))

    def _database(self, stream: int, held: _Stream, day: int) -> Database:
        """Return the database that rows of a day go to, and that still has its name."""
        database = held.databases.get(day)
        if database is None or self._open.get(database.name) is not database or self._is_gone(database):
            try:
                database = self._locate(held, day)
            except PathRefusedError as e:
                if held.options.file_path.startswith(REFUSED):
                    raise StoreError(str(e)) from e
                self._redirect(stream, held.info, held.encoder, str(e))
                return self._database(stream, self._streams[stream], -1)
            if len(held.databases) > 8:
                held.databases.clear()
            held.databases[day] = database
        self._clock += 1
        database.last_used = self._clock
        return database

    def _is_gone(self, database: Database) -> bool:
        """Tell whether a database was moved away since the last commit; it is complete as it is, then."""
        if database.has_pending or database.is_there:
            return False
        if database.pins:
            message = f"{database.name} was moved away while it was written"
            raise StoreError(message)
        self._log.warning("file.moved", path=database.name)
        self._drop(database)
        return True

    def _locate(self, held: _Stream, day: int) -> Database:
        directory, base, changed = resolve(
            self._out_dir, held.info.node, held.options.file_path, is_ours=False
        )
        self._new_directories |= changed
        if day >= 0:
            base = f"{utc_date(day * _NS_PER_DAY)}_{base}"
        for number in range(1, _NUMBERS_MAX):
            path = directory / numbered(base, number, "")
            name = str(path.relative_to(self._out_dir))
            known = self._open.get(name)
            if known is not None and not self._is_gone(known):
                return known
            if name in self._left_alone or path.is_symlink() or (path.exists() and not path.is_file()):
                continue
            self._make_room()
            self._keep_orphan(path, name)
            try:
                database = self._open[name] = Database(path, name)
            except UnusableError as e:
                self._left_alone.add(name)
                self._changes[name] = FileMark(0, sealed=True)
                self._log.warning("file.sealed", path=name, reason=str(e))
                continue
            self._changes[name] = FileMark(0)
            return database
        message = f"{held.info.node}: {held.options.file_path}: all of {_NUMBERS_MAX} numbers are taken"
        raise PathRefusedError(message)

    def _keep_orphan(self, path: Path, name: str) -> None:
        """Put aside the WAL of a database that was moved away without it; SQLite would delete it."""
        orphan = path.with_name(f"{path.name}-wal")
        if path.exists() or not orphan.is_file() or not orphan.stat().st_size:
            return
        for number in range(1, _NUMBERS_MAX):
            aside = path.with_name(f"{orphan.name}.{number}.bad")
            if not aside.exists():
                self._storage.rename(orphan, aside)
                self._log.error("file.orphaned", path=name, moved_to=aside.name)
                return

    def _make_room(self) -> None:
        """Close databases, those used longest ago first; what waits for a commit is written before."""
        idle = [database for database in self._open.values() if not database.pins]
        idle.sort(key=lambda database: database.last_used)
        for database in idle[: max(len(self._open) + 1 - OPEN_DATABASES_MAX, 0)]:
            if (
                database.has_pending
            ):  # earlier than the commit record is early enough: it knows its watermarks
                database.apply(database.take_pending())
            self._drop(database)

    def _drop(self, database: Database) -> None:
        del self._open[database.name]
        database.close()


class DAQJobStoreSQLite(DAQJobStore):
    """Stores streams whose ``store_config`` has ``sqlite``."""

    key = KEY

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return SqliteBackend(state_dir, out_dir, OsStorage())


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a SQLite store back."""
    return SqliteReader(place)
