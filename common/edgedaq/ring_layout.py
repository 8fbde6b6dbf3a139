r"""The ring: shared memory of one life of one job, a file on tmpfs that outlives its process.

One process, the producer, writes it; consumers on the same host map it read-only. Little-endian words of 8
bytes, each stored by one native instruction (an item of a cast memoryview)::

    offset          size                 area
    0               4096                 header
    4096            256 * 64             stream table: the account of every stream of this life
    opens_offset    opens_bytes          OPEN frames back to back, only ever appended to
    slots_offset    slots * slot_stride  open frames (below)
    data_offset     ring_bytes           sealed frames

    header   0  8  magic b"EDQRING\\1" (the last byte is the version)
             8  8  t_birth_ns, UTC
            16  8  streams_max          24  8  opens_offset     32  8  opens_bytes
            40  8  slots_offset         48  8  slots            56  8  slot_bytes
            64  8  slot_ends            72  8  data_offset      80  8  ring_bytes
            88  8  identity_bytes       96  8  check: xxh3-64 of bytes 0 .. 96 and of the identity
           128  8  published            192 8  released        256  8  opens_used      (words that change)
           512     identity: msgpack map {node, job, job_type, life, boot, claims: {consumer: [topic, ...]}}

    stream   0  8  stream id (0: entry not used; stored last)
     entry   8  8  position of its OPEN in the opens area
            16  8  next_seq: of what was sealed            24  8  rows: sealed or dropped
            32  8  closed: 1 after CLOSE was published

    slot     0  8  stream id (0: free)                      8  8  form: 1 PACKED, 2 RAW, 3 ROWS
            16  8  row_base: rows of the stream before the slot's first row
            24  8  commit: rows << 32 | bytes of what was put
            32  8  t_first_ns, UTC, 0 not known            40  8  t_put_ns, monotonic, 0 not known
            48  8  row_bytes (PACKED), prefix_bytes (ROWS)
            64     slot_ends u32 end offsets (RAW, ROWS), then slot_bytes of data, padded to 64
                   (ROWS: prefix_bytes of a msgpack map {column: dtype}, then one msgpack array per row)

Positions in the data area are absolute (u64, from 0 for ever); position p lies at ``p % ring_bytes``. A frame
never wraps: where it does not fit before the end, ``PAD`` at offset 8 of what is left says so (left out when
less than a frame's header is left). ``released`` <= ``published`` <= ``released + ring_bytes``; what lies
between the two is whole frames and padding.

To put is to append to a slot and to store its ``commit``, without a lock. To seal rows of a slot is, under a
lock: the frame in the data area, ``published``, the entry's ``next_seq``, the entry's ``rows``. The rows of a
slot that are not sealed yet are those beyond ``rows - row_base``. A slot that was sealed is rewound by
``commit = 0``, then ``row_base = rows``. After each of these stores, what was put and is not lost can be told
from the memory alone; how is in ``salvage``.

Memory is read by others only where a message on a socket described it, or after the kernel has reported the
producer's death.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from xxhash import xxh3_64_intdigest

from edgedaq.errors import JobError, WireError
from edgedaq.frame import pack_map

__all__ = [
    "FORM_PACKED",
    "FORM_RAW",
    "FORM_ROWS",
    "HEADER_AREA_BYTES",
    "PAD",
    "STREAMS_MAX",
    "W_CLOSED",
    "W_COMMIT",
    "W_FORM",
    "W_NEXT_SEQ",
    "W_OPENS_USED",
    "W_OPEN_AT",
    "W_PUBLISHED",
    "W_RELEASED",
    "W_ROWS",
    "W_ROW_BASE",
    "W_SLOT_STREAM",
    "W_STREAM",
    "W_T_FIRST",
    "W_T_PUT",
    "W_WIDTH",
    "Identity",
    "Layout",
    "plan_layout",
    "read_layout",
    "write_header",
]

STREAMS_MAX = 256
_OPENS_BYTES = 256 << 10

_MAGIC = b"EDQRING\1"
PAD = b"PADDING\0"
_SLOT_HEADER = 64
FORM_PACKED, FORM_RAW, FORM_ROWS = 1, 2, 3

# Indexes of words: in the header, in a stream's entry, in a slot.
W_PUBLISHED, W_RELEASED, W_OPENS_USED = 16, 24, 32
W_STREAM, W_OPEN_AT, W_NEXT_SEQ, W_ROWS, W_CLOSED = 0, 1, 2, 3, 4
W_SLOT_STREAM, W_FORM, W_ROW_BASE, W_COMMIT, W_T_FIRST, W_T_PUT, W_WIDTH = 0, 1, 2, 3, 4, 5, 6

HEADER_AREA_BYTES = 4096
_IDENTITY_OFFSET = 512
_ENTRY_BYTES = 64
_FIXED_WORDS = 12
_RING_BYTES_MAX = 1 << 40


class Identity(msgspec.Struct, frozen=True):
    """Whose ring it is; ``claims`` maps a consumer that holds the ring from its birth to its topics."""

    node: str
    job: str
    job_type: str
    life: str
    boot: str
    claims: dict[str, list[str]] = {}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in one ring file; checked, so that no access built on it leaves the map."""

    t_birth_ns: int
    opens_offset: int
    opens_bytes: int
    slots_offset: int
    slots: int
    slot_bytes: int
    slot_ends: int
    data_offset: int
    ring_bytes: int
    identity: Identity

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next."""
        return _slot_stride(self.slot_ends, self.slot_bytes)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.data_offset + self.ring_bytes

    def entry_offset(self, index: int) -> int:
        """Return where entry ``index`` of the stream table lies."""
        return HEADER_AREA_BYTES + index * _ENTRY_BYTES

    def slot_offset(self, index: int) -> int:
        """Return where slot ``index`` lies."""
        return self.slots_offset + index * self.slot_stride

    def words(self, buffer: memoryview, offset: int, count: int = 8) -> memoryview:
        """Return ``count`` words at ``offset`` of the mapped file, each one native store or load."""
        return buffer[offset : offset + 8 * count].cast("Q")

    def header_words(self, buffer: memoryview) -> memoryview:
        """Return the header's words, indexed by ``W_PUBLISHED`` and its like."""
        return self.words(buffer, 0, 64)

    def slot_parts(self, buffer: memoryview, index: int) -> tuple[memoryview, memoryview, memoryview]:
        """Return the words, the u32 end offsets and the data bytes of a slot."""
        at = self.slot_offset(index)
        ends_at = at + _SLOT_HEADER
        data_at = ends_at + 4 * self.slot_ends
        return (
            self.words(buffer, at),
            buffer[ends_at:data_at].cast("I"),
            buffer[data_at : data_at + self.slot_bytes],
        )


