"""Segments on disk, drawn to the byte: what a log (an agent's spool, the aggregator's journal) consists of.

A log is a directory of files ``<first position, 16 hex digits>.seg``, read in the order of their names. A
*position* is a u64 in one address space for the whole log: a segment's first position plus an offset in its
file. Positions only grow and none is ever used twice: a segment begins where the one before ended, or, when
that one's end cannot be trusted (a crash, a failed fdatasync), behind all that it could have held.

Little-endian, everything aligned to 8 bytes. The file::

    offset  size  field
         0     8  check         xxh3-64 of bytes 8 .. 4096
         8     8  magic         b"EDQSEG", version 1, 0
        16     8  first         position of this file's byte 0; equals its name, else the file is not in use
        24     8  salt          random, non-zero, new for every use of the file
        32     8  previous      first position of the segment before it; its own where there is none
        40     8  previous_end  position where the records of that one end, for good
        48     8  durable       position up to which the log was known durable when this segment was begun
        56     8  t_utc_ns      when it was begun
        64        zeros
      4096        records back to back; the first is a CHECKPOINT; behind the last one: anything

A record::

         0     8  check         xxh3-64, seeded with the record's position, of bytes 8 .. 24 + min(64, length)
         8     8  salt          the header's; stale bytes of a recycled file have another, or another position
        16     4  length        of the payload, a multiple of 8
        20     4  kind          RecordKind
        24        payload

So ``check`` vouches for the whole header of a frame, stream and seq included, and through the frame's own
checksum, which that header begins with, for every byte behind it. Payloads by kind:

FRAME       one frame, as ``frame.py`` draws it
CHECKPOINT  a sealed map {"streams": StreamTable.snapshot(), "cursor": {...}}: the log up to here, in short
SYNCED      u64 position: everything before it was durable when this record was written. A hole before it is
            damage; one behind the last SYNCED may as well be what a power cut took before anyone was told
CURSOR      a sealed map of whatever the log's owner wants to find again; advisory

A sealed map: u64 xxh3-64 of the rest, u32 length of the msgpack, u32 zero, the msgpack, zeros up to 8. A
reader passes over records of a kind that it does not know.

Other files beside the segments: ``*.free`` (preallocated, or trimmed and waiting to be used again),
``<segment>.<position>.bad`` (damaged bytes, kept for a human), ``lock``.
"""

from __future__ import annotations

import enum
import secrets
import struct
from collections.abc import Callable
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import HEADER_BYTES as FRAME_HEADER_BYTES
from edgedaq.frame import Frame, Kind, decode, pack_map, unpack_map

__all__ = [
    "CHECKED_BYTES",
    "PREFIX",
    "PREFIX_BYTES",
    "SEGMENT_HEADER_BYTES",
    "Control",
    "Entry",
    "Header",
    "Hole",
    "Record",
    "RecordKind",
    "checkpoint_payload",
    "control_record",
    "decode_header",
    "encode_header",
    "file_name",
    "first_of",
    "new_salt",
    "open_map",
    "parse",
    "read_checkpoint",
    "seal_map",
]

SEGMENT_HEADER_BYTES = 4096
PREFIX = struct.Struct("<QQII")
PREFIX_BYTES = PREFIX.size
CHECKED_BYTES = FRAME_HEADER_BYTES
"""How much of a payload the prefix's own check covers."""

PAYLOAD_MAX = 1 << 30

_MAGIC = b"EDQSEG\x01\x00"
_HEADER = struct.Struct("<8sQQQQQQ")
_CHECK = struct.Struct("<Q")
_SEALED = struct.Struct("<QII")
_TAIL = struct.Struct("<QII")
_OPEN = int(Kind.OPEN)


class RecordKind(enum.IntEnum):
    """What a record's payload is."""

    FRAME = 1
    CHECKPOINT = 2
    SYNCED = 3
    CURSOR = 4


class Header(NamedTuple):
    """The header of a segment; see the drawing."""

    first: int
    salt: int
    previous: int
    previous_end: int
    durable: int
    t_utc_ns: int


_SEALED_KINDS = {int(RecordKind.CHECKPOINT), int(RecordKind.CURSOR)}


class Record(NamedTuple):
    """One frame of a log. A reader that has consumed it goes on at ``end``.

    A frame that explains a hole (a GAP, a restored OPEN or CLOSE) is not in the log: its ``end`` is where the
    frame behind it begins.
    """

    position: int
    end: int
    frame: Frame


class Hole(NamedTuple):
    """What a reader passes over between two positions, never silently.

    ``reason`` is ``damaged``, ``missing`` (a whole segment) or ``trimmed``. The GAPs that explain the first
    two follow as records. What ``trimmed`` has cost depends on what the reader's owner had before: then
    ``table`` is the account of all streams at ``last``, for ``segment_gaps.bridge``.
    """

    first: int
    last: int
    reason: str
    table: StreamTable | None = None

    @property
    def position(self) -> int:
        """Where it begins, as of a record."""
        return self.first

    @property
    def end(self) -> int:
        """Where reading goes on, as of a record."""
        return self.last


class Control(NamedTuple):
    """A record that is not a frame; only recovery looks at them."""

    position: int
    end: int
    kind: int
    payload: memoryview


Entry = Record | Hole | Control


def file_name(first: int) -> str:
    """Return the name of the segment that begins at a position."""
    return f"{first:016x}.seg"


def first_of(name: str) -> int | None:
    """Return the first position of the segment of that name; None when it names none."""
    stem, dot, suffix = name.partition(".")
    if not dot or suffix != "seg" or len(stem) != 16:
        return None
    try:
        first = int(stem, 16)
    except ValueError:
        return None
    return first if file_name(first) == name else None


