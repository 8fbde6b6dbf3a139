"""Logs of records in one file, as ``commits.log`` and ``ranges.log`` are; what records say is drawn there.

Little-endian::

    offset  size  field
         0     8  magic     says which log it is
         8     8  salt      random per file: bytes of an older file are never read as new
        16     8  check     xxh3-64 of bytes 0 .. 16
        24    40  zeros
        64        records, each at a multiple of 8:
               8  salt
               4  length    of the payload
               4  number    each one more than the one before it
               8  check     xxh3-64 of the 16 bytes before and the payload
                  payload   a msgpack map, zeros up to a multiple of 8

Keys of a payload that a reader does not know are passed over. ``RecordFile`` writes one, ``scan`` reads one.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import WireError
from edgedaq.frame import pack_map, unpack_map
from edgedaq.storage import Storage, write_all
from xxhash import xxh3_64_intdigest

__all__ = ["RecordFile", "Scan", "read_image", "scan"]

_HEADER_BYTES = 64
_PREFIX = struct.Struct("<QIIQ")
_PREFIX_HEAD = struct.Struct("<QII")
_ONE_BYTES_MAX = 1 << 28


class Scan(NamedTuple):
    """What a log holds: ``(number, payload)`` of each record, in order, and what is damaged (empty: nothing).

    ``end`` is behind the last record before any damage.
    """

    records: list[tuple[int, dict[str, object]]]
    damage: str
    salt: int = 0
    end: int = 0


class RecordFile:
    """A log that is written: from ``begin``, which replaces an older one by rename, or going on in it.

    Args:
        magic: Eight bytes.
    """

    def __init__(self, path: Path, magic: bytes, storage: Storage) -> None:
        self.end = 0
        self.next_number = 0
        self.size = 0
        self._path = path
        self._magic = magic
        self._storage = storage
        self._salt = 0
        self._fd = -1

    @property
    def is_open(self) -> bool:
        """It can be appended to."""
        return self._fd >= 0

    def begin(self, payloads: Sequence[dict[str, object]], first_number: int, room_bytes: int) -> None:
        """Replace the file by one that holds these, in one step.

        Args:
            room_bytes: What the file has at least, from the start: a growing one costs a second flush.

        Raises:
            OSError: The old one is still in place, or the new one is.
        """
        salt = int.from_bytes(os.urandom(8), "little")
        head = self._magic + struct.pack("<Q", salt)
        head += struct.pack("<Q", xxh3_64_intdigest(head))
        records = [_record(salt, first_number + at, payload) for at, payload in enumerate(payloads)]
        image = b"".join((head.ljust(_HEADER_BYTES, b"\0"), *records))
        size = max(room_bytes, 4 * len(image) & ~7) if room_bytes else len(image)
        fresh = self._path.with_name(f"{self._path.name}.new")
        fd = self._storage.open(fresh, write=True, create=True)
        try:
            self._storage.truncate(fd, 0)
            write_all(self._storage, fd, [image.ljust(size, b"\0")], 0)
            self._storage.fdatasync(fd)
            self._storage.rename(fresh, self._path)
            self._storage.sync_directory(self._path.parent)
        except BaseException:
            self._storage.close(fd)
            raise
        self.close()
        self._fd, self._salt, self.size, self.end = fd, salt, size, len(image)
        self.next_number = first_number + len(payloads)

    def go_on(self, found: Scan) -> None:
        """Append to the file that this was found in; what lies behind its end is cut off.

        Raises:
            OSError: It cannot be opened for writing.
        """
        self._fd = self._storage.open(self._path, write=True)
        self._storage.truncate(self._fd, found.end)
        self._salt, self.size, self.end = found.salt, found.end, found.end
        self.next_number = found.records[-1][0] + 1 if found.records else 0

    def bytes_of(self, payloads: Sequence[dict[str, object]]) -> bytes:
        """Return the next records as they would be appended."""
        return b"".join(
            _record(self._salt, self.next_number + at, payload) for at, payload in enumerate(payloads)
        )

    def append(self, records: bytes, count: int) -> None:
        """Append what ``bytes_of`` returned and make it durable.

        Raises:
            OSError: The file must be scanned before it is used again.
        """
        write_all(self._storage, self._fd, [records], self.end)
        self._storage.fdatasync(self._fd)
        self.end += len(records)
        self.next_number += count

    def close(self) -> None:
        """Let go of the file; safe to call again."""
        if self._fd >= 0:
            self._storage.close(self._fd)
            self._fd = -1


def read_image(path: Path, storage: Storage) -> memoryview | None:
    """Return the bytes of a log; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        fd = storage.open(path)
        try:
            return memoryview(storage.pread(fd, min(storage.size(fd), _ONE_BYTES_MAX), 0))
        finally:
            storage.close(fd)
    return None


def scan(image: memoryview, magic: bytes, *, first: int | None = 0) -> Scan:
    """Return what a log holds; valid records behind a damaged one are among it.

    Args:
        first: The number of its first record; None where any may be.
    """
    head = bytes(image[:16])
    if (
        len(image) < _HEADER_BYTES
        or head[:8] != magic
        or int.from_bytes(image[16:24], "little") != xxh3_64_intdigest(head)
    ):
        return Scan([], "the header is damaged")
    salt = head[8:16]
    at = _HEADER_BYTES
    records: list[tuple[int, dict[str, object]]] = []
    found = _record_at(image, at, salt)
    number = first if first is not None else found[0] if found is not None else 0
    begun = number
    while found is not None and found[0] == number:
        records.append((number, found[2]))
        at, number = at + found[1], number + 1
        found = _record_at(image, at, salt)
    end = at
    salt_int = int.from_bytes(salt, "little")
    if number == begun and first is not None:
        return Scan([], "the first record is damaged", salt_int, end)
    damaged = number
    while (later := _next_record(image, at, salt)) is not None:
        start, record = later
        at = start + record[1]
        if record[0] > number:
            records.append((record[0], record[2]))
            number = record[0]
    damage = f"record {damaged} is damaged, with valid ones behind it" if number > damaged else ""
    return Scan(records, damage, salt_int, end)


def _record(salt: int, number: int, payload: dict[str, object]) -> bytes:
    packed = pack_map(payload)
    head = _PREFIX_HEAD.pack(salt, len(packed), number)
    check = struct.pack("<Q", xxh3_64_intdigest(head + packed))
    return head + check + packed + bytes(-len(packed) & 7)


def _record_at(image: memoryview, at: int, salt: bytes) -> tuple[int, int, dict[str, object]] | None:
    """Return number, length and payload of the record at ``at``; None when there is no valid one."""
    if at + _PREFIX.size > len(image) or image[at : at + 8] != salt:
        return None
    _, length, number, check = _PREFIX.unpack_from(image, at)
    start = at + _PREFIX.size
    if start + length > len(image):
        return None
    payload = image[start : start + length]
    if xxh3_64_intdigest(bytes(image[at : at + 16]) + bytes(payload)) != check:
        return None
    try:
        return number, _PREFIX.size + length + (-length & 7), unpack_map(payload)
    except WireError:
        return None


def _next_record(
    image: memoryview, at: int, salt: bytes
) -> tuple[int, tuple[int, int, dict[str, object]]] | None:
    whole = image.obj if isinstance(image.obj, bytes) else bytes(image)
    while (at := whole.find(salt, at)) >= 0:
        record = _record_at(image, at, salt)
        if record is not None:
            return at, record
        at += 1
    return None
