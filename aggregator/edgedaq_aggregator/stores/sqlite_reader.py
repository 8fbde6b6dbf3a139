"""Databases of the SQLite store, read again: by the runs of rows that each of them has written down.

A row that is not there is missed by its number, whether the journal still has it or not; values are compared
with what the journal has. A database that was moved away has its runs with it.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
from edgedaq.delivery import StreamTable
from edgedaq.errors import StoreError, WireError
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage

from edgedaq_aggregator.stores.alike import Group, Placed, info_of
from edgedaq_aggregator.stores.column_types import column_types, typed
from edgedaq_aggregator.stores.commits import FILES_MAX, read_commits
from edgedaq_aggregator.stores.compared import accounts_of, compare, sum_marks
from edgedaq_aggregator.stores.marks import MARKS_COLUMNS
from edgedaq_aggregator.stores.reader import Checked, Part, Problem, Retained, StorePlace
from edgedaq_aggregator.stores.sqlite_database import BUSY_LIMIT_S, quoted, row_number
from edgedaq_aggregator.stores.sqlite_rows import distinct

__all__ = ["SqliteReader"]

_ROWS_AT_ONCE = 10_000


class _Run(NamedTuple):
    path: Path
    table: str
    first_row: int
    last_row: int
    stream: int
    first_seq: int

    @property
    def row_count(self) -> int:
        return self.last_row - self.first_row + 1


class SqliteReader:
    """See ``StoreReader``."""

    def __init__(self, place: StorePlace) -> None:
        self._out_dir = place.out_dir
        self._state, self._damage = read_commits(place.state_dir, OsStorage())
        self._accounts = accounts_of(self._state.table)

    @property
    def position(self) -> int | None:
        """See ``StoreReader``."""
        return self._state.position

    @property
    def table(self) -> StreamTable:
        """See ``StoreReader``."""
        return self._state.table

    def check(self, retained: Retained) -> Checked:
        """See ``StoreReader``."""
        found = Checked(is_whole=not self._damage and len(self._state.files) < FILES_MAX)
        found.notes += [f"sqlite: its records are damaged: {self._damage}"] if self._damage else []
        runs: list[_Run] = []
        absent: dict[int, int] = {}
        for path in self._paths():
            if not path.is_file():
                found.notes.append(f"{path}: is not there, moved away or deleted")
                continue
            try:
                with _opened(path) as connection:
                    runs += self._check_database(path, connection, found, absent)
            except StoreError as e:
                found.problems.append(Problem(str(path), "database", str(e)))
        marks = self.marks() if not found.problems else []
        sum_marks(marks, found)
        groups = []
        for stream, account in self._accounts.items():
            of_stream = _of_stream(runs, stream)
            recorded = sum(run.row_count for run in of_stream)
            if not self._state.clean:
                recorded = min(recorded, account.rows)  # a database may be ahead of the commit record
            found.rows[stream] = recorded - absent.get(stream, 0)
            if recorded < account.rows and not found.problems and found.is_whole:
                found.away[stream] = account.rows - recorded
            elif of_stream and not absent.get(stream) and recorded == account.rows:
                groups.append(self._group(stream, of_stream, recorded))
                continue
            found.counted += recorded
        compare(groups, self._state.table, marks, retained, found)
        return found

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """See ``StoreReader``."""
        left = {stream: account.rows for stream, account in self._accounts.items()}
        for path in self._paths():
            if not path.is_file():
                continue
            with _opened(path) as connection:
                for run in _runs_of(path, connection):
                    info = info_of(self._accounts.get(run.stream))
                    if run.stream not in streams or info is None:
                        continue
                    for placed in _read(connection, run, info, 0):
                        table = placed.table.slice(0, left[run.stream])
                        left[run.stream] -= table.num_rows
                        if table.num_rows:
                            yield Part((run.stream,), table)

    def marks(self) -> list[dict[str, str]]:
        """See ``StoreReader``."""
        found: list[dict[str, str]] = []
        query = f"SELECT {', '.join(MARKS_COLUMNS)} FROM edgedaq_marks ORDER BY rowid"  # noqa: S608 -- ours
        for path in self._paths():
            if path.is_file():
                with _opened(path) as connection:
                    for row in connection.execute(query):
                        texts = ["" if value is None else str(value) for value in row]
                        found.append(dict(zip(MARKS_COLUMNS, texts, strict=True)))
        streams = {f"{stream:016x}" for stream in self._accounts}
        return [mark for mark in found if mark["stream"] in streams]

    def _paths(self) -> list[Path]:
        """Return where the databases are, those that were left alone not among them."""
        return [self._out_dir / name for name, mark in sorted(self._state.files.items()) if not mark.sealed]

    def _group(self, stream: int, runs: list[_Run], there: int) -> Group:
        info = info_of(self._accounts[stream])

        def read(skip: int) -> Iterator[Placed]:
            for run in runs:
                if skip >= run.row_count:
                    skip -= run.row_count
                elif info is not None:
                    with _opened(run.path) as connection:
                        yield from _read(connection, run, info, skip)
                    skip = 0

        return Group((stream,), str(runs[0].path), there, read, lambda value: not math.isnan(value))

    def _check_database(
        self, path: Path, connection: sqlite3.Connection, found: Checked, absent: dict[int, int]
    ) -> list[_Run]:
        """Return the runs of a database; note the rows that are not there."""
        found.read_bytes += path.stat().st_size
        ((verdict,),) = connection.execute("PRAGMA integrity_check(1)").fetchall()
        if verdict != "ok":
            found.problems.append(Problem(str(path), "database", str(verdict)))
        runs = _runs_of(path, connection)
        by_table: dict[str, list[_Run]] = {}
        for run in runs:
            by_table.setdefault(run.table, []).append(run)
        for table, held in by_table.items():
            self._check_table(path, connection, table, held, found, absent)
        return runs

    def _check_table(
        self,
        path: Path,
        connection: sqlite3.Connection,
        table: str,
        runs: list[_Run],
        found: Checked,
        absent: dict[int, int],
    ) -> None:
        names = _columns_of(connection, table)
        number = row_number(names)
        if not names or number is None:
            what = "its rows have no numbers" if names else "it is not there"
            found.problems.append(Problem(str(path), f"table {table}", what))
            return
        rows = sum(run.row_count for run in runs)
        source = f"FROM {quoted(table)}"
        ((count,),) = connection.execute(f"SELECT COUNT(*) {source}").fetchall()
        if count > rows:
            told = f"{path}: {count - rows} rows of table {table} are recorded of nobody"
            found.notes.append(f"{told}: of an older version, or not ours")
            found.is_whole = False
        for run in runs:
            counted = f"SELECT COUNT(*) {source} WHERE {number} BETWEEN ? AND ?"
            ((there,),) = connection.execute(counted, run[2:4]).fetchall()
            if there == run.row_count:
                continue
            absent[run.stream] = absent.get(run.stream, 0) + run.row_count - there
            row = _first_absent(connection, f"{source} WHERE {number}", number, run)
            whose = f"of stream {run.stream:016x}"
            what = f"it is not there, nor are {run.row_count - there - 1} others of {run.row_count} {whose}"
            if run.row_count - there == 1:
                what = f"it is not there, one of {run.row_count} {whose}"
            found.problems.append(Problem(str(path), f"table {table}, row {row}", what))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database to be read, as of one moment."""
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_LIMIT_S, isolation_level=None
        )
    except sqlite3.Error as e:
        message = f"{path}: {e}"
        raise StoreError(message) from e
    try:
        connection.execute("BEGIN")
        yield connection
    except sqlite3.Error as e:
        message = f"{path}: {e}"
        raise StoreError(message) from e
    finally:
        connection.close()


