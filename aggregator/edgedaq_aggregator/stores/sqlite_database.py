"""One database of the SQLite store: tables from rows, and everything of a commit in one transaction.

``apply`` is one transaction: rows, marks, and per stream the watermark, the next seq that is not here yet.
What comes again of a stream after a death is recognized by it, so a database never holds a row twice,
whatever the commit record says. A mark that comes again is the same mark. ``edgedaq_runs`` says whose the
rows are: those from ``first_row`` to ``last_row`` (rowids) are all that the frames from ``first_seq`` to
``last_seq`` of a stream have in this table.

WAL and ``synchronous=FULL``: readers never wait for the store nor it for them, and a commit is on the disk
when it returns. Where the file system cannot do WAL, the rollback journal does it, more slowly.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import StoreError

from edgedaq_aggregator.stores.marks import MARKS_COLUMNS
from edgedaq_aggregator.stores.sqlite_rows import Rows

__all__ = ["Batch", "Database", "Load", "UnusableError", "quoted", "row_number"]

BUSY_LIMIT_S = 5.0
"""How long a reader that locks the database as a whole is waited for."""

VALUES_PER_STATEMENT = 999
"""Every SQLite takes so many; it is told no more."""

_NUMBERS_MAX = 1000
_ROW_NUMBERS = ("rowid", "_rowid_", "oid")
_UNUSABLE = ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_READONLY", "SQLITE_FORMAT")
_PRAGMAS = ("PRAGMA journal_size_limit = 67108864", "PRAGMA temp_store = MEMORY")
_SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS edgedaq_marks ({', '.join(MARKS_COLUMNS)})",
    """CREATE UNIQUE INDEX IF NOT EXISTS edgedaq_marks_once
        ON edgedaq_marks (stream, kind, first_seq, last_seq, ifnull(rows, -1), reason)""",
    "CREATE TABLE IF NOT EXISTS edgedaq_columns (table_name TEXT, column_name TEXT, dtype TEXT, unit TEXT)",
    "CREATE TABLE IF NOT EXISTS edgedaq_watermarks (stream TEXT PRIMARY KEY, next_seq INTEGER) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS edgedaq_runs (table_name TEXT, first_row INTEGER, last_row INTEGER,
        stream TEXT, first_seq INTEGER, last_seq INTEGER)""",
)


class UnusableError(Exception):
    """There is a file, but it is no database that rows can go to."""


class Load(NamedTuple):
    """Rows of frames of one stream, and the table that they go to."""

    table_name: str
    rows: Rows
    stream: int
    first_seq: int
    last_seq: int


@dataclass(slots=True)
class _Run:
    """The rows that came last in a table; ``rowid`` is its own in ``edgedaq_runs``."""

    rowid: int
    last_row: int
    stream: int


@dataclass(slots=True)
class Batch:
    """What a transaction is to write, in order."""

    rows: list[Load] = field(default_factory=list)
    marks: list[Sequence[object]] = field(default_factory=list)
    watermarks: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)


