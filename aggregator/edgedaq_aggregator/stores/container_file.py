"""A data file with an index inside, written by its library, committed as one step.

A *container* (ROOT, HDF5) cannot be cut back to a length: each commit also changes what is in its middle. So
its library writes to a ``HeldFile``, and a commit is::

    rows ─► library ─► held ─► undo log, fdatasync ─► file, fdatasync ─► commit record, fdatasync
            └───── the file is as it was ─────────┘  └─── is put back ─┘  └── the commit holds ──┘

Its ``FileMark`` has the length of the file as ``start`` and ``end``; ``digest`` is the xxh3-64 of everything
that was written since it was opened, seeded at random: no two commits of a file have the same mark.
It has no block (``ranges.py``): its bytes do not stay, so only its library can tell which rows are in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgedaq.errors import StoreError, WireError
from edgedaq.storage import Storage
from xxhash import xxh3_64

from edgedaq_aggregator.stores.commits import FileMark
from edgedaq_aggregator.stores.data_file import DataFile, FileUnusableError
from edgedaq_aggregator.stores.held_file import HeldFile, Staged
from edgedaq_aggregator.stores.ranges import BlockStreams
from edgedaq_aggregator.stores.row_columns import Rows
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["Container", "ContainerFile", "ContainerWriter"]

_LIBRARY_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError)


class ContainerWriter(Protocol):
    """A library that has a file open."""

    def append(self, rows: Rows) -> None:
        """Take rows; they may be kept until ``flush``."""

    def flush(self) -> None:
        """Write everything to the held file, which is then complete as it is."""

    def close(self) -> None:
        """Let the library go; what it writes now is dropped."""


class Container(Protocol):
    """A kind of container, with the options of a stream."""

    def writer(self, held: HeldFile, example: Rows) -> ContainerWriter:
        """Return a writer on a file, for rows like the example; makes it where it is empty."""


class ContainerFile(DataFile):
    """A ``DataFile`` that takes ``Rows``."""

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
        container: Container,
    ) -> None:
        super().__init__(path, name, fd, storage, size=size, header=header, owner=owner)
        self._container = container
        self._held = HeldFile(storage, fd, size)
        self._writer: ContainerWriter | None = None
        self._unfit = ""
        self._staged: Staged | None = None
        self._written = xxh3_64(os.urandom(8))

    @property
    def disk_end(self) -> int:
        """See ``DataFile``."""
        return self.size if self._writer is None else self._held.disk_end

    @property
    def length(self) -> int:
        """See ``DataFile``; rows that the library has not written yet have none."""
        return self._held.size

    @property
    def is_empty(self) -> bool:
        """See ``DataFile``."""
        return not self.size and not self.is_dirty

    def is_adoptable(self, header: bytes) -> bool:  # noqa: ARG002 -- any
        """See ``DataFile``; what was not written here cannot be put back."""
        return False

    def prepare(self, buffers: Sequence[Rows]) -> None:
        """See ``DataFile``."""
        if self._unfit:
            raise WireError(self._unfit)
        if self._writer is None:
            self._writer = self._opened(buffers[0])

    def begin(self, header: bytes) -> None:
        """See ``DataFile``; its columns are in the file anyway."""

    def append(self, buffers: Sequence[Rows]) -> None:
        """Append rows, which were prepared.

        Raises:
            StoreError: The library failed; the file must be recovered before it is used again.
        """
        if self._writer is None:
            message = f"{self.name}: rows must be prepared before they are appended"
            raise RuntimeError(message)
        self._is_marked = False
        try:
            for rows in buffers:
                self._writer.append(rows)
        except _LIBRARY_ERRORS as e:
            raise self._failure(e) from e

    def tell(self, stream: int, first: int, last: int, rows: int) -> None:
        """See ``DataFile``; it has no block."""

    def stage(self, undo: UndoLog) -> None:
        """See ``DataFile``."""
        if self._writer is None or not self.is_dirty:
            return
        try:
            self._writer.flush()
        except _LIBRARY_ERRORS as e:
            raise self._failure(e) from e
        self._staged = self._held.stage()
        undo.add(self.name, self._staged.undo)

    def flush(self) -> None:
        """See ``DataFile``; after ``stage``, whose undo is durable."""
        if self._staged is None:
            return
        staged, self._staged = self._staged, None
        self._held.apply(staged)
        for _, data in staged.writes:
            self._written.update(data)
        self._written.update(staged.size.to_bytes(8, "little"))
        self.size = staged.size

    def mark(self) -> tuple[FileMark, BlockStreams | None]:
        """See ``DataFile``."""
        self._is_marked, self.is_checked = True, False
        digest = self._written.intdigest()
        return FileMark(self.size, self.size, digest, self.header, self.owner, self.is_full), None

    def let_go(self) -> None:
        """See ``DataFile``."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._held.close()

    def _opened(self, rows: Rows) -> ContainerWriter:
        is_new = self._held.size == 0
        try:
            return self._container.writer(self._held, rows)
        except _LIBRARY_ERRORS as e:
            if is_new:
                self._held.rewind()
                self._unfit = f"no file can have these {len(rows.fields)} columns: {type(e).__name__}: {e}"
                raise WireError(self._unfit) from e
            message = f"its library cannot continue it: {e}"
            raise FileUnusableError(message) from e

    def _failure(self, e: BaseException) -> StoreError:
        return StoreError(f"{self.name}: {type(e).__name__}: {e}")
