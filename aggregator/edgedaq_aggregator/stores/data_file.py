"""One file that a store appends to, and what of it the next commit covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from edgedaq.storage import Buffer, Storage, write_all

from edgedaq_aggregator.stores.commits import FileMark
from edgedaq_aggregator.stores.ranges import BlockStreams, OpenBlock
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["Buffer", "DataFile", "FileUnusableError", "MakeFile", "holds"]

FLUSH_BYTES = 1 << 20
IOV_MAX = 512
_CHECK_BYTES = 1 << 22

Compressor = Callable[[bytes], bytes]


class FileUnusableError(Exception):
    """A file cannot be continued; it is left alone, and rows go to another one."""


class DataFile:
    """One open file.

    ``replaces`` is the name that an overwriting file gets at its first commit, else None. ``pins`` counts the
    commits under way that still need the descriptor.

    Args:
        size: Bytes that it is known to hold; the next append goes there.
        header: xxh3-64 of its first line, 0 for none.
        compress: Makes one compressed frame of all that is appended between two commits.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        fd: int,
        storage: Storage,
        *,
        size: int,
        header: int,
        owner: int,
        compress: Compressor | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.fd = fd
        self.size = size
        self.header = header
        self.owner = owner
        self.replaces: Path | None = None
        self.is_fresh = False
        self.is_checked = False
        self.is_gone = False
        self.is_full = False
        """Rows go on in the next file; its next mark says that it is left alone."""
        self.pins = 0
        self.last_used = 0
        self._storage = storage
        self._compress = compress
        self.block = OpenBlock(size)
        self._is_marked = True
        self._buffers: list[Buffer] = []
        self._buffered = 0

    @property
    def disk_end(self) -> int:
        """Length of the file on disk, as this process has left it."""
        return self.size

    @property
    def is_dirty(self) -> bool:
        """It was appended to since the last mark."""
        return not self._is_marked

    @property
    def length(self) -> int:
        """Bytes that it has with what is not flushed yet, that not compressed."""
        return self.size + self._buffered

    @property
    def is_empty(self) -> bool:
        """Nothing was ever written to it."""
        return not self.size and not self._buffered

    def is_adoptable(self, header: bytes) -> bool:
        """Tell whether rows of someone else's can be continued: the same first line, and a whole last one."""
        first = self._storage.pread(self.fd, len(header), 0)
        return first == header and (not header or self._storage.pread(self.fd, 1, self.size - 1) == b"\n")

    def prepare(self, buffers: Sequence[Any]) -> None:
        """Be told what is to be appended next: whatever it is, bytes fit.

        Raises:
            FileUnusableError: It cannot be continued; nothing of it was changed.
            WireError: No file can be made for such rows.
        """

    def begin(self, header: bytes) -> None:
        """Write the first line of an empty file."""
        self.append([header])

    def append(self, buffers: Sequence[Any]) -> None:
        """Append what was prepared; the caller leaves it as it is until ``flush``.

        Raises:
            OSError: The file must be recovered before it is used again.
        """
        self._is_marked = False
        self._buffers.extend(buffers)
        self._buffered += sum(map(len, buffers))
        if self._buffered >= FLUSH_BYTES and self._compress is None:
            self.flush()

    def tell(self, stream: int, first: int, last: int, rows: int) -> None:
        """Be told whose rows were appended."""
        self.block.tell(stream, first, last, rows)

    def stage(self, undo: UndoLog) -> None:
        """Say what ``flush`` will replace: nothing, it only appends."""

    def flush(self) -> None:
        """Write what was appended; not durable.

        Raises:
            OSError: The file must be recovered before it is used again.
        """
        if not self._buffered:
            return
        buffers, self._buffers, self._buffered = self._buffers, [], 0
        if self._compress is not None:
            buffers = [self._compress(b"".join(buffers))]
        for start in range(0, len(buffers), IOV_MAX):
            part = buffers[start : start + IOV_MAX]
            write_all(self._storage, self.fd, part, self.size)
            for buffer in part:
                self.block.extend(buffer)
                self.size += len(buffer)

    def go_on(self, size: int, block: OpenBlock | None = None) -> None:
        """Append at ``size``, to a block that ends there, else in a new one."""
        self.size = size
        self.block = block if block is not None and block.end == size else OpenBlock(size)

    def mark(self) -> tuple[FileMark, BlockStreams | None]:
        """Return what a commit is to record now, None for no block; what follows belongs to the next one."""
        block = self.block
        mark = FileMark(self.size, block.start, block.digest, self.header, self.owner, self.is_full)
        found = mark, block.held
        if block.is_full:
            self.block = OpenBlock(self.size)
        self._is_marked, self.is_checked = True, False
        return found

    def let_go(self) -> None:
        """Forget what is not flushed; the descriptor is closed next."""


MakeFile = Callable[..., DataFile]
"""``DataFile``, or what makes one like it; called as it is."""


def holds(storage: Storage, fd: int, mark: FileMark) -> bool:
    """Tell whether the bytes of the last commits are those that were recorded."""
    digest = xxhash.xxh3_64()
    for at in range(mark.start, mark.end, _CHECK_BYTES):
        digest.update(storage.pread(fd, min(_CHECK_BYTES, mark.end - at), at))
    return mark.start == mark.end or digest.intdigest() == mark.digest
