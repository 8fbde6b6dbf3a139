"""Frame bodies to tables: the one view that stores and consumers have of every form of data.

``BatchDecoder`` turns the frames of one stream into Arrow record batches, neighbouring small frames into one;
``to_arrow`` does so for one frame. ``frame_columns``, ``raw_messages`` and ``event_of`` need neither pyarrow
nor numpy, which are imported only when an Arrow batch is asked for.

Bytes that are not what their frame says raise ``WireError``, never another exception, and are never read out
of bounds: lengths are checked against the body, and Arrow's own messages in ``arrow_bodies``.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgedaq.arrow_bodies import arrow_body, arrow_schema_bytes, read_batch, read_schema
from edgedaq.columns import Column, Schema
from edgedaq.errors import WireError
from edgedaq.frame import FLAG_PIECE, Frame, Kind, unpack_map
from edgedaq.open_info import OpenInfo
from edgedaq.schema import decode_columns, unpack_rows

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = [
    "MESSAGE_COLUMN",
    "BatchDecoder",
    "arrow_body",
    "arrow_schema",
    "arrow_schema_bytes",
    "event_of",
    "frame_columns",
    "raw_body",
    "raw_messages",
    "to_arrow",
]

MESSAGE_COLUMN = "message"
"""The one column of a raw stream seen as a table."""

_U32 = struct.Struct("<I")


def raw_body(frame: Frame) -> memoryview:
    """Return the bytes of all messages of a RAW frame back to back; of a piece, its bytes.

    Raises:
        WireError: The table of lengths does not end where the body does.
    """
    if frame.flags & FLAG_PIECE:
        return frame.body
    return _raw_split(frame)[1]


def raw_messages(frame: Frame) -> list[memoryview]:
    """Return the messages of a RAW frame as views of it; a piece is returned as one.

    Raises:
        WireError: The table of lengths does not describe the body.
    """
    if frame.flags & FLAG_PIECE:
        return [frame.body]
    ends, data = _raw_split(frame)
    found: list[memoryview] = []
    start = 0
    for end in ends:
        if end < start:
            message = f"the ends of messages in a RAW frame must not fall, got {end} after {start}"
            raise WireError(message)
        found.append(data[start:end])
        start = end
    return found


def _raw_split(frame: Frame) -> tuple[tuple[int, ...], memoryview]:
    body, rows = frame.body, frame.rows
    table = 4 * rows
    if table > len(body):
        message = f"a RAW frame of {rows} messages needs {table} bytes of lengths, got a body of {len(body)}"
        raise WireError(message)
    ends = struct.unpack_from(f"<{rows}I", body)
    data = body[table:]
    if (ends[-1] if ends else 0) != len(data):
        message = f"the messages of a RAW frame must end at {len(data)}, got {ends[-1] if ends else 0}"
        raise WireError(message)
    return ends, data


def event_of(frame: Frame) -> tuple[dict[str, object], memoryview]:
    """Return metadata and payload of an EVENT frame.

    Raises:
        WireError: Its body is not that.
    """
    body = frame.body
    length = _U32.unpack_from(body)[0] if len(body) >= 4 else -1
    if not 0 <= length <= len(body) - 4:
        message = f"an EVENT of {len(body)} bytes cannot have metadata of {length}"
        raise WireError(message)
    return unpack_map(body[4 : 4 + length]), body[4 + length :]


def frame_columns(info: OpenInfo, frame: Frame) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Return names and columns of a table or raw frame as Python values, None where one is missing.

    Raises:
        WireError: The body is not what OPEN says.
    """
    if frame.kind is Kind.RAW:
        return (MESSAGE_COLUMN,), [[bytes(item) for item in raw_messages(frame)]]
    if frame.kind is Kind.ARROW:
        batch = to_arrow(info, frame)
        return tuple(batch.schema.names), [_python_values(column) for column in batch.columns]
    schema = _schema_of(info)
    if frame.kind is Kind.PACKED:
        rows = unpack_rows(schema, frame.body)
        _check_rows(frame, len(rows))
        return schema.names, [list(column) for column in zip(*rows, strict=True)] or [
            [] for _ in schema.names
        ]
    if frame.kind is Kind.COLUMNS:
        columns, _ = decode_columns(schema, frame.body)
        _check_rows(frame, len(columns[0]))
        return schema.names, columns
    message = f"a {frame.kind.name} frame is no table"
    raise WireError(message)


