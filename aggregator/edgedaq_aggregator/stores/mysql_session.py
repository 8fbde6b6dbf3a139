"""One connection to a MySQL or MariaDB server: transactions, LOAD DATA from memory, what it says of itself.

LOAD DATA LOCAL lets the server name the file that it wants. This client never opens one: it answers with the
bytes that it was given for that statement, and refuses the request after any other.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import pymysql
from edgedaq.errors import ConfigError, StoreError
from pymysql.constants import CLIENT, COMMAND, CR, ER

from edgedaq_aggregator.stores.server_config import ServerStoreConfig, read_password

__all__ = ["DAQJobStoreMySQLConfig", "DataError", "Session", "Traits"]

_PORT = 3306
_CHUNK_BYTES = 256 << 10
_LOCK_WAIT_S = 5
_CONNECT_LIMIT_S = 10.0
_CONNECTION_LOST = (CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST, CR.CR_CONN_HOST_ERROR, CR.CR_CONNECTION_ERROR)
_TABLE_FULL = 1114
_TOO_BIG_ROW = 1118
_PACKET_TOO_LARGE = 1153
_WRONG_VALUE = 1366
_CHECK_VIOLATED = (3819, 4025)
_DATA_ERRORS = {
    ER.DUP_ENTRY,
    ER.DATA_TOO_LONG,
    ER.BAD_NULL_ERROR,
    ER.WARN_DATA_OUT_OF_RANGE,
    ER.NO_DEFAULT_FOR_FIELD,
    ER.TRUNCATED_WRONG_VALUE,
    _TOO_BIG_ROW,
    _PACKET_TOO_LARGE,
    _WRONG_VALUE,
    *_CHECK_VIOLATED,
}


class DAQJobStoreMySQLConfig(ServerStoreConfig, kw_only=True, forbid_unknown_fields=True):
    """``database`` must exist; the account needs CREATE, SELECT, INSERT and UPDATE in it."""

    database: str


class DataError(Exception):
    """The server does not take rows for what they are."""


class Traits(NamedTuple):
    """What a server says of itself."""

    version: str
    has_load_data: bool
    packet_bytes: int
    weakness: str
    """Why a commit may be lost with the server's machine; empty: it is durable when it returns."""
    has_lsn: bool
    """The weakness passes, and the server tells when: its log's flushed position."""


