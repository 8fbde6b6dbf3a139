"""What a value of a column is: dtypes, how they are written, which one holds two others.

The text of a dtype is an element type and, for arrays, a shape::

    f8          one float64 per row
    u2[1024]    an array of 1024 uint16 in every row (fixed)
    i4[16,4]    16 x 4, C order
    f8[]        a list of float64 of any length (ragged)

Element types: ``bool``, ``i1 i2 i4 i8 u1 u2 u4 u8``, ``f4 f8``, ``timestamp`` (int64, UTC ns), ``utf8``,
``bytes``. The last two have no array form. Everything here is pure Python: numpy and ``array`` objects are
read through the buffer protocol, without importing anything.

Nothing here raises for a value that an experiment may produce: what fits no number becomes text.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "CODES",
    "DTYPES",
    "INT_RANGES",
    "SIZES",
    "dtype_of",
    "dtype_text",
    "elements",
    "parse_dtype",
    "plain",
    "text_of",
    "timestamp_ns",
    "typed_view",
    "widen",
]

CODES = {
    "bool": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f4": "f",
    "f8": "d",
    "timestamp": "q",
}
"""Fixed-width dtypes and their ``struct`` codes."""

SIZES = {name: 1 if name == "bool" else 8 if name == "timestamp" else int(name[1]) for name in CODES}
DTYPES = (*CODES, "utf8", "bytes")

INT_RANGES = {
    name: (0, 2 ** (8 * size) - 1) if name[0] == "u" else (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1)
    for name, size in SIZES.items()
    if name[0] in "iut"
}
"""Dtypes of whole numbers: the least and the greatest value."""

_TEXT = re.compile(r"([a-z]+[0-9]?)(?:\[((?:[1-9][0-9]{0,8}(?:,[1-9][0-9]{0,8}){0,7})?)\])?\Z")
_SIGNED = ("i1", "i2", "i4", "i8")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def dtype_text(dtype: str, shape: Sequence[int] = ()) -> str:
    """Return the text of a dtype, e.g. ``u2[1024]``; shape ``(-1,)`` is ragged."""
    if not shape:
        return dtype
    return f"{dtype}[]" if shape[0] == -1 else f"{dtype}[{','.join(map(str, shape))}]"


def parse_dtype(text: str) -> tuple[str, tuple[int, ...]]:
    """Return element type and shape of a dtype's text.

    Raises:
        ValueError: It is none.
    """
    match = _TEXT.match(text)
    if match is None or match[1] not in DTYPES:
        message = f"a dtype must be one of {', '.join(DTYPES)}, with [n] or [] for arrays, got {text!r}"
        raise ValueError(message)
    dtype, inner = match[1], match[2]
    if inner is None:
        return dtype, ()
    if dtype not in CODES:
        message = f"{dtype} has no array form, got {text!r}"
        raise ValueError(message)
    return dtype, tuple(int(part) for part in inner.split(",")) if inner else (-1,)


def widen(a: str, b: str) -> str:
    """Return the dtype that holds the values of both (texts, with shapes).

    Whole numbers widen to the next whole number that holds both, then to f8; arrays of different
    lengths to ragged; what has nothing in common to utf8.
    """
    if a == b:
        return a
    (dtype_a, shape_a), (dtype_b, shape_b) = parse_dtype(a), parse_dtype(b)
    if shape_a == shape_b:
        shape = shape_a
    elif len(shape_a) == len(shape_b) == 1:
        shape = (-1,)
    else:
        return "utf8"
    dtype = _widen_element(dtype_a, dtype_b)
    return "utf8" if dtype == "utf8" else dtype_text(dtype, shape)


def _widen_element(a: str, b: str) -> str:
    if a == b:
        return a
    if a not in CODES or b not in CODES:
        return "utf8"
    if "timestamp" in (a, b):
        return _widen_element("i8" if a == "timestamp" else a, "i8" if b == "timestamp" else b)
    if "bool" in (a, b):
        return a if b == "bool" else b
    if a[0] == "f" or b[0] == "f":
        # f4 holds every i2 and u2 exactly, no wider whole number.
        return "f8" if any(x == "f8" or (x[0] != "f" and SIZES[x] > 2) for x in (a, b)) else "f4"
    if a[0] == b[0]:
        return a if SIZES[a] > SIZES[b] else b
    signed, unsigned = (a, b) if a[0] == "i" else (b, a)
    if SIZES[unsigned] < SIZES[signed]:
        return signed
    return f"i{2 * SIZES[unsigned]}" if SIZES[unsigned] < 8 else "f8"


def plain(value: Any) -> Any:
    """Return a numpy scalar or an array without dimensions as what it is in Python; else ``value`` itself."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        item = value.item()
        if type(item) is not type(value):
            return item
        return complex(value) if value.dtype.kind == "c" else float(value)  # a long double is not Python's
    return value


