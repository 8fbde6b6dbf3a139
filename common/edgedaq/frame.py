"""The frame: the unit of data, the same bytes in ring, spool, on the wire and in the journal.

Little-endian, aligned to 8 bytes::

    offset  size  field
         0     8  check         xxh3-64 of bytes 8 .. frame_bytes (rest of the header, body, padding)
         8     3  magic         b"EDQ" (names xxh3-64 as the algorithm)
        11     1  version       1; a reader refuses another major version by name
        12     1  kind          Kind
        13     1  flags         FLAG_PIECE: a piece of one RAW message, without a table of lengths;
                                FLAG_FIRST: its first one; FLAG_CONTINUES: more come in the next frames
        14     2  reserved      0; a newer minor version may use it, a reader ignores it
        16     4  body_bytes    without padding
        20     4  rows          rows of a table, messages of RAW (of pieces only the last one counts 1)
        24     8  stream        random, non-zero, given at birth
        32     8  seq           0, 1, 2, ... in the stream; OPEN is always 0
        40     8  row0          rows of this stream before this frame, dropped ones included
        48     8  t_first_ns    UTC ns of the first row
        56     8  t_put_ns      monotonic ns of the put, of the boot named in OPEN
        64        body, then zeros up to a multiple of 8

Bodies by kind:

OPEN      msgpack map (``OpenInfo`` in ``schema.py``); rows 0
PACKED    fixed-width rows, little-endian, no padding between; concatenating bodies concatenates rows
ARROW     an Arrow IPC record-batch message; the schema was sent once, in OPEN
COLUMNS   msgpack map ``{"columns": [[value, ...], ...], "dtypes": {name: dtype}}``; the general case
RAW       ``rows`` little-endian u32 end offsets, then the messages' bytes back to back; with FLAG_PIECE the
          body is a piece of one message that is larger than a frame: FLAG_CONTINUES on all but the last
EVENT     u32 length of a msgpack map, the map, then the payload bytes
START     msgpack map; STOP: msgpack map; run boundaries
GAP       msgpack map ``{"last": seq, "rows": int | None, "reason": str}``; its own seq is the first lost one
CLOSE     msgpack map ``{"rows": int, "tail_unknown": bool, "bound_s": float}``; the stream has ended

``encode`` and ``decode`` are the only code that knows these offsets.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

import msgpack
from xxhash import xxh3_64_intdigest

from edgedaq.errors import ChecksumError, WireError

__all__ = [
    "DATA_KINDS",
    "FLAGS_AT",
    "FLAG_CONTINUES",
    "FLAG_FIRST",
    "FLAG_PIECE",
    "HEADER_BYTES",
    "MAX_FRAME_BYTES",
    "Frame",
    "Kind",
    "count_rows",
    "decode",
    "encode",
    "frame_bytes",
    "length_at",
    "pack_map",
    "seal_into",
    "split",
    "unpack_map",
]

HEADER_BYTES = 64
MAX_FRAME_BYTES = 4 << 20
"""Largest frame, header and padding included; larger tables are split by rows, larger RAW
messages continue."""

FLAG_CONTINUES = 1
FLAG_PIECE = 2
FLAG_FIRST = 4

FLAGS_AT = 13
"""Where the flags of a frame lie, for who decides by them without reading it."""

_VERSION = 1
_MAGIC = b"EDQ" + bytes([_VERSION])
_MAGIC_INT = int.from_bytes(_MAGIC, "little")
_HEADER = struct.Struct("<QIBBHIIQQQqQ")
_CHECK = struct.Struct("<Q")


class Kind(enum.IntEnum):
    """What a frame's body is."""

    OPEN = 1
    PACKED = 2
    ARROW = 3
    COLUMNS = 4
    RAW = 5
    EVENT = 6
    START = 7
    STOP = 8
    GAP = 9
    CLOSE = 10


_KINDS = {int(kind): kind for kind in Kind}
DATA_KINDS = frozenset({Kind.PACKED, Kind.ARROW, Kind.COLUMNS, Kind.RAW, Kind.EVENT})


class Frame(NamedTuple):
    """One validated frame; ``body`` and ``raw`` are views into the buffer it was decoded from."""

    kind: Kind
    flags: int
    rows: int
    stream: int
    seq: int
    row0: int
    t_first_ns: int
    t_put_ns: int
    body: memoryview
    raw: memoryview


def frame_bytes(body_bytes: int) -> int:
    """Return the length of a frame with such a body: header, body, padding to 8."""
    return HEADER_BYTES + ((body_bytes + 7) & ~7)


def seal_into(
    buffer: memoryview,
    position: int,
    kind: Kind,
    stream: int,
    seq: int,
    *,
    body_bytes: int,
    rows: int = 0,
    row0: int = 0,
    t_first_ns: int = 0,
    t_put_ns: int = 0,
    flags: int = 0,
) -> int:
    """Make a frame of a body that already lies at ``position + HEADER_BYTES``.

    Zeroes the padding and writes the header, the checksum last.

    Args:
        buffer: Writable bytes (format ``B``).
        position: Where the frame begins; the caller keeps it a multiple of 8.

    Returns:
        The frame's length in bytes.
    """
    total = frame_bytes(body_bytes)
    end = position + total
    if body_bytes & 7:
        start = position + HEADER_BYTES + body_bytes
        buffer[start:end] = bytes(end - start)
    _HEADER.pack_into(
        buffer,
        position,
        0,
        _MAGIC_INT,
        kind,
        flags,
        0,
        body_bytes,
        rows,
        stream,
        seq,
        row0,
        t_first_ns,
        t_put_ns,
    )
    _CHECK.pack_into(buffer, position, xxh3_64_intdigest(buffer[position + 8 : end]))
    return total


