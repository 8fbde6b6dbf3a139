"""Tables of a MySQL database: their names and columns, which table takes which batch, and our own three.

A table that we make::

    edgedaq_id      BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY    the order of storing
    edgedaq_stream  BIGINT UNSIGNED NOT NULL                      whose row: edgedaq_streams.stream
    <column> ...                                                  those of the data, NULL: missing

    bool TINYINT(1) · i1..i8, u1..u8 TINYINT..BIGINT [UNSIGNED] · f4, f8 DOUBLE (MySQL shows a FLOAT with six
    digits) · timestamp BIGINT, UTC ns · text LONGTEXT · bytes, arrays of numbers LONGBLOB (``cells.py``)

A column's COMMENT says name, Arrow type and unit. A table that exists is used if it has these columns, of
these types; columns of its own must be able to stay empty, and it must not refuse equal rows (a UNIQUE key
would). Otherwise rows go to ``name_2``, ``name_3``, ...

Our own::

    edgedaq_stores   a row per store: its position in the journal, and the epoch of the process that may write
    edgedaq_streams  a row per stream: who it is, and its account as ``StreamState`` has it
    edgedaq_marks    what is said about data, like ``_marks.csv``
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.delivery import TOMBSTONES_MAX, StreamState
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.logsetup import get_logger
from edgedaq.store_config import DAQJobStoreConfigMySQL, check_table_name

from edgedaq_aggregator.stores.cells import CellKind, cell_kind
from edgedaq_aggregator.stores.mysql_session import Session
from edgedaq_aggregator.stores.watermarks import watermark_state

__all__ = [
    "COLUMNS_MAX",
    "OWN_TABLES",
    "Shape",
    "Tables",
    "committed_accounts",
    "quoted",
    "shape_of",
    "table_name",
]

COLUMNS_MAX = 1000
"""InnoDB has 1017; of numbers, a row of 8126 bytes comes first."""

OWN_TABLES = {
    "edgedaq_stores": """CREATE TABLE IF NOT EXISTS edgedaq_stores (
        store CHAR(16) CHARACTER SET ascii NOT NULL PRIMARY KEY,
        epoch BIGINT UNSIGNED NOT NULL,
        connection BIGINT UNSIGNED NOT NULL,
        position BIGINT UNSIGNED NULL
    ) ENGINE=InnoDB""",
    "edgedaq_streams": """CREATE TABLE IF NOT EXISTS edgedaq_streams (
        store CHAR(16) CHARACTER SET ascii NOT NULL,
        stream BIGINT UNSIGNED NOT NULL,
        node VARCHAR(255) NOT NULL,
        job VARCHAR(255) NOT NULL,
        job_type VARCHAR(255) NOT NULL,
        life CHAR(16) CHARACTER SET ascii NOT NULL,
        tag VARCHAR(255) NOT NULL,
        table_name VARCHAR(64) NOT NULL,
        opened_ns BIGINT NOT NULL,
        is_closed BOOLEAN NOT NULL,
        rows_stored BIGINT UNSIGNED NOT NULL,
        rows_missing BIGINT UNSIGNED NOT NULL,
        position BIGINT UNSIGNED NOT NULL,
        account BLOB NOT NULL,
        open LONGBLOB NOT NULL,
        PRIMARY KEY (store, stream),
        KEY (stream)
    ) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin""",
    "edgedaq_marks": """CREATE TABLE IF NOT EXISTS edgedaq_marks (
        id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
        t_utc_ns BIGINT NOT NULL,
        node VARCHAR(255) NOT NULL,
        job VARCHAR(255) NOT NULL,
        life CHAR(16) CHARACTER SET ascii NOT NULL,
        stream BIGINT UNSIGNED NOT NULL,
        tag VARCHAR(255) NOT NULL,
        kind VARCHAR(64) NOT NULL,
        first_seq BIGINT UNSIGNED NOT NULL,
        last_seq BIGINT NOT NULL,
        rows_missing BIGINT UNSIGNED NULL,
        reason LONGTEXT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin""",
}

_NAME_CHARS_MAX = 64
_NUMBER_CHARS = 4
_TABLES_MAX = 999
_RECHECK_S = 1.0
"""Someone may change a table at any time; MySQL rounds what then does not fit without a word."""
_INTS = {8: "tinyint", 16: "smallint", 32: "int", 64: "bigint"}
_TYPES = {
    CellKind.BOOL: "tinyint(1)",
    CellKind.FLOAT: "double",
    CellKind.TIME: "bigint",
    CellKind.TEXT: "longtext",
    CellKind.BYTES: "longblob",
    CellKind.ARRAY: "longblob",
}
_WIDTH = re.compile(r"\(\d+\)")


class Shape(NamedTuple):
    """The columns of batches: what their table must have. Equal shapes go to one table."""

    names: tuple[str, ...]
    """As they are called in the table."""
    types: tuple[str, ...]
    comments: tuple[str, ...]


def table_name(options: DAQJobStoreConfigMySQL) -> str:
    """Return the name that a table of ours is to have.

    Raises:
        ConfigError: MySQL does not take it, or it is one of our own.
    """
    name = check_table_name(options.table_name)
    room = _NAME_CHARS_MAX - _NUMBER_CHARS
    if len(name) > room or name != _bmp(name):
        message = f"table_name must have at most {room} characters, none beyond U+FFFF, got {name!r}"
        raise ConfigError(message)
    return name


def quoted(name: str) -> str:
    """Return an identifier as SQL."""
    return "`" + name.replace("`", "``") + "`"


def shape_of(schema: pa.Schema, units: dict[str, str]) -> Shape:
    """Return what a table of these columns needs; names that MySQL does not tell apart are numbered."""
    names: list[str] = []
    taken = {"edgedaq_id", "edgedaq_stream"}
    for field in schema:
        stem = (_bmp(field.name).rstrip() or "column")[:_NAME_CHARS_MAX]
        name, number = stem, 2
        while _folded(name) in taken:
            suffix = f"_{number}"
            name, number = stem[: _NAME_CHARS_MAX - len(suffix)] + suffix, number + 1
        taken.add(_folded(name))
        names.append(name)
    types = tuple(_type(field.type) for field in schema)
    comments = tuple(
        f"{f.name}: {f.type}{' ' if units.get(f.name) else ''}{units.get(f.name, '')}" for f in schema
    )
    return Shape(tuple(names), types, comments)


def committed_accounts(session: Session, store: str) -> list[StreamState]:
    """Return the accounts of a store's open streams and of those closed last, these first."""
    closed = session.rows(
        "SELECT account, open FROM edgedaq_streams WHERE store = %s AND is_closed "
        "ORDER BY position DESC LIMIT %s",
        store,
        TOMBSTONES_MAX,
    )
    still_open = session.rows(
        "SELECT account, open FROM edgedaq_streams WHERE store = %s AND NOT is_closed", store
    )
    found = []
    for account, opened in [*reversed(closed), *still_open]:
        try:
            found.append(watermark_state(account, opened))
        except WireError as e:
            get_logger().error("stream.unreadable", store="mysql", reason=str(e))
    return found


class Tables:
    """The tables of one database, as one connection knows them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[tuple[str, tuple[str, ...], tuple[str, ...]], tuple[str, float]] = {}
        self._log = get_logger().bind(store="mysql")

    def make_own(self) -> None:
        """Make our own tables where they are absent."""
        present = self._session.rows(
            "SELECT table_name FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_name LIKE %s",
            r"edgedaq\_%",
        )
        for name, statement in OWN_TABLES.items():
            if (name,) not in present:
                self._session.execute(statement)

    def locate(self, name: str, shape: Shape) -> str:
        """Return the table that takes rows of this shape; made if there is none. Ends a transaction."""
        key = (name, shape.names, shape.types)
        known, checked_s = self._known.get(key, ("", 0.0))
        now = time.monotonic()
        if known and now < checked_s + _RECHECK_S:
            return known
        found = self._find(name, shape)
        self._known[key] = found, now
        if found not in (name, known):
            self._log.warning("table.numbered", name=name, path=found, reason="other columns")
        return found

    def fits(self, table: str, shape: Shape) -> bool | None:
        """Tell whether a table takes rows of this shape; None where there is no such table."""
        kinds = self._session.rows(
            "SELECT engine, table_type FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_name = %s",
            table,
        )
        if not kinds:
            return None
        if (str(kinds[0][0]).lower(), kinds[0][1]) != ("innodb", "BASE TABLE"):
            return False
        found = self._session.rows(
            "SELECT column_name, column_type, is_nullable, column_default, extra FROM "
            "information_schema.columns WHERE table_schema = DATABASE() AND table_name = %s",
            table,
        )
        held = {_folded(row[0]): row for row in found}
        for column, kind in zip(
            ("edgedaq_stream", *shape.names), ("bigint unsigned", *shape.types), strict=True
        ):
            row = held.pop(_folded(column), None)
            if row is None or _WIDTH.sub("", str(row[1]).lower()) != _WIDTH.sub("", kind):
                return False
            if row[2] != "YES" and column != "edgedaq_stream":
                return False
        if any(
            row[2] != "YES" and row[3] is None and "auto_increment" not in row[4] for row in held.values()
        ):
            return False
        unique = self._session.rows(
            "SELECT column_name FROM information_schema.statistics "
            "WHERE table_schema = DATABASE() AND table_name = %s AND non_unique = 0",
            table,
        )
        return {_folded(row[0]) for row in unique} <= {"edgedaq_id"}

    def _find(self, name: str, shape: Shape) -> str:
        for number in range(1, _TABLES_MAX + 1):
            table = name if number == 1 else f"{name}_{number}"
            fits = self.fits(table, shape)
            if fits:
                return table
            if fits is None:
                self._session.execute(_create(table, shape))
                return table
        message = f"{_TABLES_MAX} tables {name!r} have other columns"
        raise StoreError(message)


def _create(table: str, shape: Shape) -> str:
    columns = [
        f"{quoted(name)} {kind.upper()} NULL COMMENT {_literal(comment[:1000])}"
        for name, kind, comment in zip(*shape, strict=True)
    ]
    return (
        f"CREATE TABLE {quoted(table)} (edgedaq_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY, "
        f"edgedaq_stream BIGINT UNSIGNED NOT NULL, {', '.join(columns)}) "
        "ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin"
    )


def _type(kind: Any) -> str:
    form = cell_kind(kind)
    if form is CellKind.INT:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        unsigned = " unsigned" if pa.types.is_unsigned_integer(kind) else ""
        return _INTS[kind.bit_width] + unsigned
    return _TYPES[form]


def _literal(text: str) -> str:
    return "'" + _bmp(text).replace("\\", "\\\\").replace("'", "''") + "'"


def _bmp(text: str) -> str:
    """Return a text with ``_`` for what an identifier of MySQL cannot have."""
    return "".join("_" if ord(char) > 0xFFFF or char == "\0" else char for char in text)


def _folded(name: Sequence[str] | str) -> str:
    return str(name).casefold()
