"""One segment file, opened for reading: finds its salt, reads records, looks past damage.

Readers use ``pread``: a disk error is then an ``OSError`` for the page it happened on, which becomes a hole,
not the death of the process.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from xxhash import xxh3_64_intdigest

from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.segment_format import (
    CHECKED_BYTES,
    PREFIX,
    PREFIX_BYTES,
    SEGMENT_HEADER_BYTES,
    Control,
    Entry,
    Header,
    Hole,
    RecordKind,
    decode_header,
    file_name,
    first_of,
    parse,
    read_checkpoint,
)
from edgedaq.storage import Storage

__all__ = ["SegmentFile", "list_segments"]

_CHUNK_BYTES = 1 << 20
_PAGE_BYTES = 4096
_FRAME_MAGIC = b"EDQ\x01"


def list_segments(storage: Storage, directory: Path) -> list[int]:
    """Return the first positions of the segments in a directory, ascending; none where it is absent."""
    try:
        names = storage.names(directory)
    except FileNotFoundError:
        return []
    return sorted(first for name in names if (first := first_of(name)) is not None)


class SegmentFile:
    """A segment, read only.

    ``header`` is None when it is damaged, ``salt`` 0 when no record tells it either. ``foreign`` is the
    header of a file that was taken into use under another name, when a power cut lost the renaming.

    Raises:
        OSError: There is no such file, or it cannot be opened.
    """

    def __init__(self, storage: Storage, directory: Path, first: int) -> None:
        self.path = directory / file_name(first)
        self.first = first
        self._storage = storage
        self.fd = storage.open(self.path)
        try:
            self.size = storage.size(self.fd)
            self.header: Header | None = None
            self.foreign: Header | None = None
            self._read_header()
            self.salt = self.header.salt if self.header else 0
            if not self.salt and not self.foreign:
                self.salt = self._salt_of_records()
        except BaseException:
            storage.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def reopen(self) -> None:
        """Open the file again after ``close``; nothing where it is open.

        Raises:
            OSError: It cannot be opened.
        """
        if self.fd < 0:
            self.fd = self._storage.open(self.path)

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self.fd >= 0:
            self._storage.close(self.fd)
            self.fd = -1

    @property
    def begin(self) -> int:
        """Position of the first record, the checkpoint."""
        return self.first + SEGMENT_HEADER_BYTES

    @property
    def is_current(self) -> bool:
        """Whether the file still is this segment: not trimmed, not recycled."""
        return self._storage.is_at(self.fd, self.path)

    def read(self, position: int, size_bytes: int) -> memoryview:
        """Return bytes from a position on, fewer only at the end of the file; an unreadable page is zeros."""
        offset = position - self.first
        try:
            return memoryview(self._storage.pread(self.fd, size_bytes, offset))
        except OSError as e:
            if e.errno != errno.EIO:
                raise
        end = min(offset + size_bytes, self.size)
        pages = bytearray()
        while offset < end:
            part = min(end, offset - offset % _PAGE_BYTES + _PAGE_BYTES) - offset
            try:
                pages += self._storage.pread(self.fd, part, offset).ljust(part, b"\0")
            except OSError:
                pages += bytes(part)
            offset += part
        return memoryview(bytes(pages))

    def chunk(
        self,
        position: int,
        limit: int,
        entries: list[Entry],
        *,
        max_bytes: int = _CHUNK_BYTES,
        wants: Callable[[int], bool] | None = None,
    ) -> tuple[int, int]:
        """Append records from ``position`` on to ``entries``, by one read.

        Returns:
            The position reached, and 0, or how ``parse`` says that no valid record is there (negative).
        """
        size = min(max_bytes, limit - position)
        while True:
            data = self.read(position, size)
            reached, need = parse(data, position, self.salt, limit, entries, wants)
            if need <= 0:
                is_short = need == 0 and reached == position and reached < limit
                return reached, -1 if is_short else need
            if reached > position:
                return reached, 0
            if len(data) < size or need <= size:
                return reached, -1
            size = need

    def find(self, position: int, limit: int) -> int | None:
        """Return where the next valid record from ``position`` on begins; None: none ends by ``limit``."""
        needle = self.salt.to_bytes(8, "little")
        position += -position % 8
        limit = min(limit, self.first + self.size)
        while position + PREFIX_BYTES <= limit:
            data = self.read(position, min(_CHUNK_BYTES, limit - position))
            text = bytes(data)
            at = text.find(needle, 8)
            while at >= 0:
                if not at % 8 and self._is_record(position + at - 8, limit):
                    return position + at - 8
                at = text.find(needle, at + 1)
            if len(text) < PREFIX_BYTES:
                break
            position += max(8, (len(text) - 16) & ~7)
        return None

    def walk(self, position: int, limit: int, *, trusted: bool) -> Iterator[Entry]:
        """Yield everything from ``position`` to ``limit``.

        Args:
            position: Where a record begins.
            limit: Where records end.
            trusted: Whether they are known to reach ``limit``, so that nothing there is a hole as well.
        """
        while position < limit:
            entries: list[Entry] = []
            position, problem = self.chunk(position, limit, entries)
            yield from entries
            if problem:
                resume = self.find(position + (-problem if problem < -1 else 8), limit)
                if resume is None:
                    if trusted:
                        yield Hole(position, limit, "damaged")
                    return
                yield Hole(position, resume, "damaged")
                position = resume

    def checkpoint(self) -> tuple[StreamTable, dict[str, object]] | None:
        """Return the table and cursor that the segment begins with; None when they are damaged."""
        entries: list[Entry] = []
        self.chunk(self.begin, self.first + self.size, entries, max_bytes=_PAGE_BYTES)
        if not entries or not isinstance(entries[0], Control) or entries[0].kind != RecordKind.CHECKPOINT:
            return None
        try:
            return read_checkpoint(entries[0].payload)
        except WireError:
            return None

    def _is_record(self, position: int, limit: int) -> bool:
        entries: list[Entry] = []
        self.chunk(position, limit, entries, max_bytes=PREFIX_BYTES + CHECKED_BYTES)
        if not entries:
            return False
        entry = entries[0]
        if isinstance(entry, Control) and entry.kind == RecordKind.CHECKPOINT:
            return entry.position == self.begin
        return True

    def _read_header(self) -> None:
        try:
            header = decode_header(self.read(self.first, SEGMENT_HEADER_BYTES))
        except WireError:
            return
        if header.first == self.first:
            self.header = header
        else:
            self.foreign = header

    def _salt_of_records(self) -> int:
        """Return the salt that the records bear when the header is damaged: each vouches for its own."""
        candidate = self.begin
        while candidate < self.first + self.size:
            data = self.read(candidate, _CHUNK_BYTES)
            if candidate == self.begin and (salt := _salt_at(data, 0, candidate)):
                return salt
            text = bytes(data)
            at = text.find(_FRAME_MAGIC)
            while at >= 0:
                start = at - 8 - PREFIX_BYTES
                if start >= 0 and not start % 8 and (salt := _salt_at(data, start, candidate + start)):
                    return salt
                at = text.find(_FRAME_MAGIC, at + 1)
            if len(text) < _CHUNK_BYTES:
                break
            candidate += _CHUNK_BYTES - 128
        return 0


def _salt_at(data: memoryview, offset: int, position: int) -> int:
    if len(data) - offset < PREFIX_BYTES:
        return 0
    check, salt, length, _ = PREFIX.unpack_from(data, offset)
    covered = data[offset + 8 : offset + PREFIX_BYTES + min(length, CHECKED_BYTES)]
    return salt if salt and xxh3_64_intdigest(covered, position) == check else 0
