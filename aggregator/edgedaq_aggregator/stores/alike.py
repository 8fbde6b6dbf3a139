"""Rows that were read back, beside those that were put: where they lie, and whether they are the same.

A store may have no form for a value: it says so in its ``Group``, and what it has instead is the same, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.delivery import StreamState
from edgedaq.errors import WireError
from edgedaq.frame import Frame, decode
from edgedaq.open_info import OpenInfo, decode_open

__all__ = ["Group", "Placed", "first_difference", "frame_of", "info_of"]


class Placed(NamedTuple):
    """Rows that were read back: in which file or table, the place of each in it, and what they are."""

    where: str
    places: Sequence[object]
    table: pa.Table


class Group(NamedTuple):
    """Rows that lie together.

    ``where``: what they lie in, for people; ``there``: how many there are, of those that the accounts of its
    streams speak of; ``read`` yields them from so many on; ``keeps`` says whether a value is stored as it is,
    and not as missing; ``is_filled``: what is missing is stored as a value.
    """

    streams: tuple[int, ...]
    where: str
    there: int
    read: Callable[[int], Iterator[Placed]]
    keeps: Callable[[Any], bool] = lambda _: True
    is_filled: bool = False


def info_of(account: StreamState | None) -> OpenInfo | None:
    """Return what a stream is; None if nobody can tell any more."""
    try:
        return None if account is None else decode_open(decode(memoryview(account.open_raw)))
    except WireError:
        return None


def first_difference(
    table: pa.Table,
    batch: pa.RecordBatch,
    keeps: Callable[[Any], bool] = lambda _: True,
    *,
    is_filled: bool = False,
) -> tuple[int, str] | None:
    """Return the first row of a table that is not as in a batch of as many rows, and how it differs."""
    first: tuple[int, str] | None = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        absent = pa.chunked_array([pa.nulls(table.num_rows)])
        there: Any = table[name] if name in table.column_names else absent
        if there.type == column.type and there.equals(pa.chunked_array([column])):
            continue
        pairs = zip(_plain_values(there), _plain_values(column), strict=True)
        for row, (found, value) in enumerate(pairs):
            if first is not None and row >= first[0]:
                break
            is_same = _same(found, value, keeps) or (is_filled and _is_filled(found, value))
            if not is_same:
                first = row, f"{name}: stored was {_shown(value)}, found is {_shown(found)}"
    return first


def _plain_values(column: Any) -> list[Any]:
    """Return the values of a column as Python has them, times as whole numbers."""
    values: list[Any] = column.cast(_timeless(column.type)).to_pylist()
    return values


def _timeless(kind: Any) -> Any:
    types = pa.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_timestamp(kind):
        return pa.int64()
    if types.is_fixed_size_list(kind):
        return pa.list_(_timeless(kind.value_type), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_timeless(kind.value_type))
    return kind


def _same(there: Any, value: Any, keeps: Callable[[Any], bool]) -> bool:
    if there == value and type(there) is type(value):
        return True
    if isinstance(value, float) and not keeps(value):
        return there is None
    if isinstance(value, float) and isinstance(there, float):
        return there == value or (math.isnan(there) and math.isnan(value))
    if isinstance(value, list) and isinstance(there, list):
        return len(there) == len(value) and all(
            _same(a, b, lambda _: True) for a, b in zip(there, value, strict=True)
        )
    if isinstance(there, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return there == str(value) or _number(there) == value
    if isinstance(there, int | float) and isinstance(value, int | float):
        return there == value
    return bool(there == value)


def _is_filled(there: Any, value: Any) -> bool:
    """Tell whether a value stands for what is missing, as ``row_columns.py`` says."""
    if isinstance(value, list) and isinstance(there, list) and len(there) == len(value):
        return all(_same(a, b, lambda _: True) or _is_filled(a, b) for a, b in zip(there, value, strict=True))
    if value is None:
        is_limit = isinstance(there, int) and (there + 1) & there == 0
        is_least = isinstance(there, int) and there < 0 and -there & (-there - 1) == 0
        is_nan = isinstance(there, float) and math.isnan(there)
        return not there or is_limit or is_least or is_nan or isinstance(there, list)
    return there is None and isinstance(value, int)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def frame_of(frames: Sequence[Frame], number: int) -> tuple[Frame, int]:
    """Return the frame that a row is in, and its number as its producer gave it."""
    for frame in frames:
        if number < frame.rows:
            return frame, frame.row0 + number
        number -= frame.rows
    return frames[-1], frames[-1].row0
