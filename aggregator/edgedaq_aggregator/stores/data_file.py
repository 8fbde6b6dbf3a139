"""One file that a store appends to, and what of it the next commit covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgedaq.storage import Buffer, Storage, write_all

from edgedaq_aggregator.stores.commits import FileMark
from edgedaq_aggregator.stores.ranges import BlockStreams, OpenBlock

__all__ = ["Buffer", "Compressor", "DataFile"]

FLUSH_BYTES = 1 << 20
IOV_MAX = 512

Compressor = Callable[[bytes], bytes]


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
        *,
        size: int,
        header: int,
        owner: int,
        compress: Compressor | None,
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
        self._compress = compress
        self.block = OpenBlock(size)
        self._is_marked = True
        self._buffers: list[Buffer] = []
        self._buffered = 0

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

    def append(self, buffers: Sequence[Buffer], storage: Storage) -> None:
        """Append buffers; the caller leaves them as they are until ``flush``.

        Raises:
            OSError: The file must be recovered before it is used again.
        """
        self._is_marked = False
        self._buffers.extend(buffers)
        self._buffered += sum(map(len, buffers))
        if self._buffered >= FLUSH_BYTES and self._compress is None:
            self.flush(storage)

    def flush(self, storage: Storage) -> None:
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
            write_all(storage, self.fd, part, self.size)
            for buffer in part:
                self.block.extend(buffer)
                self.size += len(buffer)

    def go_on(self, size: int, block: OpenBlock | None = None) -> None:
        """Append at ``size``, to a block that ends there, else in a new one."""
        self.size = size
        self.block = block if block is not None and block.end == size else OpenBlock(size)

    def mark(self) -> tuple[FileMark, BlockStreams]:
        """Return what a commit is to record now; what follows belongs to the next one."""
        block = self.block
        mark = FileMark(self.size, block.start, block.digest, self.header, self.owner, self.is_full)
        found = mark, block.held
        if block.is_full:
            self.block = OpenBlock(self.size)
        self._is_marked, self.is_checked = True, False
        return found
