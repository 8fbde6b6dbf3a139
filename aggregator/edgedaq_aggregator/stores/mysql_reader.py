"""Tables of a MySQL server, read again: rows by their stream, in the order of ``edgedaq_id``.

Rows have no digests there; values are compared with what the journal has, older rows are counted. A stream
whose rows lie in several tables (its columns changed) is counted only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.clock import iso_utc
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.alike import Group, Placed, info_of
from edgedaq_aggregator.stores.column_types import column_types, typed
from edgedaq_aggregator.stores.compared import accounts_of, compare, sum_marks
from edgedaq_aggregator.stores.marks import MARKS_COLUMNS
from edgedaq_aggregator.stores.mysql_session import DAQJobStoreMySQLConfig, Session
from edgedaq_aggregator.stores.mysql_tables import committed_accounts, quoted, shape_of
from edgedaq_aggregator.stores.reader import Checked, Part, Retained, StorePlace
from edgedaq_aggregator.stores.server_backend import known_store_id
from edgedaq_aggregator.stores.server_config import config_of
from edgedaq_aggregator.stores.watermarks import table_of

__all__ = ["MySQLReader"]

_ROWS_AT_ONCE = 10_000
_MARKS = (
    "SELECT t_utc_ns, node, job, life, stream, tag, kind, first_seq, last_seq, rows_missing, reason "
    "FROM edgedaq_marks ORDER BY id"
)


class _Run(NamedTuple):
    """The rows of a stream in one table."""

    table: str
    stream: int
    row_count: int
    first_id: int
    last_id: int


class MySQLReader:
    """See ``StoreReader``.

    Raises:
        StoreError: The server cannot be asked, or nobody knows where it is.
    """

    def __init__(self, place: StorePlace) -> None:
        self._config = config_of(place, DAQJobStoreMySQLConfig)
        self._id = known_store_id(place.state_dir)
        self.position: int | None = None
        self.table = StreamTable()
        if self._id:
            with self._snapshot() as session:
                self.table = table_of(committed_accounts(session, self._id))
                found = session.rows("SELECT position FROM edgedaq_stores WHERE store = %s", self._id)
                self.position = found[0][0] if found else None
        self._accounts = accounts_of(self.table)

    def check(self, retained: Retained) -> Checked:
        """See ``StoreReader``."""
        found = Checked()
        if not self._id:
            return found
        with self._snapshot() as session:
            runs = self._runs(session)
            now = accounts_of(table_of(committed_accounts(session, self._id)))
            marks = self._marks(session)
            sum_marks(marks, found)
            groups = []
            for stream, account in self._accounts.items():
                of_stream = [run for run in runs if run.stream == stream]
                newer = now[stream].rows - account.rows if stream in now else 0
                there = sum(run.row_count for run in of_stream) - newer
                found.rows[stream] = there
                if len(of_stream) == 1:
                    groups.append(self._group(session, of_stream[0], there))
                else:
                    found.counted += there
            compare(groups, self.table, marks, retained, found)
        return found

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """See ``StoreReader``."""
        with self._snapshot() as session:
            for run in self._runs(session):
                account = self._accounts[run.stream]
                left = account.rows
                for placed in _read(session, run, info_of(account), 0) if run.stream in streams else ():
                    table = placed.table.slice(0, left)
                    left -= table.num_rows
                    if table.num_rows:
                        yield Part((run.stream,), table)

    def marks(self) -> list[dict[str, str]]:
        """See ``StoreReader``."""
        if not self._id:
            return []
        with self._snapshot() as session:
            return self._marks(session)

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Session]:
        """Connect, and see everything as of now."""
        session = Session(self._config)
        try:
            session.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
            yield session
        finally:
            session.close()

    def _marks(self, session: Session) -> list[dict[str, str]]:
        found = []
        for t_utc_ns, *told in session.rows(_MARKS):
            if told[3] in self._accounts:
                told[3] = f"{told[3]:016x}"
                texts = [iso_utc(t_utc_ns), *("" if value is None else str(value) for value in told)]
                found.append(dict(zip(MARKS_COLUMNS, texts, strict=True)))
        return found

    def _runs(self, session: Session) -> list[_Run]:
        """Return where the rows of each stream are, in the order in which they were stored."""
        named: dict[str, set[int]] = {}
        wanted = session.rows("SELECT stream, table_name FROM edgedaq_streams WHERE store = %s", self._id)
        for stream, name in wanted:
            for table in {name, f"refused_{stream:016x}"}:
                named.setdefault(table, set()).add(stream)
        found: list[_Run] = []
        for table in _tables(session):
            base, _, number = table.rpartition("_")
            streams = named.get(table, set()) | (named.get(base, set()) if number.isdigit() else set())
            if not streams:
                continue
            counted = session.rows(
                "SELECT edgedaq_stream, COUNT(*), MIN(edgedaq_id), MAX(edgedaq_id) "  # noqa: S608 -- quoted
                f"FROM {quoted(table)} GROUP BY edgedaq_stream"
            )
            found += [_Run(table, *row) for row in counted if row[0] in streams & set(self._accounts)]
        return sorted(found, key=lambda run: (run.table, run.first_id))

    def _group(self, session: Session, run: _Run, there: int) -> Group:
        info = info_of(self._accounts[run.stream])
        where = f"{self._config.place}, database {self._config.database}, table {run.table}"

        def read(skip: int) -> Iterator[Placed]:
            for placed in _read(session, run, info, skip):
                yield placed._replace(where=where)

        return Group((run.stream,), where, there, read, math.isfinite)


def _tables(session: Session) -> list[str]:
    found = session.rows(
        "SELECT c.table_name FROM information_schema.columns c JOIN information_schema.tables t "
        "USING (table_schema, table_name) WHERE c.table_schema = DATABASE() "
        "AND c.column_name = 'edgedaq_stream' AND t.table_type = 'BASE TABLE' ORDER BY c.table_name"
    )
    return [str(row[0]) for row in found]


def _read(session: Session, run: _Run, info: OpenInfo | None, skip: int) -> Iterator[Placed]:
    """Yield the rows of a stream in a table, from so many on, with the types that they were put with."""
    try:
        types = {} if info is None else column_types(info)
    except WireError:
        types = {}
    schema = pa.schema(list(types.items()))
    known = dict(zip(shape_of(schema, {}).names, types.items(), strict=True))
    columns = session.rows(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = DATABASE() "
        "AND table_name = %s ORDER BY ordinal_position",
        run.table,
    )
    names = [str(row[0]) for row in columns if row[0] not in ("edgedaq_id", "edgedaq_stream")]
    names = [name for name in names if not known or name in known]
    wanted = ", ".join(quoted(name) for name in ("edgedaq_id", *names)).replace("%", "%%")
    query = (
        f"SELECT {wanted} FROM {quoted(run.table).replace('%', '%%')} WHERE edgedaq_stream = %s "  # noqa: S608 -- quoted
        "AND edgedaq_id BETWEEN %s AND %s ORDER BY edgedaq_id LIMIT %s"
    )
    first = run.first_id
    while rows := session.rows(query, run.stream, first, run.last_id, _ROWS_AT_ONCE):
        first = rows[-1][0] + 1
        rows, skip = rows[skip:], max(skip - len(rows), 0)
        if not rows:
            continue
        ids, *values = zip(*rows, strict=True)
        named = [known.get(name, (name, None)) for name in names]
        arrays: list[Any] = [typed(column, kind) for column, (_, kind) in zip(values, named, strict=True)]
        table = pa.Table.from_arrays(arrays, names=[name for name, _ in named])
        yield Placed(f"table {run.table}", ids, table)
