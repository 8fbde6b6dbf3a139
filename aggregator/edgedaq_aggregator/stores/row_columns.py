"""Frames to columns of numpy: what containers (ROOT, HDF5) are made of.

=============== =========================================================================================
numbers         as they are; a half is a float32, a decimal a float64
booleans        uint8: 0, 1
times           int64: timestamps and dates UTC ns since 1970, times of day and durations ns
text, bytes     ``Ragged`` of bytes
fixed arrays    an axis more for each extent
ragged arrays   ``Ragged``
anything else   text: JSON
missing         nan; the least value of a signed integer or time, the greatest of an unsigned one, 255 of a
                boolean; an empty text or list
=============== =========================================================================================

A raw stream has one column, ``message``; an event stream ``metadata`` (JSON) and ``payload``. PACKED frames
are taken as they lie: the numpy rows are their bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind
from edgedaq.open_info import OpenInfo
from edgedaq.schema import Schema

from edgedaq_aggregator.stores.tables import TableDecoder, dumped

__all__ = ["Field", "Ragged", "RowDecoder", "Rows", "fields_of", "header_of"]

Array = np.ndarray[Any, np.dtype[Any]]

_CODES = {"bool": "u1", "timestamp": "i8"}
_KINDS = {code: code for code in _CODES}
_TIMES = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration)


class Field(NamedTuple):
    """A column: ``dtype`` is that of an element, ``utf8`` or ``bytes``.

    ``what`` says what its numbers are, where they are not numbers: ``bool``, ``timestamp``, ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    is_ragged: bool = False
    what: str = ""
    unit: str = ""

    @property
    def element(self) -> np.dtype[Any]:
        """The numpy dtype of an element; of text and bytes, a byte."""
        return np.dtype("u1" if self.dtype in ("utf8", "bytes") else f"<{self.dtype}")


class Ragged(NamedTuple):
    """Lists of any length: the elements of all rows, and where in them each row ends."""

    flat: Array
    ends: Array


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one set of columns; ``packed`` are the same rows as a structured array, where they came so."""

    fields: tuple[Field, ...]
    columns: list[Array | Ragged]
    count: int
    packed: Array | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all values."""
        return sum(
            c.flat.nbytes + c.ends.nbytes if isinstance(c, Ragged) else c.dtype.itemsize * c.size
            for c in self.columns
        )

    def slices(self, count: int) -> list[Rows]:
        """Return the same rows, at most ``count`` at once."""
        if self.count <= count:
            return [self]
        return [self._slice(at, min(at + count, self.count)) for at in range(0, self.count, count)]

    def _slice(self, begin: int, end: int) -> Rows:
        columns: list[Array | Ragged] = []
        for column in self.columns:
            if not isinstance(column, Ragged):
                columns.append(column[begin:end])
                continue
            start = int(column.ends[begin - 1]) if begin else 0
            ends = column.ends[begin:end]
            columns.append(Ragged(column.flat[start : int(ends[-1])], ends - start))
        return Rows(self.fields, columns, end - begin)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Return rows of the same fields as one."""
        if len(parts) == 1:
            return parts[0]
        columns = [_concatenated([part.columns[i] for part in parts]) for i in range(len(parts[0].columns))]
        return Rows(parts[0].fields, columns, sum(part.count for part in parts))


class RowDecoder:
    """Turns the frames of one stream into rows."""

    def __init__(self, info: OpenInfo) -> None:
        self._info = info
        self._tables = TableDecoder(info)
        self._units = {c.name: c.unit for c in info.schema.columns} if info.schema else {}

    def rows(self, frames: Sequence[Frame]) -> list[Rows]:
        """Return the rows of frames of one kind, in order.

        Raises:
            WireError: They are not what OPEN says, or have no such form.
        """
        try:
            return self._rows(frames)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as e:
            message = f"there is no numpy form of it: {e}"
            raise WireError(message) from e

    def _rows(self, frames: Sequence[Frame]) -> list[Rows]:
        if self._info.schema is not None and {frame.kind for frame in frames} == {Kind.PACKED}:
            return [_packed_rows(self._info.schema, frames)]
        found = []
        for batch in self._tables.batches(frames):
            names = _distinct(batch.schema.names)
            pairs = [_column(name, batch.column(i)) for i, name in enumerate(names)]
            fields = tuple(field._replace(unit=self._units.get(field.name, "")) for field, _ in pairs)
            found.append(Rows(fields, [column for _, column in pairs], batch.num_rows))
        return found


def _packed_rows(schema: Schema, frames: Sequence[Frame]) -> Rows:
    dtype, fields = _packed_dtype(schema)
    for frame in frames:
        if not schema.row_bytes or len(frame.body) != frame.rows * schema.row_bytes:
            message = f"{len(frame.body)} bytes are not {frame.rows} rows of {schema.row_bytes} bytes"
            raise WireError(message)
    body = frames[0].body if len(frames) == 1 else b"".join(frame.body for frame in frames)
    rows = np.frombuffer(body, dtype)
    return Rows(fields, [rows[field.name] for field in fields], len(rows), rows)


@functools.lru_cache(maxsize=256)
def _packed_dtype(schema: Schema) -> tuple[np.dtype[Any], tuple[Field, ...]]:
    fields = tuple(
        Field(c.name, _CODES.get(c.dtype, c.dtype), c.shape, what=_KINDS.get(c.dtype, ""), unit=c.unit)
        for c in schema.columns
    )
    return np.dtype([(f.name, f.element, f.shape) for f in fields]), fields


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names that are printable and differ; those of an Arrow schema may be anything."""
    found: dict[str, None] = {}
    for name in names:
        plain = distinct = "".join(char if char.isprintable() else "_" for char in name) or "_"
        number = 1
        while distinct in found:
            number += 1
            distinct = f"{plain}_{number}"
        found[distinct] = None
    return list(found)


