"""The types that the columns of a stream have, for readers that turn what a store made of them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from edgedaq.batch import MESSAGE_COLUMN, arrow_schema
from edgedaq.open_info import OpenInfo

__all__ = ["column_types", "typed"]

_REFUSALS = (pa.ArrowException, ValueError, TypeError, OverflowError)


def column_types(info: OpenInfo) -> dict[str, Any]:
    """Return the Arrow types of the columns of a stream, raw and event streams as tables.

    Raises:
        WireError: It tells no columns that pyarrow can read.
    """
    if info.form == "raw":
        return {MESSAGE_COLUMN: pa.binary()}
    if info.form == "event":
        return {"metadata": pa.string(), "payload": pa.binary()}
    return {field.name: field.type for field in arrow_schema(info)}


def typed(values: Sequence[Any], kind: Any) -> Any:
    """Return values as a backend gives them back as a column; as text where one is not of the type.

    Args:
        kind: None where nobody knows; then it is what they look like.
        values: Python values or cells (``cells.py``); None where one is missing.
    """
    if kind is not None and pa.types.is_dictionary(kind):
        return typed(values, kind.value_type)
    try:
        if kind is None:
            return pa.array(values)
        return _typed(values, kind)
    except _REFUSALS:
        return pa.array([_text(value) for value in values], pa.string())


def _typed(values: Sequence[Any], kind: Any) -> Any:
    types = pa.types
    if types.is_boolean(kind):
        return pa.array([None if value is None else int(value) != 0 for value in values], kind)
    if types.is_integer(kind):
        return pa.array([None if value is None else _int(value) for value in values], kind)
    if types.is_floating(kind):
        floats = [None if value is None else float(value) for value in values]
        return pa.array(floats, pa.float64()).cast(kind, safe=False)
    if types.is_timestamp(kind):
        times = pa.array([None if value is None else int(value) for value in values], pa.int64())
        return times.cast(pa.timestamp("ns", tz=kind.tz)).cast(kind)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return pa.array(values, kind)
    if types.is_nested(kind):
        return pa.array([None if value is None else _nested(value, kind) for value in values], kind)
    if types.is_null(kind):
        return pa.nulls(len(values))
    return pa.array([_text(value) for value in values], pa.string()).cast(kind)


def _int(value: Any) -> int:
    """Return a whole number.

    Raises:
        ValueError: It has a fraction.
    """
    found = int(value)
    if isinstance(value, float) and found != value:
        message = f"{value} is no whole number"
        raise ValueError(message)
    return found


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _nested(value: str | bytes, kind: Any) -> Any:
    """Return a list or structure; numbers in bytes are elements back to back, unless they are JSON."""
    inner, shape = kind, []
    while pa.types.is_fixed_size_list(inner):
        shape.append(inner.list_size)
        inner = inner.value_type
    if not shape and (pa.types.is_list(inner) or pa.types.is_large_list(inner)):
        inner, shape = inner.value_type, [-1]
    element = _element(inner) if shape and isinstance(value, bytes) else None
    if element is None or not isinstance(value, bytes) or _is_json(value, element.itemsize, shape):
        return _plain(json.loads(value), kind)
    flat = np.frombuffer(value, element)
    if pa.types.is_timestamp(inner):
        flat = flat.astype("datetime64[ns]").astype(f"datetime64[{inner.unit}]").astype("<i8")
    elif pa.types.is_boolean(inner):
        flat = flat.astype(bool)
    return flat.reshape(shape).tolist()


def _element(kind: Any) -> Any:
    if pa.types.is_boolean(kind):
        return np.dtype("u1")
    if pa.types.is_timestamp(kind):
        return np.dtype("<i8")
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return np.dtype(kind.to_pandas_dtype()).newbyteorder("<")
    return None


def _is_json(value: bytes, item_bytes: int, shape: Sequence[int]) -> bool:
    """Tell whether a cell is JSON: so are all arrays of a batch in which an element is missing."""
    if shape != [-1]:
        return len(value) != item_bytes * int(np.prod(shape))
    if not (value.startswith(b"[") and value.endswith(b"]")) or (item_bytes == 1 and b"null" not in value):
        return False
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False


def _plain(value: Any, kind: Any) -> Any:
    """Return what JSON was made of: bytes were hex."""
    if value is None:
        return None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return bytes.fromhex(value)
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(one, kind.value_type) for one in value]
    return value
