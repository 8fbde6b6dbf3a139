"""Batches to the bytes of Redis commands.

An entry per row, its fields the columns (``cells.py``), a missing value left out; a row of which everything
is missing has the one field ``_``, empty::

    XADD <key> * <column> <cell> <column> <cell> ...

Packed, an entry per batch::

    XADD <key> * stream <16 hex> first_seq <int> rows <int> arrow <Arrow IPC stream: schema and one batch>

As time series, one command per column with all its samples, the time in ms::

    TS.MADD <key>:<column> <ms> <value> <key>:<column> <ms> <value> ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
from edgedaq.columns import Schema
from edgedaq.errors import WireError
from edgedaq.frame import Frame

from edgedaq_aggregator.stores.cells import CellKind, back_to_back, cell_kind, cells, joined, scalar

__all__ = [
    "Commands",
    "Samples",
    "entries",
    "packed_entry",
    "samples",
    "series_key",
    "series_of",
    "tells_time",
]

pc: Any = pyarrow.compute  # its types know neither cells nor plain numbers beside arrays

_NUMBERS = (CellKind.BOOL, CellKind.INT, CellKind.FLOAT)
_NO_FIELDS = b"$1\r\n_\r\n$0\r\n\r\n"
_TIME_NAME = "timestamp"
_MS = 1_000_000


class Commands(NamedTuple):
    """Commands ready to be sent; ``series`` are the keys of time series that must be there before."""

    data: list[Any]
    command_count: int
    series: tuple[str, ...] = ()
    has_entries: bool = True


class Samples(NamedTuple):
    """Commands for the samples of a batch, how many share key and time, and how many are no numbers."""

    commands: Commands
    collided: int
    not_finite: int


def entries(key: bytes, batch: pa.RecordBatch) -> Commands:
    """Return an XADD per row.

    Raises:
        WireError: A value has no form as a cell.
    """
    columns = [cells(column) for column in batch.columns]
    heads = [_bulk(field.name.encode()) + b"$" for field in batch.schema]
    opening = b"\r\n$4\r\nXADD\r\n" + _bulk(key) + b"$1\r\n*\r\n"
    if not any(column.null_count for column in columns):
        parts: list[Any] = []
        before = b"*%d" % (3 + 2 * len(columns)) + opening
        for head, column in zip(heads, columns, strict=True):
            parts += [before + head, _length(column), b"\r\n", column]
            before = b"\r\n"
        return Commands([back_to_back(joined(*parts, before))], batch.num_rows)
    pairs = [
        joined(head, _length(column), b"\r\n", column, b"\r\n")
        for head, column in zip(heads, columns, strict=True)
    ]
    present = pc.cast(columns[0].is_valid(), pa.int32())
    for column in columns[1:]:
        present = pc.add(present, pc.cast(column.is_valid(), pa.int32()))
    no_fields = pc.if_else(pc.equal(present, 0), scalar(_NO_FIELDS), scalar(b""))
    counts = _text(pc.add(pc.multiply(pc.max_element_wise(present, 1), 2), 3))
    filled = [pc.fill_null(pair, scalar(b"")) for pair in pairs]
    return Commands([back_to_back(joined(b"*", counts, opening, *filled, no_fields))], batch.num_rows)


def packed_entry(key: bytes, batch: pa.RecordBatch, stream: int, frame: Frame) -> Commands:
    """Return one XADD for a batch that begins with a frame."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body = sink.getvalue()
    fields = {b"stream": b"%016x" % stream, b"first_seq": b"%d" % frame.seq, b"rows": b"%d" % batch.num_rows}
    head = b"*11\r\n$4\r\nXADD\r\n" + _bulk(key) + b"$1\r\n*\r\n"
    head += b"".join(_bulk(name) + _bulk(value) for name, value in fields.items())
    return Commands([head + b"$5\r\narrow\r\n$%d\r\n" % body.size, memoryview(body), b"\r\n"], 1)


