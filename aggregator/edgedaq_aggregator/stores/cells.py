"""Arrow columns as cells, the bytes of one value each: how stores with a server behind send values.

A cell is null where the value is missing, else:

=============== ============================================================================================
whole numbers   decimal; booleans ``1`` and ``0``; timestamps the UTC ns
floats          the shortest decimal form that reads back the same; ``nan``, ``inf``, ``-inf``
text            UTF-8; dates, decimals and such in Arrow's own text form
bytes           as they are
arrays          of numbers, fixed or ragged: the elements, little-endian, C order, as ``numpy.frombuffer``
                takes them (booleans a byte each); arrays of anything else: JSON
=============== ============================================================================================
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from edgedaq.errors import WireError

from edgedaq_aggregator.stores.tables import dumped

__all__ = ["CellKind", "back_to_back", "cell_kind", "cells", "joined", "scalar"]

_UNREADABLE = (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError)


class CellKind(enum.Enum):
    """What the bytes of a cell are."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"
    TIME = "time"
    TEXT = "text"
    BYTES = "bytes"
    ARRAY = "array"


def cell_kind(kind: Any) -> CellKind:
    """Return what the cells of an Arrow type are."""
    types = pa.types
    if types.is_dictionary(kind):
        return cell_kind(kind.value_type)
    if types.is_boolean(kind):
        return CellKind.BOOL
    if types.is_integer(kind):
        return CellKind.INT
    if types.is_floating(kind):
        return CellKind.FLOAT
    if types.is_timestamp(kind):
        return CellKind.TIME
    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    ):
        return CellKind.BYTES
    return CellKind.ARRAY if _element(kind) is not None else CellKind.TEXT


def cells(column: Any) -> Any:
    """Return the cells of a column as an Arrow ``large_binary`` array.

    Raises:
        WireError: A value has no such form.
    """
    try:
        return _cells(column).cast(pa.large_binary())
    except _UNREADABLE as e:
        message = f"a column of type {column.type} has no form here: {e}"
        raise WireError(message) from e


def joined(*parts: Any, between: bytes = b"") -> Any:
    """Return parts of cells put together row by row; bytes stand in every row."""
    scalars = [scalar(part) if isinstance(part, bytes) else part for part in parts]
    return pc.binary_join_element_wise(*scalars, scalar(between))


def scalar(value: bytes) -> Any:
    """Return bytes as what goes with cells."""
    return pa.scalar(value, pa.large_binary())


def back_to_back(column: Any) -> memoryview:
    """Return the values of cells as they lie in memory, without a copy."""
    _, offsets, data = column.buffers()
    if data is None or not len(column):
        return memoryview(b"")
    bounds = memoryview(offsets).cast("B").cast("q")
    return memoryview(data).cast("B")[bounds[column.offset] : bounds[column.offset + len(column)]]


def _cells(column: Any) -> Any:
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        return _cells(column.dictionary_decode())
    form = cell_kind(kind)
    if form is CellKind.BOOL:
        return column.cast(pa.int8()).cast(pa.string())
    if types.is_float16(kind):
        return column.cast(pa.float32()).cast(pa.string())
    if form in (CellKind.INT, CellKind.FLOAT):
        return column.cast(pa.string())
    if form is CellKind.TIME:
        return column.cast(pa.timestamp("ns", tz=kind.tz)).cast(pa.int64()).cast(pa.string())
    if form is CellKind.BYTES:
        return column
    if form is CellKind.ARRAY:
        packed = _packed_arrays(column)
        if packed is not None:
            return packed
    if types.is_null(kind):
        return pa.nulls(len(column), pa.string())
    if types.is_nested(kind):
        values = [dumped(value) for value in column.to_pylist()]
        return pa.array(values, pa.string())
    return column.cast(pa.string())


def _element(kind: Any) -> np.dtype[Any] | None:
    """Return the numpy type of the elements of a list type, little-endian; None where they are no numbers."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        inner = kind.value_type
        if types.is_fixed_size_list(inner):
            return _element(inner)
    elif types.is_list(kind) or types.is_large_list(kind):
        inner = kind.value_type
    else:
        return None
    if types.is_boolean(inner):
        return np.dtype("u1")
    if types.is_timestamp(inner):
        return np.dtype("<i8")
    if types.is_integer(inner) or types.is_floating(inner):
        return np.dtype(inner.to_pandas_dtype()).newbyteorder("<")
    return None


def _packed_arrays(column: Any) -> Any:
    """Return the elements of each row as bytes; None where an element is missing."""
    kind, types = column.type, pa.types
    element = _element(kind)
    assert element is not None  # noqa: S101  # for mypy: the caller has asked for it
    rows = len(column)
    if column.offset:
        column = pa.concat_arrays([column])
    flat, count = column, 1
    while types.is_fixed_size_list(flat.type):
        count *= flat.type.list_size
        flat = flat.values
    if types.is_fixed_size_list(kind):
        bounds = np.arange(rows + 1, dtype="<i8") * count
        flat = flat[: rows * count]
    else:
        bounds = column.offsets.to_numpy().astype("<i8")
        flat = column.values
    if flat.null_count and column.drop_null().flatten().null_count:
        return pa.array([dumped(value) for value in column.to_pylist()], pa.string())
    if types.is_boolean(flat.type):
        flat = flat.cast(pa.uint8())
    elif types.is_timestamp(flat.type):
        flat = flat.cast(pa.timestamp("ns", tz=flat.type.tz)).cast(pa.int64())
    if flat.null_count:
        flat = flat.fill_null(0)
    data = np.ascontiguousarray(flat.to_numpy(zero_copy_only=False), element)
    buffers = [None, _buffer(bounds * element.itemsize), _buffer(data)]
    packed = pa.Array.from_buffers(pa.large_binary(), rows, buffers)
    return pc.if_else(column.is_valid(), packed, None) if column.null_count else packed


def _buffer(values: Any) -> Any:
    return pa.py_buffer(values)
