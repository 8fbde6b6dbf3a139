"""Bodies of open frames: the rows that lie in a slot of a ring, as they will be sealed.

Used by the producer while it lives and by ``salvage`` after its death, with the same result: it depends on
the slot's memory and the stream's schema alone.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import msgpack

from edgedaq.errors import JobError, WireError
from edgedaq.frame import HEADER_BYTES, MAX_FRAME_BYTES, Kind
from edgedaq.ring_layout import (
    FORM_PACKED,
    FORM_RAW,
    FORM_ROWS,
)
from edgedaq.schema import Schema, split_columns, to_columns

__all__ = ["FRAME_TARGET_BYTES", "Body", "InPlacePart", "body_limit", "slot_bodies"]

FRAME_TARGET_BYTES = 1 << 20
"""What does not fit into a slot is split into frames of about this size."""


class InPlacePart(Protocol):
    """A part of a body that writes itself."""

    def __len__(self) -> int:
        """Return how many bytes it is going to write."""

    def write_into(self, data: memoryview, at: int) -> None:
        """Write them at an offset of the ring's data area."""


class Body(NamedTuple):
    """What becomes one frame: kind, the pieces of its body in order, rows, flags."""

    kind: Kind
    parts: tuple[bytes | memoryview | InPlacePart, ...]
    rows: int
    flags: int = 0

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))


def body_limit(ring_bytes: int) -> int:
    """Return the largest body that a producer makes: a frame is at most half a ring."""
    return min(MAX_FRAME_BYTES, ring_bytes // 2) - HEADER_BYTES


def slot_bodies(
    form: int,
    width: int,
    ends: memoryview,
    data: memoryview,
    rows: tuple[int, int],
    schema: Schema | None,
    limit: int,
) -> list[Body]:
    """Return the bodies of rows ``rows[0]`` to ``rows[1]`` (exclusive) of a slot.

    Args:
        form: ``FORM_PACKED``, ``FORM_RAW`` or ``FORM_ROWS``.
        width: The slot's word of that name.
        ends: u32 end offsets of rows.
        data: The slot's data; PACKED and RAW bodies are views of it.
        limit: Bytes of the largest body; only ROWS, which grow when they become COLUMNS, can need several.

    Raises:
        WireError: The slot does not hold what its words say.
    """
    first, last = rows
    if form == FORM_PACKED:
        if width <= 0 or last * width > len(data):
            message = f"a slot of {len(data)} bytes cannot hold {last} rows of {width} bytes"
            raise WireError(message)
        return [Body(Kind.PACKED, (data[first * width : last * width],), last - first)]
    if form not in (FORM_RAW, FORM_ROWS) or last > len(ends):
        message = f"a slot cannot hold {last} rows of form {form}"
        raise WireError(message)
    begin = ends[first - 1] if first else (width if form == FORM_ROWS else 0)
    end = ends[last - 1]
    if not begin <= end <= len(data):
        message = f"a slot of {len(data)} bytes cannot hold rows from {begin} to {end}"
        raise WireError(message)
    if form == FORM_RAW:
        return [Body(Kind.RAW, (_shift(ends[first:last], begin), data[begin:end]), last - first)]
    if schema is None:
        message = "a slot holds rows of a stream that has no schema"
        raise WireError(message)
    return _columns(schema, data, width, [begin, *ends[first:last]], limit)


def _shift(ends: memoryview, begin: int) -> bytes:
    """Return u32 little-endian ends, each less ``begin``.

    One subtraction of big numbers does it for all: no end is less than ``begin``, so nothing is borrowed.
    """
    raw = ends.tobytes()
    if not begin:
        return raw
    ones = int.from_bytes(b"\1\0\0\0" * len(ends), "little")
    try:
        return (int.from_bytes(raw, "little") - begin * ones).to_bytes(len(raw), "little")
    except OverflowError as e:
        message = f"the ends of messages in a slot are not in order after {begin}"
        raise WireError(message) from e


def _columns(schema: Schema, data: memoryview, width: int, edges: list[int], limit: int) -> list[Body]:
    try:
        dtypes = msgpack.unpackb(data[:width]) if width else {}
        rows = [msgpack.unpackb(data[a:b], use_list=False) for a, b in itertools.pairwise(edges)]
        bodies = split_columns(schema, to_columns(schema, rows), limit, dtypes)
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException, JobError) as e:
        message = f"a slot does not hold rows of its stream: {e}"
        raise WireError(message) from e
    return [Body(Kind.COLUMNS, (body,), count) for body, count in bodies]