def series_of(schema: pa.Schema) -> tuple[str | None, list[str]]:
    """Return the column that tells the time, if one does, and those that become time series.

    The time is the column ``timestamp`` (whole numbers and floats in ms), else the first one of that type.
    """
    time_name = next((f.name for f in schema if cell_kind(f.type) is CellKind.TIME), None)
    if _TIME_NAME in schema.names and cell_kind(schema.field(_TIME_NAME).type) in (*_NUMBERS, CellKind.TIME):
        time_name = _TIME_NAME
    numbers = [f.name for f in schema if cell_kind(f.type) in _NUMBERS and f.name != time_name]
    return time_name, numbers


def tells_time(schema: Schema | None) -> bool:
    """Tell whether a column of a stream tells the time of its rows."""
    return schema is not None and any(c.dtype == "timestamp" or c.name == _TIME_NAME for c in schema.columns)


def series_key(key: str, column: str) -> str:
    """Return the key of a column's time series."""
    return f"{key}:{column}"


def samples(key: str, entries_key: str, batch: pa.RecordBatch, t_first_ns: int) -> Samples:
    """Return a TS.MADD per column of numbers, and entries of what else there is.

    What is missing or no finite number is no sample.

    Args:
        entries_key: Where columns go, with the time, that are no numbers.
        t_first_ns: The time of all rows where no column tells one.

    Raises:
        WireError: A value has no form as a cell, or a time is before 1970.
    """
    time_name, numbers = series_of(batch.schema)
    times_ms = _times_ms(batch, time_name, t_first_ns)
    data: list[Any] = []
    names: list[str] = []
    collided = not_finite = 0
    for name in numbers:
        column = batch.column(batch.schema.get_field_index(name))
        wanted = pc.and_(column.is_valid(), times_ms.is_valid())
        if cell_kind(column.type) is CellKind.FLOAT:
            is_number = pc.fill_null(pc.is_finite(column.cast(pa.float64())), pa.scalar(False))  # noqa: FBT003
            not_finite += pc.sum(pc.and_(wanted, pc.invert(is_number))).as_py() or 0
            wanted = pc.and_(wanted, is_number)
        taken, times = column.filter(wanted), times_ms.filter(wanted)
        if not len(taken):
            continue
        collided += len(times) - pc.count_distinct(times).as_py()
        target = series_key(key, name)
        stamps, values = _text(times), cells(taken)
        head = _bulk(target.encode()) + b"$"
        lines = joined(
            head, _length(stamps), b"\r\n", stamps, b"\r\n$", _length(values), b"\r\n", values, b"\r\n"
        )
        data += [b"*%d\r\n$7\r\nTS.MADD\r\n" % (1 + 3 * len(taken)), back_to_back(lines)]
        names.append(target)
    others = [field.name for field in batch.schema if field.name not in (*numbers, time_name)]
    if not others and numbers:
        return Samples(Commands(data, len(names), tuple(names), has_entries=False), collided, not_finite)
    told = [name for name in batch.schema.names if name not in numbers]
    rest = entries(entries_key.encode(), batch.select(told))
    whole = Commands([*data, *rest.data], len(names) + rest.command_count, tuple(names))
    return Samples(whole, collided, not_finite)


def _times_ms(batch: pa.RecordBatch, name: str | None, t_first_ns: int) -> Any:
    if name is None:
        return pa.array([t_first_ns // _MS] * batch.num_rows, pa.int64())
    column = batch.column(batch.schema.get_field_index(name))
    try:
        if cell_kind(column.type) is CellKind.TIME:
            times = pc.cast(column, pa.timestamp("ms", tz=column.type.tz), safe=False).cast(pa.int64())
        else:
            times = pc.cast(pc.floor(column.cast(pa.float64())), pa.int64())
    except (pa.ArrowException, ValueError) as e:
        message = f"column {name!r} tells no time in ms: {e}"
        raise WireError(message) from e
    if pc.any(pc.less(times, 0)).as_py():
        message = f"column {name!r} tells a time before 1970, which a time series cannot have"
        raise WireError(message)
    return times


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def _length(column: Any) -> Any:
    return _text(pc.binary_length(column))


def _text(column: Any) -> Any:
    return column.cast(pa.string()).cast(pa.large_binary())
