"""Frames to rows as SQLite binds them; the table of what a value becomes is in ``sqlite.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.columns import Schema
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.tables import TableDecoder

__all__ = ["COLUMNS_MAX", "RowEncoder", "Rows", "distinct"]

COLUMNS_MAX = 2000
"""Of a table of SQLite as it is usually built."""

_INT_MAX = 2**63 - 1


class Rows(NamedTuple):
    """Rows of one set of columns; ``values``, one row after another, can be iterated once."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    units: tuple[str, ...]
    values: Iterator[Any]


class RowEncoder:
    """Turns the frames of one stream into rows."""

    def __init__(self, info: OpenInfo) -> None:
        self._decoder = TableDecoder(info)
        self._schema = info.schema
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def encode(self, frames: Sequence[Frame]) -> list[Rows]:
        """Return the rows of frames in order; of RAW pieces, all of their message are there.

        Raises:
            WireError: A body is not what OPEN says, or SQLite has no form for it.
        """
        schema = self._schema
        if schema is not None and _is_plain(schema) and all(f.kind is Kind.PACKED for f in frames):
            return [self._packed(schema, frames)]
        try:
            return [self._general(batch) for batch in self._decoder.batches(frames)]
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as e:
            message = f"SQLite has no form for it: {e}"
            raise WireError(message) from e

    def _packed(self, schema: Schema, frames: Sequence[Frame]) -> Rows:
        for frame in frames:
            if len(frame.body) != frame.rows * schema.row_bytes:
                message = f"{len(frame.body)} bytes are not {frame.rows} rows of {schema.row_bytes} bytes"
                raise WireError(message)
        units = tuple(column.unit for column in schema.columns)
        dtypes = tuple(column.text for column in schema.columns)
        rows = chain.from_iterable(schema.flat_struct.iter_unpack(frame.body) for frame in frames)
        return Rows(self._distinct(schema.names), dtypes, units, chain.from_iterable(rows))

    def _general(self, batch: pa.RecordBatch) -> Rows:
        names = tuple(batch.schema.names)
        known = {} if self._schema is None else {column.name: column for column in self._schema.columns}
        dtypes = tuple(
            known[field.name].text if field.name in known else str(field.type) for field in batch.schema
        )
        units = tuple(known[name].unit if name in known else "" for name in names)
        columns = [_values(column) for column in batch.columns]
        return Rows(self._distinct(names), dtypes, units, chain.from_iterable(zip(*columns, strict=True)))

    def _distinct(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return names that differ in more than the case of letters, which SQLite does not tell apart."""
        found = self._names.get(names)
        if found is None:
            if len(names) > COLUMNS_MAX:
                message = f"a table of SQLite has at most {COLUMNS_MAX} columns, got {len(names)}"
                raise WireError(message)
            found = self._names[names] = distinct(names)
        return found


def _is_plain(schema: Schema) -> bool:
    """Tell whether what ``struct`` makes of a packed row is what SQLite is to be given."""
    return schema.is_packed and schema.is_flat and all(column.dtype != "u8" for column in schema.columns)


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that SQLite tells apart."""
    taken: set[str] = set()
    found: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate.lower() in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate.lower())
        found.append(candidate)
    return tuple(found)


def _values(column: Any) -> list[Any]:
    kind, types = column.type, pa.types
    if types.is_nested(kind):
        plain = column.cast(_plain_type(kind))
        return [None if value is None else _json(value) for value in plain.to_pylist()]
    if types.is_timestamp(kind):
        return _list(column.cast(pa.timestamp("ns")).cast(pa.int64()))
    if types.is_uint64(kind):
        return [
            str(value) if value is not None and value > _INT_MAX else value for value in column.to_pylist()
        ]
    if types.is_float16(kind):
        return _list(column.cast(pa.float32()))
    values = _list(column)
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind):
        return values
    return [value if isinstance(value, str | bytes | None) else str(value) for value in values]


def _plain_type(kind: Any) -> Any:
    """Return a type with whole numbers in place of timestamps, which have no JSON form."""
    types = pa.types
    if types.is_timestamp(kind):
        return pa.int64()
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _list(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values


def _json(value: Any) -> str:
    return json.dumps(value, default=_text, separators=(",", ":"))


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
