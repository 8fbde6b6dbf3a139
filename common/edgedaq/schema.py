"""Rows and columns to frame bodies and back, in pure Python.

Two bodies hold a table without pyarrow:

PACKED   rows of fixed width back to back (see ``columns.py``); nothing can be missing in it.
COLUMNS  the general case, a msgpack map::

    {"columns": [[value | nil, ...], ...],      one list per column of the schema, in its order, equally long
     "dtypes":  {name: dtype text}}             columns that hold, in this frame, another dtype than OPEN says

    bool     bool          utf8, bytes   str, bin
    i*, u*   int           timestamp     int (UTC ns)
    f*       float         arrays        bin: the elements, little-endian, C order

A value that its column cannot hold never stops an experiment: the frame becomes COLUMNS, and the column is
widened in that frame (``dtypes.widen``); text holds what nothing else does.

``Schema``, ``Column``, ``OpenInfo`` and what belongs to them are offered here too: a producer needs only this
module and ``frame``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgedaq.columns import Column, Schema
from edgedaq.dtypes import INT_RANGES, SIZES, widen
from edgedaq.errors import JobError, WireError
from edgedaq.frame import pack_map, unpack_map
from edgedaq.open_info import OpenInfo, decode_open, encode_open
from edgedaq.values import EXACT_TYPES, MISFIT, array_bytes, array_values, convert_bool, fit_values, nest

__all__ = [
    "MISFIT",
    "Column",
    "OpenInfo",
    "Schema",
    "array_bytes",
    "array_values",
    "decode_columns",
    "decode_open",
    "encode_columns",
    "encode_open",
    "pack_columns",
    "pack_rows",
    "row_packer",
    "split_columns",
    "to_columns",
    "unpack_rows",
    "widen",
]


def row_packer(schema: Schema) -> Callable[[Any, int, Sequence[Any]], None]:
    """Return ``pack(buffer, offset, row)``: write one PACKED row into a writable buffer.

    Array columns take lists, tuples, ``array.array``, numpy arrays, or their bytes. A row that does not fit
    raises one of ``MISFIT`` and may leave part of itself in the buffer.
    """
    whole = schema.row_struct
    if whole is not None:
        pack_into = whole.pack_into

        def pack_plain(buffer: Any, offset: int, row: Sequence[Any]) -> None:
            pack_into(buffer, offset, *row)

        return pack_plain
    width = len(schema.columns)
    pieces = schema.segments
    columns = schema.columns

    def pack_pieces(buffer: Any, offset: int, row: Sequence[Any]) -> None:
        if len(row) != width:
            message = f"a row must have {width} values, got {len(row)}"
            raise ValueError(message)
        for at, first, last, piece in pieces:
            if piece is not None:
                piece.pack_into(buffer, offset + at, *row[first:last])
                continue
            column = columns[first]
            if column.shape:
                data = array_bytes(row[first], column.dtype, column.shape)
            else:
                data = b"\1" if convert_bool(row[first]) else b"\0"
            buffer[offset + at : offset + at + len(data)] = data

    return pack_pieces


def pack_rows(schema: Schema, rows: Sequence[Sequence[Any]]) -> bytes:
    """Return the PACKED body of rows.

    Raises:
        MISFIT: One of these, for a value that its column cannot hold, or a row of another length.
    """
    row_bytes = schema.row_bytes
    buffer = bytearray(row_bytes * len(rows))
    pack = row_packer(schema)
    offset = 0
    for row in rows:
        pack(buffer, offset, row)
        offset += row_bytes
    return bytes(buffer)


def pack_columns(schema: Schema, columns: Sequence[Sequence[Any]]) -> bytes:
    """Return the PACKED body of columns; like ``pack_rows``."""
    if len(columns) != len(schema.columns) or len({len(column) for column in columns}) > 1:
        message = f"a table of {len(schema.columns)} columns needs as many, equally long"
        raise ValueError(message)
    return pack_rows(schema, list(zip(*columns, strict=True)))


def unpack_rows(schema: Schema, body: bytes | memoryview) -> list[tuple[Any, ...]]:
    """Return the rows of a PACKED body; arrays are lists, nested as their shape.

    Raises:
        WireError: It is not a whole number of rows, or the schema has no PACKED form.
    """
    if not schema.is_packed or len(body) % schema.row_bytes:
        message = f"{len(body)} bytes are not rows of {schema.row_bytes} bytes"
        raise WireError(message)
    flat = schema.flat_struct.iter_unpack(body)
    if schema.is_flat:
        return list(flat)
    spans: list[tuple[int, int, tuple[int, ...]]] = []
    at = 0
    for column in schema.columns:
        spans.append((at, at + column.count, column.shape))
        at += column.count
    return [tuple(nest(list(row[a:b]), shape) if shape else row[a] for a, b, shape in spans) for row in flat]


def to_columns(schema: Schema, rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Return the columns of rows.

    Raises:
        JobError: A row has another number of values than the schema has columns.
    """
    width = len(schema.columns)
    held = list(rows)
    for row in held:
        if len(row) != width:
            message = f"a row must have {width} values ({', '.join(schema.names)}), got {len(row)}"
            raise JobError(message)
    return [list(column) for column in zip(*held, strict=True)] if held else [[] for _ in range(width)]


