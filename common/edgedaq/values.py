"""Values to what a column holds: arrays to bytes, anything to the narrowest dtype that holds it.

``fit_values`` never raises for a value; what raises one of ``MISFIT`` is the conversion to one given dtype.
"""

from __future__ import annotations

import datetime as dt
import operator
import struct
import sys
from collections.abc import Sequence
from typing import Any

from edgedaq.dtypes import (
    CODES,
    INT_RANGES,
    SIZES,
    dtype_of,
    elements,
    parse_dtype,
    plain,
    text_of,
    timestamp_ns,
    typed_view,
    widen,
)

__all__ = ["EXACT_TYPES", "MISFIT", "array_bytes", "array_values", "convert_bool", "fit_values", "nest"]

MISFIT = (struct.error, OverflowError, TypeError, ValueError, AttributeError)
"""What packing raises for a value that its column cannot hold; COLUMNS can."""

EXACT_TYPES: dict[str, type] = {"bool": bool, "utf8": str, "bytes": bytes, "f4": float, "f8": float}
"""What a scalar column's values are in COLUMNS, besides None."""
EXACT_TYPES.update(dict.fromkeys(INT_RANGES, int))

_IS_LITTLE = sys.byteorder == "little"
_NONE = type(None)


def array_bytes(value: Any, dtype: str, shape: tuple[int, ...]) -> bytes | memoryview:
    """Return the elements of an array as its column holds them.

    Args:
        value: List, tuple, ``array.array``, numpy array; bytes are the elements as they lie.
        shape: The column's; ``(-1,)`` takes any length.

    Raises:
        MISFIT: One of these, when it has another shape or elements that the dtype cannot hold.
    """
    size = SIZES[dtype]
    count = -1 if shape == (-1,) else 1
    for extent in shape:
        count *= extent if count > 0 else 1
    if isinstance(value, bytes | bytearray | memoryview) and (
        not isinstance(value, memoryview) or value.format == "B"
    ):
        data = bytes(value)
        if (len(data) % size if count < 0 else len(data) != count * size) or (
            dtype == "bool" and data.strip(b"\0\1")
        ):
            message = f"{len(data)} bytes are not an array of {dtype} of shape {shape}"
            raise ValueError(message)
        return data
    typed = typed_view(value) if _IS_LITTLE else None
    if typed is not None and (typed[0] == dtype or (dtype == "timestamp" and typed[0] == "i8")):
        _check_shape(typed[1], len(typed[2]) // size, shape, count)
        return typed[2]
    values = value if isinstance(value, list | tuple) else value.tolist()
    if dtype != "bool":
        try:
            data = struct.pack(f"<{len(values)}{CODES[dtype]}", *values)
        except MISFIT:
            pass
        else:
            _check_shape((len(values),), len(values), shape, count)
            return data
    flat, found = elements(values)
    if flat is None:
        message = f"a nested list must be regular, expected shape {shape}"
        raise ValueError(message)
    _check_shape(found, len(flat), shape, count)
    if dtype == "bool":
        return bytes([convert_bool(item) for item in flat])
    if dtype[0] == "f":
        flat = [float("nan") if item is None else item for item in flat]
    if dtype == "timestamp":
        flat = [timestamp_ns(item) if isinstance(item, dt.datetime) else item for item in flat]
    return struct.pack(f"<{len(flat)}{CODES[dtype]}", *flat)


def array_values(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> list[Any]:
    """Return the array that ``array_bytes`` described, as lists nested like its shape."""
    flat = list(struct.unpack(f"<{len(data) // SIZES[dtype]}{CODES[dtype]}", data))
    return flat if shape == (-1,) else nest(flat, shape)


def nest(flat: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return elements in C order as lists nested like the shape."""
    for extent in reversed(shape[1:]):
        flat = [flat[at : at + extent] for at in range(0, len(flat), extent)]
    return flat


def _check_shape(found: tuple[int, ...], flat_count: int, shape: tuple[int, ...], count: int) -> None:
    if (len(found) == 1) if count < 0 else (found == shape or (len(found) == 1 and flat_count == count)):
        return
    message = f"an array must have the shape {shape}, got {found}"
    raise ValueError(message)


def convert_bool(value: Any) -> bool:
    """Return a boolean of Python or numpy as Python's; a TypeError for anything else."""
    item = plain(value)
    if item is True or item is False:
        return bool(item)
    message = f"a boolean must be true or false, got {value!r}"
    raise TypeError(message)


def _convert(value: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """Return a value as COLUMNS holds it in such a column, or raise one of MISFIT."""
    if shape:
        return bytes(array_bytes(value, dtype, shape))
    if dtype == "utf8":
        return text_of(value)
    if dtype == "bytes":
        if not isinstance(value, bytes | bytearray | memoryview):
            message = f"bytes cannot hold {value!r}"
            raise TypeError(message)
        return bytes(value)
    if dtype == "bool":
        return convert_bool(value)
    item = plain(value)
    if dtype[0] == "f":
        if isinstance(item, str | bytes | bytearray) or len(getattr(item, "shape", ())):
            message = f"{dtype} cannot hold {item!r}"
            raise TypeError(message)
        number = float(item)
        if dtype == "f4":
            struct.pack("<f", number)
        return number
    if dtype == "timestamp" and isinstance(item, dt.datetime):
        item = timestamp_ns(item)
    whole = int(operator.index(item))
    low, high = INT_RANGES[dtype]
    if not low <= whole <= high:
        message = f"{dtype} cannot hold {whole}"
        raise OverflowError(message)
    return whole


def fit_values(values: Sequence[Any], text: str) -> tuple[list[Any], str]:
    """Return values as a COLUMNS column holds them, and the dtype (text) that holds them all.

    Args:
        text: The dtype to start from; it is widened as far as the values ask for.
    """
    kinds = set(map(type, values))
    kinds.discard(_NONE)
    exact = EXACT_TYPES.get(text)
    if exact is not None and text not in ("utf8", "f4") and kinds <= {exact}:
        low_high = INT_RANGES.get(text)
        if low_high is None or not kinds:
            return list(values), text
        present = values if _NONE not in set(map(type, values)) else [v for v in values if v is not None]
        if low_high[0] <= min(present) and max(present) <= low_high[1]:
            return list(values), text
    while True:
        dtype, shape = parse_dtype(text)
        fitted: list[Any] = []
        for value in values:
            if value is None:
                fitted.append(None)
                continue
            try:
                fitted.append(_convert(value, dtype, shape))
            except MISFIT:
                wider = widen(text, dtype_of(value))
                text = wider if wider != text else "utf8"
                break
        else:
            return fitted, text