def dtype_of(value: Any) -> str:
    """Return the dtype that holds one value (not None), as undeclared columns get it.

    int is i8 (u8 above int63, f8 beyond both), float f8, ``datetime`` timestamp, a list ragged; arrays of
    ``array`` and numpy keep their element type; anything else is text.
    """
    kind = type(value)
    if kind is float:
        return "f8"
    if kind is bool:
        return "bool"
    if isinstance(value, int):
        return "i8" if -(2**63) <= value < 2**63 else "u8" if 0 <= value < 2**64 else "f8"
    if isinstance(value, float):
        return "f8"
    if isinstance(value, str):
        return "utf8"
    if isinstance(value, bytes | bytearray):
        return "bytes"
    if isinstance(value, dt.datetime):
        return "timestamp"
    typed = typed_view(value)
    if typed is not None:
        shape = typed[1]
        return dtype_text(typed[0], shape if len(shape) > 1 and 0 not in shape else (-1,))
    item = plain(value)
    if item is not value:
        return dtype_of(item)
    if isinstance(value, memoryview):
        return "bytes"
    if isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "shape", None)):
        return _dtype_of_list(value if isinstance(value, list | tuple) else value.tolist())
    return "f8" if hasattr(value, "__float__") else "utf8"


def _dtype_of_list(values: Sequence[Any]) -> str:
    flat, shape = elements(values)
    if flat is None:
        return "utf8"
    found = {dtype_of(item) for item in flat if item is not None}
    dtype = "f8" if not found else found.pop()
    for other in found:
        dtype = widen(dtype, other)
    if dtype not in CODES:
        return "utf8"
    if None in flat:
        dtype = "f8" if dtype != "f4" else dtype
    return dtype_text(dtype, shape if len(shape) > 1 and 0 not in shape else (-1,))


def elements(values: Sequence[Any]) -> tuple[list[Any] | None, tuple[int, ...]]:
    """Return the elements of a regular nested list in C order, and its shape; None when it is irregular."""
    shape: tuple[int, ...] = (len(values),)
    flat = list(values)
    while flat and any(isinstance(item, list | tuple) for item in flat):
        if not all(isinstance(item, list | tuple) for item in flat):
            return None, ()
        lengths = {len(item) for item in flat}
        if len(lengths) > 1 or len(shape) >= 8:
            return None, ()
        shape = (*shape, lengths.pop())
        flat = [element for item in flat for element in item]
    return flat, shape


def typed_view(value: Any) -> tuple[str, tuple[int, ...], memoryview] | None:
    """Return element type, shape and bytes of an array of ``array`` or numpy; None for anything else.

    ``bytes``, ``bytearray`` and a memoryview of plain bytes are not typed: they are elements as they lie.
    """
    if isinstance(value, list | tuple | bytes | bytearray | str | int | float) or value is None:
        return None
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        return None
    if view.ndim == 0 or not view.c_contiguous or (isinstance(value, memoryview) and view.format == "B"):
        return None
    code, size = view.format.lstrip("@="), view.itemsize
    if code in ("b", "h", "i", "l", "q", "n"):
        dtype = f"i{size}"
    elif code in ("B", "H", "I", "L", "Q", "N"):
        dtype = f"u{size}"
    elif code in ("f", "d"):
        dtype = f"f{size}"
    elif code == "?":
        dtype = "bool"
    else:
        return None
    return dtype, tuple(view.shape or ()), view.cast("B") if view.nbytes else memoryview(b"")


def timestamp_ns(value: dt.datetime) -> int:
    """Return UTC ns of a datetime; without a zone it is local time, as everywhere in Python."""
    aware = value if value.tzinfo is not None else value.astimezone()
    delta = aware - _EPOCH
    return ((delta.days * 86400 + delta.seconds) * 1_000_000 + delta.microseconds) * 1000


def text_of(value: Any) -> str:
    """Return any value as text that UTF-8 can hold: bytes as hex, lists as JSON, times as ISO 8601 UTC."""
    if isinstance(value, str):
        text = str.__str__(value)  # without what a subclass adds
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, bytes | bytearray | memoryview):
        text = bytes(value).hex()
    elif isinstance(value, dt.datetime):
        text = _iso_text(value)
    elif hasattr(value, "tolist"):
        return text_of(value.tolist() if value.shape else plain(value))
    elif isinstance(value, list | tuple | dict):
        text = json.dumps(value, default=text_of, separators=(",", ":"), skipkeys=True)
    elif isinstance(value, float):
        text = repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else str(value)
    else:
        text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _iso_text(value: dt.datetime) -> str:
    try:
        return value.astimezone(dt.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return value.isoformat()  # at the edges of the calendar there is no other zone
