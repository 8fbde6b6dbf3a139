"""Arrow schemas and ARROW bodies as they come from elsewhere: checked before anything is made of them.

Arrow validates that a message reads nothing outside itself. It does not mind one that says much in few
bytes: compressed zeros, a billion missing values without a buffer, a long text that is pointed at a million
times. Such a body of some kB would fill the memory of the process that turns it into rows, again after each
restart. So a column has at most one value per bit of the body, nothing is compressed, and types that repeat
values by reference are refused; texts and bytes in the view layout become plain ones.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from edgedaq.errors import WireError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["VIEWED_BYTES_MAX", "arrow_body", "arrow_schema_bytes", "read_batch", "read_schema"]

VIEWED_BYTES_MAX = 64 << 20
"""Most that a column in the view layout may take once it is plain."""

_ERRORS = (OSError, EOFError, ValueError, TypeError, LookupError, MemoryError, OverflowError, struct.error)
"""What pyarrow raises for bytes that are not Arrow's, besides its own exceptions."""

_REPEATING = ("dictionary", "run_end_encoded", "union", "list_view", "large_list_view")
_VIEW_BYTES = 16
_FIELD_HEADER, _FIELD_COMPRESSION = 2, 3


def arrow_schema_bytes(schema: pa.Schema) -> bytes:
    """Return what ``OpenInfo.arrow_schema`` holds for a pyarrow schema."""
    return bytes(schema.serialize())


def arrow_body(batch: pa.RecordBatch) -> pa.Buffer:
    """Return the ARROW body of a record batch; the caller has cast dictionaries to plain columns."""
    return batch.serialize()


def read_schema(data: bytes) -> pa.Schema:
    """Return the schema that ``arrow_schema_bytes`` described.

    Raises:
        WireError: It is none, or has a type that repeats values by reference.
    """
    import pyarrow as pa  # noqa: PLC0415

    try:
        schema = pa.ipc.read_schema(pa.py_buffer(data))
    except (*_ERRORS, pa.ArrowException) as e:
        message = f"the Arrow schema in OPEN is not valid: {e}"
        raise WireError(message) from e
    for field in schema:
        _check_type(pa, field.name, field.type, is_top=True)
    return schema


def read_batch(body: memoryview, schema: pa.Schema, *, in_place: bool = False) -> pa.RecordBatch:
    """Return the rows of an ARROW body, in memory of their own; or in place, for who keeps ``body`` as it is.

    Raises:
        WireError: It is not valid, or says more than its bytes can.
    """
    import pyarrow as pa  # noqa: PLC0415

    try:
        # A copy is aligned as Arrow's kernels want it, and outlives the buffer that was read.
        message = pa.ipc.read_message(pa.py_buffer(body if in_place else bytes(body)))
        _check_plain(memoryview(message.metadata))
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        for column in batch.columns:
            _check_length(pa, column, 8 * len(body))
        return pa.RecordBatch.from_arrays([_plain(pa, c) for c in batch.columns], names=schema.names)
    except (*_ERRORS, WireError, pa.ArrowException) as e:
        text = f"an ARROW body is not valid: {e}"
        raise WireError(text) from e


def _check_type(pa: Any, name: str, kind: Any, *, is_top: bool = False) -> None:
    types = pa.types
    is_view = types.is_string_view(kind) or types.is_binary_view(kind)
    is_empty = (types.is_fixed_size_binary(kind) and not kind.byte_width) or (
        types.is_fixed_size_list(kind) and not kind.list_size
    )
    if is_empty or (is_view and not is_top) or any(getattr(types, f"is_{word}")(kind) for word in _REPEATING):
        message = f"the Arrow column {name!r} must be cast to a plain type before it is put, got {kind}"
        raise WireError(message)
    for index in range(kind.num_fields):
        _check_type(pa, name, kind.field(index).type)


def _check_length(pa: Any, array: Any, most: int) -> None:
    if len(array) > most:
        message = f"{len(array)} values of type {array.type} do not fit into {most // 8} bytes"
        raise WireError(message)
    types, kind = pa.types, array.type
    if types.is_map(kind):
        inner = [array.keys, array.items]
    elif types.is_struct(kind):
        inner = [array.field(index) for index in range(kind.num_fields)]
    else:
        inner = [array.values] if types.is_nested(kind) else []
    for part in inner:
        _check_length(pa, part, most)


def _plain(pa: Any, column: Any) -> Any:
    is_text = pa.types.is_string_view(column.type)
    if not is_text and not pa.types.is_binary_view(column.type):
        return column
    views = memoryview(column.buffers()[1]).cast("B")[: _VIEW_BYTES * (column.offset + len(column))].cast("i")
    if sum(views[0 :: _VIEW_BYTES // 4]) > VIEWED_BYTES_MAX:
        message = f"a column of type {column.type} has more than {VIEWED_BYTES_MAX} bytes"
        raise WireError(message)
    return column.cast(pa.string() if is_text else pa.binary())


def _check_plain(metadata: memoryview) -> None:
    """Refuse a message whose header has the field ``compression``; pyarrow has no word for that.

    A flatbuffer: a table begins with the way back to its list of u16 offsets of fields, 0 for an absent one.
    """

    def field_at(table: int, number: int) -> int:
        offsets = table - struct.unpack_from("<i", metadata, table)[0]
        place = 4 + 2 * number
        if place >= struct.unpack_from("<H", metadata, offsets)[0]:
            return 0
        offset = int(struct.unpack_from("<H", metadata, offsets + place)[0])
        return table + offset if offset else 0

    root = int(struct.unpack_from("<I", metadata)[0])
    header = field_at(root, _FIELD_HEADER)
    if header and field_at(header + struct.unpack_from("<I", metadata, header)[0], _FIELD_COMPRESSION):
        message = "it is compressed"
        raise WireError(message)