class Database:
    """One open database. Used by one thread at a time.

    Raises:
        UnusableError: It is none, or is damaged.
        StoreError: It cannot be had now.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.pending = Batch()
        self.last_used = 0
        self.pins = 0
        """Commits under way that still write to it."""
        self._tables: dict[tuple[str, tuple[str, ...]], str] = {}
        self._runs: dict[str, _Run] = {}
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_LIMIT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as e:
            message = f"{name}: {e}"
            raise StoreError(message) from e
        try:
            with self._told():
                self.watermarks = self._prepare()
            self._inode = path.stat().st_ino
        except BaseException:
            self._connection.close()
            raise

    @property
    def is_there(self) -> bool:
        """The file that it writes to is the one of its name."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    @property
    def has_pending(self) -> bool:
        """There is something for the next commit."""
        return bool(self.pending.watermarks or self.pending.marks)

    def take_pending(self) -> Batch:
        """Return what the next transaction is to write."""
        batch, self.pending = self.pending, Batch()
        return batch

    def apply(self, batch: Batch) -> None:
        """Make a batch durable in one transaction.

        Raises:
            StoreError: Nothing of it is there.
        """
        with self._told():
            run = self._connection.execute
            run("BEGIN IMMEDIATE")
            try:
                for load in batch.rows:
                    self._insert(load)
                marks = "INSERT OR IGNORE INTO edgedaq_marks VALUES (?,?,?,?,?,?,?,?,?,?,?)"
                self._connection.executemany(marks, batch.marks)
                known = [(f"{stream:016x}", next_seq) for stream, next_seq in batch.watermarks.items()]
                self._connection.executemany("INSERT OR REPLACE INTO edgedaq_watermarks VALUES (?,?)", known)
                ended = [(f"{stream:016x}",) for stream in batch.ended]
                self._connection.executemany("DELETE FROM edgedaq_watermarks WHERE stream = ?", ended)
                run("COMMIT")
            except BaseException:
                self._runs.clear()
                if self._connection.in_transaction:
                    run("ROLLBACK")
                raise

    def close(self) -> None:
        """Close it, everything in the one file if it can be; what was not applied is dropped."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute(
                "PRAGMA wal_checkpoint(TRUNCATE)"
            )  # closing alone leaves out a moved one
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _prepare(self) -> dict[int, int]:
        run = self._connection.execute
        mode = run("PRAGMA journal_mode = WAL").fetchone()[0]
        run(f"PRAGMA synchronous = {'FULL' if mode == 'wal' else 'EXTRA'}")
        for pragma in _PRAGMAS:
            run(pragma)
        for statement in _SCHEMA:
            run(statement)
        found = run("SELECT stream, next_seq FROM edgedaq_watermarks").fetchall()
        return {int(stream, 16): int(next_seq) for stream, next_seq in found}

    def _insert(self, load: Load) -> None:
        """Insert rows, many to a statement: twice as fast as one by one."""
        rows = load.rows
        table = self._tables.get((load.table_name, rows.names))
        if table is None:
            table = self._tables[load.table_name, rows.names] = self._table_for(load.table_name, rows)
        width = len(rows.names)
        size = max(VALUES_PER_STATEMENT // width, 1) * width
        insert = f"INSERT INTO {quoted(table)} VALUES "  # noqa: S608 -- quoted
        row = f"({','.join('?' * width)})"
        last_row = count = 0
        while group := tuple(islice(rows.values, size)):
            done = self._connection.execute(insert + ",".join([row] * (len(group) // width)), group)
            last_row, count = done.lastrowid or 0, count + len(group) // width
        if count:
            self._tell(load, table, last_row - count + 1, last_row)

    def _tell(self, load: Load, table: str, first_row: int, last_row: int) -> None:
        """Write down whose rows these are."""
        run = self._runs.get(table)
        if run is not None and (run.stream, run.last_row + 1) == (load.stream, first_row):
            longer = "UPDATE edgedaq_runs SET last_row = ?, last_seq = ? WHERE rowid = ?"
            self._connection.execute(longer, (last_row, load.last_seq, run.rowid))
            run.last_row = last_row
            return
        told = (table, first_row, last_row, f"{load.stream:016x}", load.first_seq, load.last_seq)
        made = self._connection.execute("INSERT INTO edgedaq_runs VALUES (?,?,?,?,?,?)", told)
        self._runs[table] = _Run(made.lastrowid or 0, last_row, load.stream)

    def _table_for(self, table_name: str, rows: Rows) -> str:
        """Return the table with these columns, made if there is none: of the name asked for, or numbered."""
        run = self._connection.execute
        for number in range(1, _NUMBERS_MAX):
            table = table_name if number == 1 else f"{table_name}_{number}"
            of_name = "SELECT type FROM sqlite_master WHERE name = ? COLLATE NOCASE"
            kinds = {kind for (kind,) in run(of_name, (table,))}
            if kinds == {"table"}:
                held = tuple(row[1] for row in run(f"PRAGMA table_info({quoted(table)})"))
                if held == rows.names:
                    return table
            if kinds:
                continue
            columns = ", ".join(map(quoted, rows.names))
            run(f"CREATE TABLE {quoted(table)} ({columns})")
            described = zip([table] * len(rows.names), rows.names, rows.dtypes, rows.units, strict=True)
            self._connection.executemany("INSERT INTO edgedaq_columns VALUES (?,?,?,?)", described)
            return table
        message = f"{self.name}: all of {_NUMBERS_MAX} tables of {table_name!r} have other columns"
        raise StoreError(message)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what SQLite raises into what a store raises."""
        try:
            yield
        except sqlite3.Error as e:
            message = f"{self.name}: {e}"
            code = getattr(e, "sqlite_errorname", "")
            raise (UnusableError if code.startswith(_UNUSABLE) else StoreError)(message) from e


def quoted(name: str) -> str:
    """Return a name as SQL takes it, whatever it is."""
    return '"' + name.replace('"', '""') + '"'


def row_number(names: Iterable[str]) -> str | None:
    """Return what the number of a row is called in a table of these columns; None where it has no name."""
    taken = {name.lower() for name in names}
    return next((name for name in _ROW_NUMBERS if name not in taken), None)
