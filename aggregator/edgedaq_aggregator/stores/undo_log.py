"""The undo log of one store: how files that are not only appended to go back to their last commit.

Before a commit changes such a file, what it replaces is durable here; so its bytes can be put back until the
commit record (``commits.py``) is durable. The file ``undo.log`` holds the entries of the commit under way::

    offset  size  field
         0     8  magic    b"EDQUND01"
         8     8  salt     random, the same in all entries of one commit
        16     8  length   of the payload
        24     8  check    xxh3-64 of bytes 0 .. 24 and the payload
        32        payload  u32 length of a msgpack map, the map, the bytes of all ranges back to back,
                           zeros up to a multiple of 8
                  map      {file: path below out_dir, mark: its FileMark as it was committed,
                            ranges: [[offset, length], ...]}

An entry holds as long as the commit record of its file is that mark: then, and only then, the ranges are put
back and the file is cut to ``mark.end``. Of several entries of one file the later one is applied first.
Applying is idempotent. Entries with another salt than the first one are what a longer, older commit left.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import WireError
from edgedaq.frame import pack_map, unpack_map
from edgedaq.logsetup import get_logger
from edgedaq.storage import Buffer, Storage, write_all
from xxhash import xxh3_64

from edgedaq_aggregator.stores.commits import FileMark

__all__ = ["UNDO_NAME", "Range", "UndoLog"]

UNDO_NAME = "undo.log"
_MAGIC = b"EDQUND01"
_PREFIX = struct.Struct("<8s8sQQ")
_LENGTH = struct.Struct("<I")


class Range(NamedTuple):
    """Bytes at an offset."""

    offset: int
    data: Buffer


class _Entry(NamedTuple):
    file: str
    mark: FileMark
    ranges: list[Range]


class UndoLog:
    """The log of one store, whose directory is this process's alone.

    Args:
        committed: The marks as they are durable now; looked at when an entry is added.
    """

    def __init__(self, directory: Path, storage: Storage, committed: Mapping[str, FileMark]) -> None:
        self._path = directory / UNDO_NAME
        self._storage = storage
        self._committed = committed
        self._fd = -1
        self._end = self._end_at_commit = 0
        self._salt = os.urandom(8)
        self._added: list[Buffer] = []

    def restore(self, out_dir: Path) -> None:
        """Put every file back whose commit did not become durable.

        Raises:
            OSError: It may be tried again.
        """
        for entry in reversed(self._read()):
            path = out_dir / entry.file
            if self._committed.get(entry.file) != entry.mark or path.is_symlink() or not path.is_file():
                continue
            fd = self._storage.open(path, write=True)
            try:
                for offset, data in entry.ranges:
                    write_all(self._storage, fd, [data], offset)
                self._storage.truncate(fd, entry.mark.end)
                self._storage.fdatasync(fd)
            finally:
                self._storage.close(fd)
            get_logger().info("file.restored", path=entry.file, committed_bytes=entry.mark.end)

    def knows(self, file: str) -> bool:
        """Tell whether there is a durable mark of a file, to go back to."""
        return file in self._committed

    def add(self, file: str, ranges: Sequence[Range]) -> None:
        """Add what a commit is about to replace in a file; durable after ``sync``."""
        mark = self._committed[file]
        places = [[offset, len(data)] for offset, data in ranges]
        head = pack_map({"file": file, "mark": list(mark), "ranges": places})
        parts: list[Buffer] = [_LENGTH.pack(len(head)), head, *(data for _, data in ranges)]
        parts.append(bytes(-sum(map(len, parts)) & 7))
        length = sum(map(len, parts))
        digest = xxh3_64(_MAGIC + self._salt + struct.pack("<Q", length))
        for part in parts:
            digest.update(part)
        self._added += [_PREFIX.pack(_MAGIC, self._salt, length, digest.intdigest()), *parts]

    def sync(self) -> None:
        """Return once everything added is durable."""
        if not self._added:
            return
        if self._fd < 0:
            is_new = not self._path.exists()
            self._fd = self._storage.open(self._path, write=True, create=True)
            if is_new:
                self._storage.sync_directory(self._path.parent)
        added = b"".join(self._added)
        self._added = []
        write_all(self._storage, self._fd, [added], self._end)
        self._storage.fdatasync(self._fd)
        self._end += len(added)

    def begin_commit(self) -> None:
        """Be told that everything added so far belongs to the commit that is made durable now."""
        self._end_at_commit = self._end

    def committed(self) -> None:
        """Be told that it is durable: its entries hold no more, and are written over."""
        if self._end == self._end_at_commit:
            self._end, self._salt = 0, os.urandom(8)

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            self._storage.close(self._fd)
            self._fd = -1

    def _read(self) -> list[_Entry]:
        if not self._path.exists():
            return []
        fd = self._storage.open(self._path)
        try:
            image = memoryview(self._storage.pread(fd, self._storage.size(fd), 0))
        finally:
            self._storage.close(fd)
        return list(_entries(image))


def _entries(image: memoryview) -> Iterator[_Entry]:
    salt, at = bytes(image[8:16]), 0
    while at + _PREFIX.size <= len(image):
        magic, found, length, check = _PREFIX.unpack_from(image, at)
        start = at + _PREFIX.size
        if (magic, found) != (_MAGIC, salt) or start + length > len(image):
            return
        digest = xxh3_64(image[at : at + 24])
        digest.update(image[start : start + length])
        if digest.intdigest() != check:
            return
        entry = _entry(image[start : start + length])
        if entry is None:
            return
        yield entry
        at = start + length


def _entry(payload: memoryview) -> _Entry | None:
    (length,) = _LENGTH.unpack_from(payload)
    at = _LENGTH.size + length
    try:
        told = unpack_map(payload[_LENGTH.size : at])
        file, mark, places = told["file"], told["mark"], told["ranges"]
        if not (isinstance(file, str) and isinstance(mark, list) and isinstance(places, list)):
            return None
        ranges = []
        for offset, size in places:
            ranges.append(Range(offset, payload[at : at + size]))
            at += size
        return _Entry(file, FileMark(*mark), ranges)
    except (WireError, KeyError, TypeError, ValueError):
        return None
