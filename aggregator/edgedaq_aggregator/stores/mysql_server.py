"""A MySQL server as a store: one transaction per commit has rows, marks and watermarks.

What a table looks like is drawn in ``mysql_tables.py``, what is sent in ``mysql_rows.py``. A commit::

    (tables that are missing are made before: DDL ends a transaction)
    BEGIN
      UPDATE edgedaq_stores  position, where it is still what this process committed last, at its epoch
      LOAD DATA LOCAL ...    one per piece of up to 10k rows; INSERT of many rows where the server has it off
      INSERT edgedaq_marks, edgedaq_streams
    COMMIT

Each process of a store that connects raises the epoch, under the row lock that every transaction takes first:
it waits until the fate of an earlier one is known, and no commit of an earlier process can follow.

Where the server flushes its log later than at the commit, the journal keeps what is not flushed: until the
server's LSN has passed it, or, where it does not tell, for ``_UNTOLD_S``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.frame import Frame
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.store_config import DAQJobStoreConfigMySQL

from edgedaq_aggregator.stores.backend import Recovered
from edgedaq_aggregator.stores.marks import Mark
from edgedaq_aggregator.stores.mysql_rows import (
    Rows,
    has_infinity,
    insert_statements,
    lines,
    load_statement,
    rows_of,
)
from edgedaq_aggregator.stores.mysql_session import DAQJobStoreMySQLConfig, DataError, Session, Traits
from edgedaq_aggregator.stores.mysql_tables import (
    COLUMNS_MAX,
    Tables,
    committed_accounts,
    shape_of,
    table_name,
)
from edgedaq_aggregator.stores.server_backend import Load, LoadRefusedError, Work
from edgedaq_aggregator.stores.settling import Settling
from edgedaq_aggregator.stores.tables import TableDecoder
from edgedaq_aggregator.stores.watermarks import table_of, watermark

__all__ = ["MySQLServer", "weakness_text"]

_UNTOLD_S = 60.0
_ASK_S = 1.0
_MARK = (
    "INSERT INTO edgedaq_marks (t_utc_ns, node, job, life, stream, tag, kind, first_seq, last_seq, "
    "rows_missing, reason)"
)
_STREAM = (
    "INSERT INTO edgedaq_streams (store, stream, node, job, job_type, life, tag, table_name, opened_ns, "
    "is_closed, rows_stored, rows_missing, position, account, open)"
)
_STREAM_UPDATE = (
    "UPDATE edgedaq_streams SET is_closed = %s, rows_stored = %s, rows_missing = %s, position = %s, "
    "account = %s WHERE store = %s AND stream = %s"
)


@dataclass(slots=True)
class _Destination:
    table: str
    decoder: TableDecoder
    units: dict[str, str]
    has_converted: bool = False


class _Payload(NamedTuple):
    table: str
    rows: Rows
    lines: memoryview


class MySQLServer:
    """See ``Server``."""

    key = "mysql"

    def __init__(self, config: DAQJobStoreMySQLConfig) -> None:
        self._config = config
        self._log = get_logger().bind(store="mysql", server=config.place)
        self._session: Session | None = None
        self._watch: Session | None = None
        self._asked_s = 0.0

    def connect(self, store: str) -> Recovered:
        """See ``Server``."""
        session = self._session = Session(self._config)
        self._store = store
        self._traits = session.traits()
        self._settling = Settling()
        self._tables = Tables(session)
        self._tables.make_own()
        self._epoch, position = self._begin_epoch(session)
        found = committed_accounts(session, self._store)
        session.rollback()
        self._known = {account.stream for account in found}
        if self._traits.weakness:
            self._log.warning("store.weak", reason=weakness_text(self._traits))
        self._settle(session, position)
        return Recovered(table_of(found), position)

    def destination(self, stream: int, info: OpenInfo) -> _Destination:  # noqa: ARG002 -- a table has all
        """See ``Server``."""
        try:
            options = msgspec.convert(info.store_config.get(self.key), DAQJobStoreConfigMySQL)
        except msgspec.ValidationError as e:
            message = f"store_config.mysql: {e}"
            raise ConfigError(message) from e
        return self._destination(table_name(options), info)

    def refuge(self, stream: int, info: OpenInfo) -> tuple[_Destination, str]:
        """See ``Server``."""
        name = f"refused_{stream:016x}"
        return self._destination(name, info), name

    def encode(self, destination: _Destination, frames: Sequence[Frame]) -> list[tuple[int, Any]]:
        """See ``Server``."""
        found: list[tuple[int, Any]] = []
        for batch in destination.decoder.batches(frames):
            if batch.num_columns > COLUMNS_MAX:
                message = f"a table in MySQL has at most {COLUMNS_MAX} columns, got {batch.num_columns}"
                raise WireError(message)
            if not destination.has_converted and has_infinity(batch):
                destination.has_converted = True
                self._log.warning("values.converted", path=destination.table, reason="MySQL has no infinity")
            rows = rows_of(batch, shape_of(batch.schema, destination.units))
            if batch.num_rows:
                data = lines(rows) if self._traits.has_load_data else memoryview(b"")
                found.append((rows.row_count, _Payload(destination.table, rows, data)))
        return found

    def commit(self, work: Work) -> None:
        """See ``Server``."""
        session = self._live
        tables = {self._where(load): load for load in work.loads}
        located = {key: self._tables.locate(*key) for key in tables}
        session.rollback()  # asking for tables has begun a transaction, whose view of the data is old
        try:
            taken = session.execute(
                "UPDATE edgedaq_stores SET position = %s WHERE store = %s AND epoch = %s AND position <=> %s",
                work.position,
                self._store,
                self._epoch,
                work.before,
            )
            if taken != 1:
                message = "another process writes as this store, or the database was set back"
                raise StoreError(message)
            for load in work.loads:
                self._load(session, load, located[self._where(load)])
            if work.marks:
                session.insert(
                    f"{_MARK} VALUES ({', '.join(['%s'] * 11)})", [_mark_row(mark) for mark in work.marks]
                )
            self._put_accounts(session, work)
        except DataError as e:
            raise StoreError(str(e)) from e
        session.commit()
        self._known.update(account.stream for account in work.accounts)
        self._settle(session, work.position)

    def durable_position(self) -> int | None:
        """See ``Server``; asks the server, by a connection of its own, at most once a second."""
        if self._traits.weakness and time.monotonic() >= self._asked_s + _ASK_S:
            self._asked_s = time.monotonic()
            if self._traits.has_lsn:
                if self._watch is None:
                    self._watch = Session(self._config)
                self._settling.reach(self._watch.flushed_lsn() or 0)
            else:
                self._settling.reach(self._asked_s - _UNTOLD_S)
        return self._settling.durable_position

    def facts(self) -> dict[str, Any]:
        """See ``Server``."""
        told = {"server": f"{self._config.place} {self._traits.version}"}
        return {**told, "weak": self._traits.weakness} if self._traits.weakness else told

    def close(self) -> None:
        """See ``Server``."""
        for session in (self._session, self._watch):
            if session is not None:
                session.close()
        self._session = self._watch = None

    @property
    def _live(self) -> Session:
        if self._session is None:
            message = "a backend must be recovered before it is used"
            raise RuntimeError(message)
        return self._session

    def _destination(self, table: str, info: OpenInfo) -> _Destination:
        units = {column.name: column.unit for column in info.schema.columns} if info.schema else {}
        return _Destination(table, TableDecoder(info), units)

    def _begin_epoch(self, session: Session) -> tuple[int, int | None]:
        """Keep earlier processes out; return the new epoch and the position that is committed."""
        if not session.rows("SELECT 1 FROM edgedaq_stores WHERE store = %s", self._store):
            session.execute("INSERT INTO edgedaq_stores VALUES (%s, 0, 0, NULL)", self._store)
        session.commit()
        try:
            ((epoch, position),) = session.rows(
                "SELECT epoch, position FROM edgedaq_stores WHERE store = %s FOR UPDATE", self._store
            )
        except StoreError:
            self._end_earlier()
            raise
        session.execute(
            "UPDATE edgedaq_stores SET epoch = %s, connection = CONNECTION_ID() WHERE store = %s",
            epoch + 1,
            self._store,
        )
        session.commit()
        return epoch + 1, position

    def _end_earlier(self) -> None:
        """End the connection of an earlier process, whose transaction the server still holds open."""
        session = Session(self._config)
        try:
            for (connection,) in session.rows(
                "SELECT s.connection FROM edgedaq_stores s JOIN information_schema.processlist p "
                "ON p.id = s.connection AND p.user = SUBSTRING_INDEX(CURRENT_USER(), '@', 1) "
                "WHERE s.store = %s",
                self._store,
            ):
                self._log.warning("connection.ended", id=connection, reason="it holds the store's row")
                session.execute(f"KILL CONNECTION {int(connection)}")
        finally:
            session.close()

    def _where(self, load: Load) -> tuple[str, Any]:
        payload: _Payload = load.payload
        return payload.table, payload.rows.shape

    def _load(self, session: Session, load: Load, table: str) -> None:
        payload: _Payload = load.payload
        rows = payload.rows
        try:
            if self._traits.has_load_data:
                session.load(load_statement(table, rows.shape, load.stream), [payload.lines], rows.row_count)
                return
            for statement in insert_statements(table, rows, load.stream, self._traits.packet_bytes):
                session.execute_bytes(statement, self._traits.packet_bytes)
        except DataError as e:
            session.rollback()
            if not self._tables.fits(table, rows.shape):
                message = f"table {table!r} was changed meanwhile: {e}"
                raise StoreError(message) from e
            raise LoadRefusedError(load, str(e)) from e

    def _put_accounts(self, session: Session, work: Work) -> None:
        fresh, known = [], []
        for account in work.accounts:
            counts = (account.closed, account.rows, account.gap_rows, work.position or 0, watermark(account))
            info = work.infos.get(account.stream)
            if account.stream in self._known or info is None:
                known.append((*counts, self._store, account.stream))
                continue
            options = info.store_config.get(self.key)
            name = str(options.get("table_name", ""))[:64] if isinstance(options, dict) else ""
            who = (info.node, info.job, info.job_type, info.life, info.tag, name, info.t_open_ns)
            fresh.append((self._store, account.stream, *who, *counts, account.open_raw))
        if fresh:
            session.insert(f"{_STREAM} VALUES ({', '.join(['%s'] * 15)})", fresh)
        for values in known:
            session.execute(_STREAM_UPDATE, *values)

    def _settle(self, session: Session, position: int | None) -> None:
        if not self._traits.weakness:
            self._settling.durable_position = position
        elif self._traits.has_lsn:
            self._settling.add(session.current_lsn() or 0, position)
            session.rollback()
        else:
            self._settling.add(time.monotonic(), position)


def weakness_text(traits: Traits) -> str:
    """Say what a server's settings mean for what is stored there."""
    until = "it says that they are flushed" if traits.has_lsn else f"{_UNTOLD_S:.0f} s have passed"
    told = "commits may be lost with the server's machine"
    return f"{traits.weakness}: {told}; the journal keeps them until {until}"


def _mark_row(mark: Mark) -> tuple[Any, ...]:
    info = mark.info
    reason = mark.reason.encode("utf-8", "backslashreplace").decode()
    who = (mark.t_utc_ns, info.node, info.job, info.life, mark.stream, info.tag)
    return (*who, mark.kind, mark.first_seq, mark.last_seq, mark.rows, reason)