def _column(name: str, array: Any) -> tuple[Field, Array | Ragged]:
    kind, types = array.type, pa.types
    if types.is_dictionary(kind):
        return _column(name, array.dictionary_decode())
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return Field(name, "utf8"), _ragged_bytes(array.cast(pa.large_string()))
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return Field(name, "bytes"), _ragged_bytes(array.cast(pa.large_binary()))
    if (types.is_list(kind) or types.is_large_list(kind)) and _is_scalar(kind.value_type):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        element, flat = _column(name, array.flatten())
        ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype="<i8")
        return element._replace(is_ragged=True), Ragged(np.asarray(flat), ends)
    if types.is_fixed_size_list(kind) and _is_fixed(kind):
        return _fixed(name, array)
    if _is_scalar(kind):
        return _scalars(name, array)
    texts = [dumped(value) for value in array.to_pylist()]
    return Field(name, "utf8"), _ragged_bytes(pa.array(texts, pa.large_string()))


def _fixed(name: str, array: Any) -> tuple[Field, Array]:
    extent = array.type.list_size
    inner = array.values.slice(array.offset * extent, len(array) * extent)
    element, values = (
        _fixed(name, inner) if pa.types.is_fixed_size_list(inner.type) else _scalars(name, inner)
    )
    field = element._replace(shape=(extent, *element.shape))
    values = values.reshape(len(array), *field.shape)
    if array.null_count:
        values = values.copy()
        values[array.is_null().to_numpy(zero_copy_only=False)] = _missing(field.dtype, field.what)
    return field, values


def _scalars(name: str, array: Any) -> tuple[Field, Array]:
    kind, types, what = array.type, pa.types, ""
    if types.is_null(kind):
        array = array.cast(pa.float64())
    elif types.is_boolean(kind):
        what, array = "bool", array.cast(pa.uint8())
    elif types.is_float16(kind):
        array = array.cast(pa.float32())
    elif types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif any(is_time(kind) for is_time in _TIMES):
        what, array = _nanoseconds(array)
    dtype = np.dtype(array.type.to_pandas_dtype())
    code = f"{dtype.kind}{dtype.itemsize}"
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(_missing(code, what), array.type))
    return Field(name, code, what=what), array.to_numpy(zero_copy_only=False)


def _nanoseconds(array: Any) -> tuple[str, Any]:
    kind, types = array.type, pa.types
    if types.is_duration(kind):
        return "duration", array.cast(pa.duration("ns")).cast(pa.int64())
    if types.is_time(kind):
        return "time of day", array.cast(pa.time64("ns")).cast(pa.int64())
    tz = kind.tz if types.is_timestamp(kind) else None
    return "timestamp", array.cast(pa.timestamp("ns", tz=tz)).cast(pa.int64())


def _ragged_bytes(array: Any) -> Ragged:
    """Return large text or bytes, as they lie where nothing is missing."""
    if array.null_count:
        array = pc.fill_null(
            array, pa.scalar(b"" if pa.types.is_large_binary(array.type) else "", array.type)
        )
    _, offsets, data = array.buffers()
    if not len(array) or offsets is None:
        return Ragged(np.empty(0, "u1"), np.zeros(len(array), "<i8"))
    bounds = np.frombuffer(offsets, "<i8", len(array) + 1, array.offset * 8)
    flat = np.frombuffer(data, "u1") if data is not None and data.size else np.empty(0, "u1")
    return Ragged(flat[bounds[0] : bounds[-1]], bounds[1:] - bounds[0])


def _concatenated(columns: list[Any]) -> Array | Ragged:
    if not isinstance(columns[0], Ragged):
        return np.concatenate(columns)
    starts = np.cumsum([0, *(len(column.flat) for column in columns[:-1])])
    ends = np.concatenate([column.ends + start for column, start in zip(columns, starts, strict=True)])
    return Ragged(np.concatenate([column.flat for column in columns]), ends)


def _missing(code: str, what: str) -> float | int:
    if code[0] == "f":
        return float("nan")
    limits = np.iinfo(code)
    return 255 if what == "bool" else int(limits.min if code[0] == "i" else limits.max)


def _is_scalar(kind: Any) -> bool:
    types = pa.types
    return (
        types.is_primitive(kind)
        or types.is_null(kind)
        or types.is_decimal128(kind)
        or types.is_decimal256(kind)
    ) and not types.is_interval(kind)


def _is_fixed(kind: Any) -> bool:
    inner = kind.value_type
    return _is_fixed(inner) if pa.types.is_fixed_size_list(inner) else _is_scalar(inner)


def fields_of(types: Mapping[str, Any]) -> tuple[Field, ...]:
    """Return the columns that rows of these Arrow types have."""
    names = _distinct(list(types))
    arrays = [pa.array([], kind) for kind in types.values()]
    return tuple(_column(name, array)[0] for name, array in zip(names, arrays, strict=True))


def header_of(fields: Sequence[Field], where: str) -> bytes:
    """Return what tells sets of columns apart: rows of equal ones go to one file.

    Args:
        where: In the file.
    """
    told = [[f.name, f.dtype, f.shape, f.is_ragged] for f in fields]
    return json.dumps([where, told], ensure_ascii=False).encode("utf-8", "backslashreplace")
