"""Schemas: the columns of a stream, as OPEN tells them, and how one row of them lies in bytes.

A PACKED row is the columns one after another, little-endian, without padding; a fixed array is its elements
in C order; a boolean is one byte, 0 or 1; a timestamp is int64 UTC ns. A schema with text, bytes or ragged
columns has no PACKED form: its rows travel as COLUMNS.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from edgedaq.dtypes import CODES, DTYPES, SIZES, dtype_of, dtype_text, parse_dtype, widen
from edgedaq.errors import JobError, WireError
from edgedaq.frame import HEADER_BYTES, MAX_FRAME_BYTES

__all__ = ["COLUMNS_MAX", "NAME_BYTES_MAX", "Column", "Schema"]

COLUMNS_MAX = 4096
NAME_BYTES_MAX = 256
_ROW_BYTES_MAX = MAX_FRAME_BYTES - HEADER_BYTES


class Column(msgspec.Struct, frozen=True):
    """One column.

    ``shape`` is ``()`` for a scalar, ``(n, ...)`` for a fixed array, ``(-1,)`` for a ragged list; ``unit`` is
    for the reader.

    Raises:
        JobError: Name or unit is not printable text, or the dtype is not known, or cannot have that shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("unit", self.unit)):
            if not _is_printable(text) or (what == "name" and not text):
                message = f"a column's {what} must be printable, at most {NAME_BYTES_MAX} bytes, got {text!r}"
                raise JobError(message)
        if self.dtype not in DTYPES:
            message = f"column {self.name!r}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
            raise JobError(message)
        if not self.shape:
            return
        fixed = len(self.shape) <= 8 and all(0 < extent <= _ROW_BYTES_MAX for extent in self.shape)
        if self.dtype not in CODES or not (fixed or self.shape == (-1,)):
            message = f"column {self.name!r}: a {self.dtype} must not have the shape {self.shape}"
            raise JobError(message)

    @property
    def text(self) -> str:
        """The dtype with its shape, e.g. ``u2[1024]``."""
        return dtype_text(self.dtype, self.shape)

    @property
    def is_ragged(self) -> bool:
        """A list of any length."""
        return self.shape == (-1,)

    @property
    def count(self) -> int:
        """Elements per row; 1 for scalars, 0 when only the row tells (ragged)."""
        return 0 if self.is_ragged else math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes per row in PACKED; 0 when only the row tells (text, bytes, ragged)."""
        return SIZES.get(self.dtype, 0) * self.count


class Schema(msgspec.Struct, frozen=True, dict=True):
    """The columns of a stream, in order. Equal schemas are equal keys of a dict.

    Raises:
        JobError: There is no column, or two have one name, or one row would be larger than a frame.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        names = {column.name for column in self.columns}
        if not 0 < len(self.columns) <= COLUMNS_MAX or len(names) != len(self.columns):
            message = (
                f"a table needs 1 to {COLUMNS_MAX} columns of different names, "
                f"got {len(self.columns)} columns of {len(names)} names"
            )
            raise JobError(message)
        row_bytes = sum(column.width for column in self.columns)
        if row_bytes > _ROW_BYTES_MAX:
            message = f"one row must have at most {_ROW_BYTES_MAX} bytes, got {row_bytes}"
            raise JobError(message)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(column.name for column in self.columns)

    @functools.cached_property
    def is_packed(self) -> bool:
        """Every row has the same number of bytes; else only COLUMNS (or ARROW) can hold it."""
        return all(column.width for column in self.columns)

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of a PACKED row; 0 when there is no such form."""
        return sum(column.width for column in self.columns) if self.is_packed else 0

    @functools.cached_property
    def row_format(self) -> str:
        """``struct`` format of a PACKED row, fixed arrays flattened; empty when there is no such form."""
        if not self.is_packed:
            return ""
        codes = (f"{column.count if column.shape else ''}{CODES[column.dtype]}" for column in self.columns)
        return "<" + "".join(codes)

    @functools.cached_property
    def row_struct(self) -> struct.Struct | None:
        """Packs a row's values as they come: ``row_struct.pack_into(buffer, offset, *row)``.

        Raises one of ``schema.MISFIT`` for a value that the column cannot hold. None when a row needs
        ``schema.row_packer``: arrays, and booleans (``struct`` takes the truth of any object).
        """
        if not self.is_packed or any(column.shape or column.dtype == "bool" for column in self.columns):
            return None
        return struct.Struct(self.row_format)

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int, int, struct.Struct | None], ...]:
        """How a row is packed piece by piece: (offset, first column, last column + 1, struct).

        Neighbouring scalars share a struct; an array or a boolean is a piece of its own, without one.
        """
        found: list[tuple[int, int, int, struct.Struct | None]] = []
        offset = start = start_offset = 0
        for index, column in enumerate(self.columns):
            if column.shape or column.dtype == "bool":
                if start < index:
                    found.append((start_offset, start, index, self._struct_of(start, index)))
                found.append((offset, index, index + 1, None))
                start, start_offset = index + 1, offset + column.width
            offset += column.width
        if start < len(self.columns):
            found.append((start_offset, start, len(self.columns), self._struct_of(start, len(self.columns))))
        return tuple(found)

    def _struct_of(self, start: int, stop: int) -> struct.Struct:
        return struct.Struct("<" + "".join(CODES[column.dtype] for column in self.columns[start:stop]))

    @functools.cached_property
    def flat_struct(self) -> struct.Struct:
        """Unpacks a PACKED row into its elements, fixed arrays flattened."""
        return struct.Struct(self.row_format)

    @functools.cached_property
    def is_flat(self) -> bool:
        """All columns are scalars."""
        return not any(column.shape for column in self.columns)

    def with_dtypes(self, dtypes: dict[str, str]) -> Schema:
        """Return this schema with other dtypes (texts) for some columns.

        Raises:
            ValueError: A dtype is none.
            JobError: A row would be larger than a frame.
        """
        columns = []
        for column in self.columns:
            dtype, shape = parse_dtype(dtypes.get(column.name, column.text))
            columns.append(Column(column.name, dtype, shape, column.unit))
        return Schema(tuple(columns))

    @classmethod
    def infer(
        cls, names: Sequence[str], rows: Iterable[Sequence[Any]], *, units: dict[str, str] | None = None
    ) -> Schema:
        """Return the schema of undeclared rows; a column of which nothing is known yet is f8.

        Raises:
            JobError: A row has another number of values than there are names, or a name cannot be one.
        """
        held = [list(row) for row in rows]
        for row in held:
            if len(row) != len(names):
                message = f"a row must have {len(names)} values ({', '.join(names)}), got {len(row)}"
                raise JobError(message)
        columns = [[row[index] for row in held] for index in range(len(names))]
        return cls.infer_columns(names, columns, units=units)

    @classmethod
    def infer_columns(
        cls,
        names: Sequence[str],
        columns: Sequence[Sequence[Any]],
        *,
        units: dict[str, str] | None = None,
    ) -> Schema:
        """Like ``infer``, from columns."""
        found = []
        for name, values in zip(names, columns, strict=True):
            dtype, shape = parse_dtype(_dtype_of_values(values))
            found.append(Column(name, dtype, shape, (units or {}).get(name, "")))
        return cls(tuple(found))

    def to_map(self) -> dict[str, Any]:
        """Return it as plain values for msgpack."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_map(cls, value: object) -> Schema:
        """Return the schema that ``to_map`` described.

        Raises:
            WireError: It does not describe a valid one.
        """
        try:
            return msgspec.convert(value, cls)
        except (msgspec.ValidationError, JobError) as e:
            message = f"a schema is not valid: {e}"
            raise WireError(message) from e


def _dtype_of_values(values: Sequence[Any]) -> str:
    if set(map(type, values)) == {float}:
        return "f8"
    text = ""
    for value in values:
        if value is not None:
            seen = dtype_of(value)
            text = seen if text in ("", seen) else widen(text, seen)
    return text or "f8"


def _is_printable(text: str) -> bool:
    try:
        return len(text.encode()) <= NAME_BYTES_MAX and (text.isprintable())
    except UnicodeEncodeError:
        return False