def _runs_of(path: Path, connection: sqlite3.Connection) -> list[_Run]:
    columns = "table_name, first_row, last_row, stream, first_seq"
    found = connection.execute(f"SELECT {columns} FROM edgedaq_runs ORDER BY rowid").fetchall()  # noqa: S608 -- ours
    return [_Run(path, row[0], row[1], row[2], int(row[3], 16), row[4]) for row in found]


def _of_stream(runs: Iterable[_Run], stream: int) -> list[_Run]:
    return sorted((run for run in runs if run.stream == stream), key=lambda run: run.first_seq)


def _columns_of(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA table_info({quoted(table)})")]


def _first_absent(connection: sqlite3.Connection, source: str, number: str, run: _Run) -> int:
    """Return the number of the first row of a run that is not there; its rows are counted in halves."""
    low, high = run.first_row, run.last_row
    while low < high:
        middle = (low + high) // 2
        ((there,),) = connection.execute(
            f"SELECT COUNT({number}) {source} BETWEEN ? AND ?",
            (low, middle),
        ).fetchall()
        low, high = (low, middle) if there < middle - low + 1 else (middle + 1, high)
    return low


def _read(connection: sqlite3.Connection, run: _Run, info: OpenInfo, skip: int) -> Iterator[Placed]:
    """Yield the rows of a run, from so many on, with the types that they were put with."""
    held = _columns_of(connection, run.table)
    number = row_number(held)
    if number is None:
        return
    try:
        types = list(column_types(info).items())
    except WireError:
        types = []
    known = dict(zip(distinct(tuple(name for name, _ in types)), types, strict=True))
    query = f"SELECT {number}, * FROM {quoted(run.table)} WHERE {number} BETWEEN ? AND ? ORDER BY {number}"  # noqa: S608
    cursor = connection.execute(query, (run.first_row + skip, run.last_row))
    while rows := cursor.fetchmany(_ROWS_AT_ONCE):
        numbers, *columns = zip(*rows, strict=True)
        named = [known.get(name, (name, None)) for name in held]
        arrays: list[Any] = [typed(column, kind) for column, (_, kind) in zip(columns, named, strict=True)]
        table = pa.Table.from_arrays(arrays, names=[name for name, _ in named])
        yield Placed(f"{run.path}, table {run.table}", numbers, table)