def new_salt() -> int:
    """Return a salt that no stale byte bears."""
    return secrets.randbits(64) | 1


def encode_header(header: Header) -> bytes:
    """Return the first 4 KiB of a segment."""
    rest = _HEADER.pack(_MAGIC, *header).ljust(SEGMENT_HEADER_BYTES - 8, b"\0")
    return _CHECK.pack(xxh3_64_intdigest(rest)) + rest


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Return the header of a segment.

    Raises:
        WireError: These are not the first 4 KiB of a segment of this version, undamaged.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        message = f"a segment header has {SEGMENT_HEADER_BYTES} bytes, got {len(data)}"
        raise WireError(message)
    view = memoryview(data)
    magic, *fields = _HEADER.unpack_from(view, 8)
    if magic != _MAGIC:
        message = f"no segment of this version: expected magic {_MAGIC!r}, got {magic!r}"
        raise WireError(message)
    if xxh3_64_intdigest(view[8:SEGMENT_HEADER_BYTES]) != _CHECK.unpack_from(view)[0]:
        message = "the checksum of a segment header does not match"
        raise WireError(message)
    return Header(*fields)


def control_record(kind: RecordKind, salt: int, position: int, payload: bytes) -> bytes:
    """Return a whole record that is not a frame."""
    tail = _TAIL.pack(salt, len(payload), kind)
    check = xxh3_64_intdigest(tail + payload[:CHECKED_BYTES], position)
    return _CHECK.pack(check) + tail + payload


def seal_map(value: dict[str, object]) -> bytes:
    """Return the payload that a map becomes; it carries its own checksum."""
    body = pack_map(value)
    rest = _SEALED.pack(0, len(body), 0)[8:] + body + bytes(-len(body) % 8)
    return _CHECK.pack(xxh3_64_intdigest(rest)) + rest


def open_map(payload: memoryview) -> dict[str, object]:
    """Return the map of a sealed payload.

    Raises:
        WireError: It was damaged.
    """
    if not _is_sealed(payload):
        message = f"the checksum of a sealed map of {len(payload)} bytes does not match"
        raise WireError(message)
    _, size, _ = _SEALED.unpack_from(payload)
    return unpack_map(payload[_SEALED.size : _SEALED.size + size])


def _is_sealed(payload: memoryview) -> bool:
    return len(payload) >= _SEALED.size and xxh3_64_intdigest(payload[8:]) == _CHECK.unpack_from(payload)[0]


def checkpoint_payload(table: StreamTable, cursor: dict[str, object]) -> bytes:
    """Return the payload of a CHECKPOINT."""
    return seal_map({"streams": table.snapshot(), "cursor": cursor})


def read_checkpoint(payload: memoryview) -> tuple[StreamTable, dict[str, object]]:
    """Return the table and the cursor of a CHECKPOINT.

    Raises:
        WireError: It was damaged.
    """
    value = open_map(payload)
    cursor = value.get("cursor")
    if not isinstance(cursor, dict):
        message = f"the cursor of a checkpoint must be a map, got {type(cursor).__name__}"
        raise WireError(message)
    return StreamTable.restore(value.get("streams")), cursor


def parse(
    buffer: memoryview,
    position: int,
    salt: int,
    limit: int,
    entries: list[Entry],
    wants: Callable[[int], bool] | None = None,
) -> tuple[int, int]:
    """Append the records that ``buffer`` begins with to ``entries``.

    Args:
        buffer: Bytes of a segment; the frames' views keep it alive.
        position: Position of its first byte, where a record should begin.
        limit: Position that no record crosses.
        wants: Which streams to decode. The header that it judges by is checked; of frames of other streams
            nothing else is looked at. OPEN frames are always decoded.

    Returns:
        The position reached, which lies behind ``buffer`` where that ends in a frame of another stream, and
        why it is no further: 0: ``buffer`` or ``limit`` ended there; n > 0: the
        record there needs n bytes of buffer; -n < 0: no valid record is there, and where n > 1 the damaged
        one is known to have n bytes.
    """
    offset = 0
    size = len(buffer)
    unpack, hashed, header = PREFIX.unpack_from, xxh3_64_intdigest, PREFIX_BYTES
    while True:
        left = size - offset
        if left < header or limit - position < header:
            if limit == position:
                return position, 0
            return position, -1 if limit - position < header else header if left else 0
        check, found, length, kind = unpack(buffer, offset)
        if found != salt or length & 7 or length > PAYLOAD_MAX or position + header + length > limit:
            return position, -1
        total = header + length
        covered = header + min(length, CHECKED_BYTES)
        if left < covered:
            return position, covered
        if hashed(buffer[offset + 8 : offset + covered], position) != check:
            return position, -1
        if left < total:
            if kind == 1 and _is_foreign(buffer, offset, length, wants):
                return position + total, 0
            return position, total
        if kind == 1:
            if length < FRAME_HEADER_BYTES:
                return position, -total
            if not _is_foreign(buffer, offset, length, wants):
                try:
                    frame = decode(buffer, offset + header)
                except WireError:
                    return position, -total
                if len(frame.raw) != length:
                    return position, -total
                entries.append(Record(position, position + total, frame))
        else:
            payload = buffer[offset + header : offset + total]
            if kind in _SEALED_KINDS and not _is_sealed(payload):
                return position, -total
            entries.append(Control(position, position + total, kind, payload))
        offset += total
        position += total


def _is_foreign(buffer: memoryview, offset: int, length: int, wants: Callable[[int], bool] | None) -> bool:
    """Tell whether the frame of a record, of which the header is there and checked, is for others only."""
    if wants is None or length < FRAME_HEADER_BYTES or buffer[offset + 36] == _OPEN:
        return False
    return not wants(int.from_bytes(buffer[offset + 48 : offset + 56], "little"))