def encode_columns(
    schema: Schema, columns: Sequence[Sequence[Any]], dtypes: dict[str, str] | None = None
) -> bytes:
    """Return the COLUMNS body of columns of any values; widens what does not fit.

    Args:
        dtypes: Texts of columns that are known to hold another dtype than the schema says.

    Raises:
        JobError: The columns are not those of the schema, or not equally long.
    """
    if len(columns) != len(schema.columns) or len({len(column) for column in columns}) > 1:
        lengths = [len(column) for column in columns]
        message = (
            f"a table of {len(schema.columns)} columns needs as many, equally long, got lengths {lengths}"
        )
        raise JobError(message)
    known = dtypes or {}
    held: list[list[Any]] = []
    widened: dict[str, str] = {}
    for column, values in zip(schema.columns, columns, strict=True):
        fitted, text = fit_values(values, known.get(column.name, column.text))
        held.append(fitted)
        if text != column.text:
            widened[column.name] = text
    return pack_map({"columns": held, "dtypes": widened})


def split_columns(
    schema: Schema, columns: Sequence[Sequence[Any]], max_bytes: int, dtypes: dict[str, str] | None = None
) -> list[tuple[bytes, int]]:
    """Return COLUMNS bodies of at most ``max_bytes`` each with their numbers of rows, in order.

    Raises:
        JobError: Like ``encode_columns``, or one row alone is larger.
    """
    body = encode_columns(schema, columns, dtypes)
    rows = len(columns[0])
    if len(body) <= max_bytes:
        return [(body, rows)]
    if rows == 1:
        message = f"one row must have at most {max_bytes} bytes, got {len(body)}; put_raw takes any size"
        raise JobError(message)
    part = max(1, min(rows - 1, rows * max_bytes // (len(body) + 1)))
    found: list[tuple[bytes, int]] = []
    for start in range(0, rows, part):
        piece = [column[start : start + part] for column in columns]
        found += split_columns(schema, piece, max_bytes, dtypes)
    return found


def decode_columns(
    schema: Schema, body: bytes | memoryview, *, keep_bytes: bool = False
) -> tuple[list[list[Any]], dict[str, str]]:
    """Return the columns of a COLUMNS body, None where a value is missing, and the dtypes it widened.

    Args:
        keep_bytes: Leave arrays as the bytes of their elements instead of lists.

    Raises:
        WireError: A value is not what its column's dtype says, or the shape of the body is not as drawn.
    """
    held = unpack_map(body)
    columns, dtypes = held.get("columns"), held.get("dtypes")
    if not isinstance(columns, list) or not isinstance(dtypes, dict) or not set(dtypes) <= set(schema.names):
        message = f"a COLUMNS body needs columns and dtypes of {', '.join(schema.names)}"
        raise WireError(message)
    lists = len(columns) == len(schema.columns) and all(isinstance(column, list) for column in columns)
    if not lists or len({len(column) for column in columns}) > 1:
        message = f"a COLUMNS body needs {len(schema.columns)} lists, equally long"
        raise WireError(message)
    try:
        effective = schema.with_dtypes(dtypes)
    except (ValueError, TypeError, JobError) as e:
        message = f"a COLUMNS body: {e}"
        raise WireError(message) from e
    for index, column in enumerate(effective.columns):
        _check(column, columns[index])
        if column.shape and not keep_bytes:
            columns[index] = [
                None if value is None else array_values(value, column.dtype, column.shape)
                for value in columns[index]
            ]
    return columns, dtypes


def _check(column: Column, values: list[Any]) -> None:
    kinds = set(map(type, values))
    kinds.discard(type(None))
    expected = bytes if column.shape else EXACT_TYPES[column.dtype]
    if not kinds <= {expected}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        message = f"column {column.name!r} must hold {expected.__name__} for {column.text}, got {names}"
        raise WireError(message)
    present = [value for value in values if value is not None]
    if column.shape:
        size, width = SIZES[column.dtype], column.width
        for value in present:
            if (len(value) != width if width else len(value) % size) or (
                column.dtype == "bool" and value.strip(b"\0\1")
            ):
                message = f"column {column.name!r}: {len(value)} bytes are not a {column.text}"
                raise WireError(message)
    elif column.dtype in INT_RANGES and present:
        low, high = INT_RANGES[column.dtype]
        if min(present) < low or max(present) > high:
            message = f"column {column.name!r} must be {low} to {high} for {column.text}"
            raise WireError(message)
