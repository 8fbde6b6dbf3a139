r"""Batches to what MySQL reads: lines for LOAD DATA, or the VALUES of INSERT where that is switched off.

A line is the cells (``cells.py``) between tabs, ``\N`` where one is missing; backslash, tab and line break
in a text are ``\\``, ``\t``, ``\n``. MySQL has no ``nan`` and no infinity: both are stored as missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from edgedaq_aggregator.stores.cells import CellKind, back_to_back, cell_kind, cells, joined, scalar
from edgedaq_aggregator.stores.mysql_tables import Shape, quoted

__all__ = ["Rows", "has_infinity", "insert_statements", "lines", "load_statement", "rows_of"]

pc: Any = pyarrow.compute  # its types know neither cells nor plain numbers beside arrays

_PLAIN = (CellKind.BOOL, CellKind.INT, CellKind.FLOAT, CellKind.TIME)
_SPECIAL = ((b"\\", b"\\\\"), (b"\t", b"\\t"), (b"\n", b"\\n"))
_QUOTES = ((b"\\", b"\\\\"), (b"'", b"\\'"), (b"\0", b"\\0"))
_STATEMENT_BYTES_MAX = 1 << 20
_STATEMENT_SLACK = 1 << 12


class Rows(NamedTuple):
    """The cells of one batch, in the columns of its table."""

    shape: Shape
    columns: list[Any]
    kinds: list[CellKind]
    row_count: int


def rows_of(batch: pa.RecordBatch, shape: Shape) -> Rows:
    """Return the cells of a batch.

    Raises:
        WireError: A value has no form as a cell.
    """
    kinds = [cell_kind(field.type) for field in batch.schema]
    columns = []
    for column, kind in zip(batch.columns, kinds, strict=True):
        if kind is CellKind.FLOAT:
            is_finite = pc.is_finite(column.cast(pa.float64()))
            if not pc.all(is_finite).as_py():
                column = pc.if_else(is_finite, column, None)  # noqa: PLW2901
        columns.append(cells(column))
    return Rows(shape, columns, kinds, batch.num_rows)


def has_infinity(batch: pa.RecordBatch) -> bool:
    """Tell whether a number of a batch is infinite, which is missing once it is stored."""
    floats = [column for column in batch.columns if cell_kind(column.type) is CellKind.FLOAT]
    return any(pc.any(pc.is_inf(column.cast(pa.float64()))).as_py() for column in floats)


def load_statement(table: str, shape: Shape, stream: int) -> str:
    """Return the LOAD DATA that takes ``lines``."""
    names = ", ".join(map(quoted, shape.names))
    return (
        f"LOAD DATA LOCAL INFILE 'edgedaq' INTO TABLE {quoted(table)} CHARACTER SET binary "
        r"FIELDS TERMINATED BY '\t' ESCAPED BY '\\' LINES TERMINATED BY '\n' "
        f"({names}) SET edgedaq_stream = {stream}"
    )


def lines(rows: Rows) -> memoryview:
    """Return the lines of rows, back to back in one buffer."""
    columns = [
        column if kind in _PLAIN else _escaped(column, _SPECIAL)
        for column, kind in zip(rows.columns, rows.kinds, strict=True)
    ]
    columns = [pc.fill_null(column, scalar(b"\\N")) if column.null_count else column for column in columns]
    columns[-1] = joined(columns[-1], b"\n")
    whole = joined(*columns, between=b"\t") if len(columns) > 1 else columns[0]
    return back_to_back(whole)


def insert_statements(table: str, rows: Rows, stream: int, packet_bytes: int) -> Iterator[bytes]:
    """Yield INSERTs of many rows each, none larger than the server takes unless one row is."""
    names = ", ".join(map(quoted, rows.shape.names))
    head = f"INSERT INTO {quoted(table)} (edgedaq_stream, {names}) VALUES ".encode()  # noqa: S608 -- quoted
    columns = []
    for column, kind in zip(rows.columns, rows.kinds, strict=True):
        if kind in _PLAIN:
            literal = column
        else:
            opening = b"'" if kind is CellKind.TEXT else b"_binary'"
            literal = joined(opening, _escaped(column, _QUOTES), b"'")
        columns.append(pc.fill_null(literal, scalar(b"NULL")) if literal.null_count else literal)
    columns[-1] = joined(columns[-1], b")")
    values = joined(b"(%d" % stream, *columns, between=b",").to_pylist()
    room = min(_STATEMENT_BYTES_MAX, packet_bytes - _STATEMENT_SLACK) - len(head)
    held: list[bytes] = []
    size = 0
    for value in values:
        if held and size + len(value) + 1 > room:
            yield head + b",".join(held)
            held, size = [], 0
        held.append(value)
        size += len(value) + 1
    yield head + b",".join(held)


def _escaped(column: Any, pairs: tuple[tuple[bytes, bytes], ...]) -> Any:
    for pattern, replacement in pairs:
        if pc.any(pc.match_substring(column, pattern)).as_py():
            column = pc.replace_substring(column, pattern, replacement)
    return column