def plan_layout(identity: Identity, t_birth_ns: int, ring_bytes: int, slot_bytes: int, slots: int) -> Layout:
    """Return the layout of a new ring; sizes are rounded up."""
    opens_offset = HEADER_AREA_BYTES + STREAMS_MAX * _ENTRY_BYTES
    slots_offset = opens_offset + _OPENS_BYTES
    slot_bytes = _up(slot_bytes, 64)
    slot_ends = max(slot_bytes // 16, 64)
    return Layout(
        t_birth_ns,
        opens_offset,
        _OPENS_BYTES,
        slots_offset,
        slots,
        slot_bytes,
        slot_ends,
        _up(slots_offset + slots * _slot_stride(slot_ends, slot_bytes), mmap.PAGESIZE),
        _up(ring_bytes, mmap.PAGESIZE),
        identity,
    )


def read_layout(buffer: memoryview) -> Layout:
    """Return the layout that a mapped ring describes.

    Raises:
        WireError: It is not a ring of this version, or what it says does not fit its size.
    """
    magic = bytes(buffer[:8])
    if magic != _MAGIC:
        message = f"no ring of this version: expected magic {_MAGIC!r}, got {magic!r}"
        raise WireError(message)
    words = [int.from_bytes(buffer[8 * i : 8 * i + 8], "little") for i in range(_FIXED_WORDS + 1)]
    t_birth_ns, streams, opens_offset, opens_bytes = words[1:5]
    slots_offset, slots, slot_bytes, slot_ends, data_offset, ring_bytes, identity_bytes, check = words[5:]
    raw = bytes(buffer[_IDENTITY_OFFSET : min(_IDENTITY_OFFSET + identity_bytes, HEADER_AREA_BYTES)])
    if xxh3_64_intdigest(bytes(buffer[: 8 * _FIXED_WORDS]) + raw) != check:
        message = "checksum of a ring's header does not match"
        raise WireError(message)
    fits = (
        streams == STREAMS_MAX
        and opens_offset == HEADER_AREA_BYTES + STREAMS_MAX * _ENTRY_BYTES
        and slots_offset == opens_offset + opens_bytes
        and slots_offset + slots * _slot_stride(slot_ends, slot_bytes) <= data_offset
        and 0 < ring_bytes <= _RING_BYTES_MAX
        and data_offset % 8 == ring_bytes % 8 == 0
        and data_offset + ring_bytes == len(buffer)
    )
    if not fits:
        message = f"the areas that a ring's header describes do not fit its {len(buffer)} bytes"
        raise WireError(message)
    try:
        identity = msgspec.msgpack.decode(raw, type=Identity)
    except msgspec.DecodeError as e:
        message = f"a ring's identity is not valid: {e}"
        raise WireError(message) from e
    return Layout(
        t_birth_ns,
        opens_offset,
        opens_bytes,
        slots_offset,
        slots,
        slot_bytes,
        slot_ends,
        data_offset,
        ring_bytes,
        identity,
    )


def write_header(buffer: memoryview, layout: Layout) -> None:
    """Write what does not change in a ring's life.

    Raises:
        JobError: The identity has no room in the header.
    """
    raw = pack_map(msgspec.to_builtins(layout.identity))
    if len(raw) > HEADER_AREA_BYTES - _IDENTITY_OFFSET:
        message = f"a ring's identity must have at most {HEADER_AREA_BYTES - _IDENTITY_OFFSET} bytes"
        raise JobError(message)
    fixed: Sequence[int] = (
        layout.t_birth_ns,
        STREAMS_MAX,
        layout.opens_offset,
        layout.opens_bytes,
        layout.slots_offset,
        layout.slots,
        layout.slot_bytes,
        layout.slot_ends,
        layout.data_offset,
        layout.ring_bytes,
        len(raw),
    )
    buffer[:8] = _MAGIC
    for index, value in enumerate(fixed, start=1):
        buffer[8 * index : 8 * index + 8] = value.to_bytes(8, "little")
    buffer[_IDENTITY_OFFSET : _IDENTITY_OFFSET + len(raw)] = raw
    check = xxh3_64_intdigest(bytes(buffer[: 8 * _FIXED_WORDS]) + raw)
    buffer[8 * _FIXED_WORDS : 8 * _FIXED_WORDS + 8] = check.to_bytes(8, "little")


def _slot_stride(slot_ends: int, slot_bytes: int) -> int:
    return _up(_SLOT_HEADER + 4 * slot_ends + slot_bytes, 64)


def _up(value: int, step: int) -> int:
    return (value + step - 1) // step * step