def encode(
    kind: Kind,
    stream: int,
    seq: int,
    body: bytes | bytearray | memoryview = b"",
    *,
    rows: int = 0,
    row0: int = 0,
    t_first_ns: int = 0,
    t_put_ns: int = 0,
    flags: int = 0,
) -> bytes:
    """Return a frame as bytes of its own."""
    body_bytes = len(body)
    buffer = bytearray(frame_bytes(body_bytes))
    buffer[HEADER_BYTES : HEADER_BYTES + body_bytes] = body
    seal_into(
        memoryview(buffer),
        0,
        kind,
        stream,
        seq,
        body_bytes=body_bytes,
        rows=rows,
        row0=row0,
        t_first_ns=t_first_ns,
        t_put_ns=t_put_ns,
        flags=flags,
    )
    return bytes(buffer)


def length_at(buffer: memoryview, position: int = 0) -> int:
    """Return the length of the frame that begins at ``position``, without checking it.

    Raises:
        WireError: No frame of this version begins there, or it would be larger than ``MAX_FRAME_BYTES``.
    """
    if len(buffer) - position < HEADER_BYTES:
        message = f"a frame needs {HEADER_BYTES} bytes of header, got {max(len(buffer) - position, 0)}"
        raise WireError(message)
    magic = bytes(buffer[position + 8 : position + 12])
    if magic != _MAGIC:
        if magic[:3] == _MAGIC[:3]:
            message = f"frame version {magic[3]} is not known here, this is version {_VERSION}"
        else:
            message = f"no frame: expected magic {_MAGIC!r}, got {magic!r}"
        raise WireError(message)
    total = frame_bytes(int.from_bytes(buffer[position + 16 : position + 20], "little"))
    if total > MAX_FRAME_BYTES:
        message = f"a frame must have at most {MAX_FRAME_BYTES} bytes, got {total}"
        raise WireError(message)
    return total


def count_rows(buffer: memoryview) -> int:
    """Return the rows and messages in whole frames that lie back to back, for statistics: unchecked."""
    position, end, rows = 0, len(buffer), 0
    while end - position >= HEADER_BYTES:
        _, _, kind, _, _, body_bytes, frame_rows, *_ = _HEADER.unpack_from(buffer, position)
        if kind in DATA_KINDS:
            rows += frame_rows
        position += frame_bytes(body_bytes)
    return rows


def decode(buffer: memoryview, position: int = 0) -> Frame:
    """Return the frame that begins at ``position``, checked to the last byte.

    Args:
        buffer: Bytes (format ``B``); the frame's views keep it alive.

    Raises:
        ChecksumError: The frame was damaged, or cut off.
        WireError: It is not a frame of this version; asking for it again would not help.
    """
    total = length_at(buffer, position)
    end = position + total
    if end > len(buffer):
        message = f"a frame of {total} bytes was cut off after {len(buffer) - position}"
        raise ChecksumError(message)
    check, _, kind, flags, _, body_bytes, rows, stream, seq, row0, t_first_ns, t_put_ns = _HEADER.unpack_from(
        buffer, position
    )
    if xxh3_64_intdigest(buffer[position + 8 : end]) != check:
        message = f"checksum of a frame of {total} bytes does not match (stream {stream:016x}, seq {seq})"
        raise ChecksumError(message)
    known = _KINDS.get(kind)
    if known is None:
        message = f"frame kind must be 1 to {max(_KINDS)}, got {kind}"
        raise WireError(message)
    if stream == 0:
        message = "a frame's stream must not be 0"
        raise WireError(message)
    if (seq == 0) != (known is Kind.OPEN):
        message = f"seq 0 and OPEN belong together, got seq {seq} in a frame of kind {known.name}"
        raise WireError(message)
    body_start = position + HEADER_BYTES
    return Frame(
        known,
        flags,
        rows,
        stream,
        seq,
        row0,
        t_first_ns,
        t_put_ns,
        buffer[body_start : body_start + body_bytes],
        buffer[position:end],
    )


def split(buffer: memoryview) -> Iterator[Frame]:
    """Yield the whole frames that lie back to back in ``buffer``, each checked.

    Raises:
        WireError: Like ``decode``, at the first frame that is not valid; those before it were yielded.
    """
    position = 0
    end = len(buffer)
    while position < end:
        frame = decode(buffer, position)
        yield frame
        position += len(frame.raw)


def pack_map(value: dict[str, object]) -> bytes:
    """Return a body map as msgpack."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack_map(body: bytes | memoryview) -> dict[str, object]:
    """Return the msgpack map that a body is.

    Raises:
        WireError: It is not one map with text keys.
    """
    try:
        value = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as e:
        message = f"a body must be one msgpack map: {e}"
        raise WireError(message) from e
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        message = f"a body must be a msgpack map with text keys, got {type(value).__name__}"
        raise WireError(message)
    return value