def to_arrow(info: OpenInfo, frame: Frame) -> pa.RecordBatch:
    """Return the rows of a PACKED, COLUMNS or ARROW frame, or the messages of a RAW one, as a record batch.

    A column that a COLUMNS frame widened has the wider type in this batch.

    Raises:
        WireError: The body is not what OPEN and the header say.
    """
    return BatchDecoder(info).batches([frame])[0]


def arrow_schema(info: OpenInfo) -> pa.Schema:
    """Return the columns that record batches of a table have; a COLUMNS frame may widen one.

    Raises:
        WireError: It is no table, or tells no columns that pyarrow can read.
    """
    found: pa.Schema
    if info.arrow_schema:
        found = read_schema(info.arrow_schema)
    else:
        columns = _schema_of(info).columns
        found = _pyarrow().schema([(column.name, _arrow_type(column)) for column in columns])
    return found


class BatchDecoder:
    """Turns the frames of one stream into record batches.

    Args:
        in_place: Batches of ARROW frames refer to the frames' memory, which then stays as it is.

    Raises:
        WireError: ``info`` tells no columns that pyarrow can read.
    """

    def __init__(self, info: OpenInfo, *, in_place: bool = False) -> None:
        self._info = info
        self._in_place = in_place

    def batches(self, frames: Sequence[Frame]) -> list[pa.RecordBatch]:
        """Return the rows of frames in order; neighbouring frames that agree become one batch.

        Args:
            frames: PACKED, COLUMNS, ARROW or whole RAW frames of this stream.

        Raises:
            WireError: A body is not what OPEN and the header say.
        """
        found: list[pa.RecordBatch] = []
        start = 0
        for index in range(1, len(frames) + 1):
            if index == len(frames) or frames[index].kind is not frames[start].kind:
                found += self._same_kind(frames[start:index])
                start = index
        return found

    def _same_kind(self, frames: Sequence[Frame]) -> list[pa.RecordBatch]:
        kind = frames[0].kind
        if kind is Kind.PACKED:
            return [self._packed(frames)]
        if kind is Kind.COLUMNS:
            return self._columns(frames)
        if kind is Kind.ARROW:
            return [self._arrow(frame) for frame in frames]
        if kind is Kind.RAW:
            return [_raw_batch(frame) for frame in frames]
        message = f"a {kind.name} frame is no table"
        raise WireError(message)

    def _packed(self, frames: Sequence[Frame]) -> Any:
        import numpy as np  # noqa: PLC0415

        schema = _schema_of(self._info)
        row_bytes = schema.row_bytes
        for frame in frames:
            if not row_bytes or len(frame.body) != frame.rows * row_bytes:
                message = f"{len(frame.body)} bytes are not {frame.rows} rows of {row_bytes} bytes"
                raise WireError(message)
        body = frames[0].body if len(frames) == 1 else b"".join(frame.body for frame in frames)
        rows = np.frombuffer(body, _numpy_dtype(schema))
        return _batch(
            schema, [_packed_column(column, rows[f"f{i}"]) for i, column in enumerate(schema.columns)]
        )

    def _columns(self, frames: Sequence[Frame]) -> list[pa.RecordBatch]:
        schema = _schema_of(self._info)
        found: list[pa.RecordBatch] = []
        held: list[list[Any]] = []
        held_dtypes: dict[str, str] = {}

        def flush() -> None:
            if held:
                effective = schema.with_dtypes(held_dtypes)
                arrays = [_value_column(c, v) for c, v in zip(effective.columns, held, strict=True)]
                found.append(_batch(effective, arrays))

        for frame in frames:
            columns, dtypes = decode_columns(schema, frame.body, keep_bytes=True)
            _check_rows(frame, len(columns[0]))
            if held and dtypes == held_dtypes:
                for values, more in zip(held, columns, strict=True):
                    values.extend(more)
                continue
            flush()
            held, held_dtypes = columns, dtypes
        flush()
        return found

    @functools.cached_property
    def _arrow_schema(self) -> Any:
        return read_schema(self._info.arrow_schema)

    def _arrow(self, frame: Frame) -> Any:
        batch = read_batch(frame.body, self._arrow_schema, in_place=self._in_place)
        _check_rows(frame, batch.num_rows)
        return batch


def _pyarrow() -> Any:
    import pyarrow as pa  # noqa: PLC0415

    return pa