class Session:
    """One connection, with a transaction open or not. Not for two threads at a time.

    Raises:
        StoreError: The server cannot be reached, or refuses us.
    """

    def __init__(self, config: DAQJobStoreMySQLConfig) -> None:
        try:
            self._connection = _Connection(
                host=config.host,
                port=config.port or _PORT,
                unix_socket=config.unix_socket or None,
                user=config.user or None,
                password=read_password(config),
                database=config.database,
                charset="utf8mb4",
                defer_connect=True,
                read_timeout=config.timeout,
                write_timeout=config.timeout,
                ssl_ca=config.tls_ca or None,
                ssl_verify_identity=bool(config.tls_ca),
                client_flag=CLIENT.LOCAL_FILES | CLIENT.FOUND_ROWS,
                init_command=(
                    "SET SESSION sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', autocommit=0, "
                    f"innodb_lock_wait_timeout={_LOCK_WAIT_S}, foreign_key_checks=1, unique_checks=1"
                ),
            )
            self._connection.dial(min(config.timeout, _CONNECT_LIMIT_S))
        except ConfigError as e:
            raise StoreError(str(e)) from e
        except (pymysql.MySQLError, OSError, RuntimeError) as e:
            message = f"the server at {config.place} does not let us in: {_told(e)}"
            raise StoreError(message) from e

    def traits(self) -> Traits:
        """Ask the server about itself."""
        names = "@@version, @@local_infile, @@max_allowed_packet, @@innodb_flush_log_at_trx_commit, @@log_bin"
        ((version, local_infile, packet, flush, has_binlog),) = self.rows(f"SELECT {names}")
        sync = self.rows("SELECT @@sync_binlog")[0][0] if has_binlog else 1
        weakness, has_lsn = "", False
        if int(flush) not in (1, 3):
            weakness = f"innodb_flush_log_at_trx_commit is {flush}"
            has_lsn = int(sync) == 1 and self.flushed_lsn() is not None
        if int(sync) != 1:
            weakness = f"{weakness} and " if weakness else ""
            weakness += f"sync_binlog is {sync}"
        return Traits(str(version), bool(local_infile), int(packet), weakness, has_lsn)

    def current_lsn(self) -> int | None:
        """Return up to where the server's log goes."""
        return self._status("Innodb_lsn_current", "Innodb_redo_log_current_lsn")

    def flushed_lsn(self) -> int | None:
        """Return up to where the server's log is on its disk."""
        return self._status("Innodb_lsn_flushed", "Innodb_redo_log_flushed_to_disk_lsn")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Raises:
            StoreError: It fails.
        """
        return self._run(query, values)[1]

    def execute(self, statement: str, *values: Any) -> int:
        """Return how many rows a statement found, changed or not.

        Raises:
            DataError: Rows are refused for what they are.
            StoreError: Anything else.
        """
        return self._run(statement, values)[0]

    def insert(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one INSERT ... VALUES with many rows, like ``execute``."""
        try:
            with self._connection.cursor() as cursor:
                cursor.executemany(statement, rows)
        except (pymysql.MySQLError, OSError) as e:
            raise _error(e) from e

    def execute_bytes(self, statement: bytes, packet_bytes: int) -> None:
        """Run one statement that may hold any bytes, like ``execute``; a server hangs up on larger ones."""
        if len(statement) >= packet_bytes:
            message = f"a row of {len(statement)} bytes is larger than max_allowed_packet"
            raise DataError(message)
        try:
            self._connection.query(statement)
        except (pymysql.MySQLError, OSError) as e:
            raise _error(e) from e

    def load(self, statement: str, data: Sequence[Any], rows: int) -> None:
        """Run one LOAD DATA LOCAL with these bytes.

        Raises:
            DataError: Not all rows were taken exactly as they are.
            StoreError: Anything else.
        """
        try:
            taken, warnings = self._connection.load(statement, data)
        except (pymysql.MySQLError, OSError) as e:
            raise _error(e) from e
        if warnings or taken != rows:
            told = self.rows("SHOW WARNINGS LIMIT 1") if warnings else []
            message = f"{taken} of {rows} rows were taken"
            raise DataError(f"{message}: {told[0][2]}" if told else message)

    def commit(self) -> None:
        """End the transaction; after an error nobody knows how, until the server is asked anew."""
        try:
            self._connection.commit()
        except (pymysql.MySQLError, OSError) as e:
            raise _error(e) from e

    def rollback(self) -> None:
        """Void the transaction."""
        try:
            self._connection.rollback()
        except (pymysql.MySQLError, OSError) as e:
            raise _error(e) from e

    def close(self) -> None:
        """End the connection, and with it what is not committed."""
        try:
            self._connection.close()
        except (pymysql.MySQLError, OSError):
            return  # it was gone

    def _run(self, statement: str, values: tuple[Any, ...]) -> tuple[int, list[tuple[Any, ...]]]:
        try:
            with self._connection.cursor() as cursor:
                found = cursor.execute(statement, values or None)
                return found, list(cursor.fetchall())
        except (pymysql.MySQLError, OSError, RuntimeError) as e:  # the last: asked for a file
            raise _error(e) from e

    def _status(self, *names: str) -> int | None:
        wanted = ", ".join(f"'{name}'" for name in names)
        found = self.rows(f"SHOW GLOBAL STATUS WHERE Variable_name IN ({wanted})")
        return int(found[0][1]) if found else None


class _Connection(pymysql.connections.Connection):  # type: ignore[misc]  # it has no types
    """PyMySQL's, with a LOAD DATA LOCAL whose data lies in memory. Its own, of files, stays off."""

    def dial(self, limit_s: float) -> None:
        """Connect; a socket that finds nobody is closed."""
        if self.unix_socket:
            dialled = socket.socket(socket.AF_UNIX)
            self._secure = True
        else:
            dialled = socket.create_connection((self.host, self.port), limit_s)
        try:
            if self.unix_socket:
                dialled.settimeout(limit_s)
                dialled.connect(self.unix_socket)
            else:
                dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.connect(dialled)
        except BaseException:
            dialled.close()
            raise

    def load(self, statement: str, data: Sequence[Any]) -> tuple[int, int]:
        """Return how many rows were taken, and how many warnings there are."""
        self._execute_command(COMMAND.COM_QUERY, statement)
        packet = self._read_packet()
        if not packet.is_load_local_packet():
            message = "the server did not ask for the rows of a LOAD DATA LOCAL"
            raise pymysql.OperationalError(CR.CR_SERVER_LOST, message)
        for buffer in data:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _CHUNK_BYTES):
                self.write_packet(bytes(view[start : start + _CHUNK_BYTES]))
        self.write_packet(b"")
        done = pymysql.connections.OKPacketWrapper(self._read_packet())
        return int(done.affected_rows), int(done.warning_count)


def _error(e: Exception) -> Exception:
    code = e.args[0] if isinstance(e, pymysql.MySQLError) and e.args else None
    if code in _DATA_ERRORS:
        return DataError(_told(e))
    if code in _CONNECTION_LOST or not isinstance(e, pymysql.MySQLError):
        return StoreError(f"the connection to the server is lost: {_told(e)}")
    return StoreError(_told(e))


def _told(e: Exception) -> str:
    """Return what a server says, on one line, without what differs from time to time."""
    text = str(e.args[1]) if isinstance(e, pymysql.MySQLError) and len(e.args) > 1 else str(e)
    return re.sub(r"\s+", " ", text)[:500]