def _python_values(column: Any) -> list[Any]:
    pa = _pyarrow()
    try:
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ns")).cast(pa.int64())
        values: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError) as e:
        message = f"an Arrow column of type {column.type} has no Python values: {e}"
        raise WireError(message) from e
    return values


def _schema_of(info: OpenInfo) -> Schema:
    if info.schema is None:
        message = f"this stream of {info.node}/{info.job} has no schema for PACKED or COLUMNS frames"
        raise WireError(message)
    return info.schema


def _check_rows(frame: Frame, found: int) -> None:
    if found != frame.rows:
        message = f"a {frame.kind.name} frame must hold the {frame.rows} rows of its header, got {found}"
        raise WireError(message)


@functools.lru_cache(maxsize=256)
def _numpy_dtype(schema: Schema) -> np.dtype[Any]:
    import numpy as np  # noqa: PLC0415

    # Numbered names: a column of a user may be called anything, a field of numpy not.
    return np.dtype(
        [(f"f{i}", f"<{_numpy_code(c)}", (c.count,) if c.shape else ()) for i, c in enumerate(schema.columns)]
    )


def _numpy_code(column: Column) -> str:
    return {"bool": "u1", "timestamp": "i8"}.get(column.dtype, column.dtype)


def _arrow_type(column: Column) -> Any:
    pa = _pyarrow()

    named = {
        "bool": pa.bool_(),
        "f4": pa.float32(),
        "f8": pa.float64(),
        "timestamp": pa.timestamp("ns", tz="UTC"),
        "utf8": pa.string(),
        "bytes": pa.binary(),
    }
    known = named.get(column.dtype)
    if known is None:
        kind = "int" if column.dtype[0] == "i" else "uint"
        known = getattr(pa, f"{kind}{8 * int(column.dtype[1])}")()
    if column.is_ragged:
        return pa.list_(known)
    for extent in reversed(column.shape):
        known = pa.list_(known, extent)
    return known


def _batch(schema: Schema, arrays: list[Any]) -> Any:
    pa = _pyarrow()

    return pa.RecordBatch.from_arrays(arrays, names=list(schema.names))


def _packed_column(column: Column, values: np.ndarray[Any, Any]) -> Any:
    import numpy as np  # noqa: PLC0415

    flat = np.ascontiguousarray(values).reshape(-1)
    return _nested(column, _flat_array(column, flat), None)


def _flat_array(column: Column, flat: np.ndarray[Any, Any]) -> Any:
    pa = _pyarrow()

    if column.dtype == "bool":
        return pa.array(flat != 0)
    array = pa.array(flat)
    return array.cast(pa.timestamp("ns", tz="UTC")) if column.dtype == "timestamp" else array


def _nested(column: Column, flat: Any, mask: Any) -> Any:
    pa = _pyarrow()

    array = flat
    for depth, extent in enumerate(reversed(column.shape)):
        outermost = depth == len(column.shape) - 1
        array = pa.FixedSizeListArray.from_arrays(array, extent, mask=mask if outermost else None)
    return array


def _value_column(column: Column, values: list[Any]) -> Any:
    import numpy as np  # noqa: PLC0415

    pa = _pyarrow()

    if not column.shape:
        if column.dtype == "timestamp":
            return pa.array(values, pa.int64()).cast(pa.timestamp("ns", tz="UTC"))
        return pa.array(values, _arrow_type(column))
    code, missing = f"<{_numpy_code(column)}", [value is None for value in values]
    mask = pa.array(missing) if any(missing) else None
    if column.is_ragged:
        size = np.dtype(code).itemsize
        lengths = np.array([0 if value is None else len(value) // size for value in values], "<i8")
        offsets = np.zeros(len(values) + 1, "<i4")
        np.cumsum(lengths, out=offsets[1:])
        flat = np.frombuffer(b"".join(value for value in values if value is not None), code)
        return pa.ListArray.from_arrays(pa.array(offsets), _flat_array(column, flat), mask=mask)
    blank = bytes(column.width)
    flat = np.frombuffer(b"".join(blank if value is None else value for value in values), code)
    return _nested(column, _flat_array(column, flat), mask)


def _raw_batch(frame: Frame) -> Any:
    pa = _pyarrow()

    messages = [bytes(item) for item in raw_messages(frame)]
    return pa.RecordBatch.from_arrays([pa.array(messages, pa.binary())], names=[MESSAGE_COLUMN])
