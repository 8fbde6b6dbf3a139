"""A file as its library sees it: what the library writes over is held in memory until it is committed.

Libraries that keep an index inside their file (uproot, h5py) write to the end, and over what is there. A
``HeldFile`` is the Python file object that they are given. What they write beyond the committed end goes to
disk at once: nothing points to it yet, and it is cut off if the commit does not come. What they write before
it is held. ``stage`` tells what is to be written over, and what it replaces (``undo_log.py``)::

    library ── write ─┬─ beyond the end ────────────────────────────────────────────────► disk
              ▲       └─ before it ─► held ── stage ──► Staged(undo, writes, size) ── apply ──► disk
              └── read, of both

Writes are applied from back to front, so that the root of an index comes last, for those who read meanwhile.

The file may be *rewound* to an earlier state, its base: the state when it was opened, or when ``settle`` was
last called. Only what was overwritten since is kept for it.
"""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from edgedaq.storage import Buffer, Storage, write_all

from edgedaq_aggregator.stores.undo_log import Range

__all__ = ["HeldFile", "Staged"]

_COPY_BYTES = 4 << 20


class Staged(NamedTuple):
    """One commit of a file: what is on disk now where it changes, the writes in order, and the new size."""

    undo: list[Range]
    writes: list[Range]
    size: int


class HeldFile(io.RawIOBase):
    """A file object over a descriptor of somebody else; ``close`` forgets what is held.

    Args:
        size: Of the file on disk, which nobody else changes.
    """

    def __init__(self, storage: Storage, fd: int, size: int) -> None:
        super().__init__()
        self._storage = storage
        self._fd = fd
        self._disk_size = size  # what is committed
        self.disk_end = size
        """Length of the file on disk now."""
        self._kept = size  # what is committed is of the file up to here, unless an extent covers it
        self._size = size
        self._error: BaseException | None = None
        self._at = 0
        self._extents = _Extents()
        self._base = _Extents()
        self._base_size = size
        self._is_settling = False

    @property
    def size(self) -> int:
        """Its length, as the library has made it."""
        return self._size

    def settle(self) -> None:
        """Make what is held, once it is applied, the state that ``rewind`` leads to."""
        self._is_settling = True

    def rewind(self) -> None:
        """Go back to the base; what is not committed is dropped."""
        if self.disk_end > self._disk_size:
            self._cut_beyond(self._disk_size)
        self._extents, self._kept, self._size = _Extents(), self._disk_size, self._disk_size
        self.truncate(self._base_size)
        for offset, data in self._base:
            self._write_at(offset, data)

    def stage(self) -> Staged:
        """Return what ``apply`` will do, and what undoes it. Nothing may be written in between.

        Raises:
            OSError: The disk did not take something; the file must be recovered.
        """
        if self._error is not None:
            raise self._error
        writes: list[Range] = []
        undo: list[Range] = []
        for offset, data in self._extents:
            old = self._storage.pread(self._fd, len(data), offset)
            for begin, end in _changes(old, data):
                undo.append(Range(offset + begin, old[begin:end]))
                writes.append(Range(offset + begin, data[begin:end]))
        for offset in range(self._size, self._disk_size, _COPY_BYTES):
            count = min(_COPY_BYTES, self._disk_size - offset)
            undo.append(Range(offset, self._storage.pread(self._fd, count, offset)))
        return Staged(undo, writes[::-1], self._size)

    def apply(self, staged: Staged) -> None:
        """Write what was staged; not durable.

        Raises:
            OSError: The file must be recovered before it is used again.
        """
        for offset, data in staged.writes:
            write_all(self._storage, self._fd, [data], offset)
        if self.disk_end != staged.size:
            self._storage.truncate(self._fd, staged.size)
        if self._is_settling:
            self._base, self._base_size, self._is_settling = _Extents(), staged.size, False
        else:
            for offset, data in staged.undo:
                self._base.add_below(offset, data, self._base_size)
        self._extents = _Extents()
        self._disk_size = self._kept = self.disk_end = staged.size

    # What libraries call

    def readable(self) -> bool:
        """See ``io``."""
        return True

    def writable(self) -> bool:
        """See ``io``."""
        return True

    def seekable(self) -> bool:
        """See ``io``."""
        return True

    def tell(self) -> int:
        """See ``io``."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See ``io``."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """See ``io``."""
        count = self._size - self._at if size is None or size < 0 else size
        found = self._read_at(self._at, max(min(count, self._size - self._at), 0))
        self._at += len(found)
        return bytes(found)

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        """See ``io``."""
        view = memoryview(buffer).cast("B")
        found = self._read_at(self._at, max(min(len(view), self._size - self._at), 0))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        """See ``io``; keeps nothing of the caller's."""
        view = memoryview(data).cast("B")
        self._write_at(self._at, view)
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """See ``io``."""
        wanted = self._at if size is None else size
        if wanted < self._size:
            self._extents.cut(wanted)
            self._kept = min(self._kept, wanted)
            if self._size > self._disk_size:
                self._cut_beyond(max(wanted, self._disk_size))
            self._size = wanted
        else:
            self._grow(wanted)
        return wanted

    def _write_at(self, offset: int, data: Buffer) -> None:
        """Write; whatever fails comes up in ``stage``: no library expects it in its middle."""
        if not len(data):
            return
        self._grow(offset)
        inside = min(max(self._disk_size - offset, 0), len(data))
        if inside:
            self._extents.put(offset, bytes(data[:inside]))
        if inside < len(data):
            self._write_beyond(offset + inside, data[inside:])
        self._size = max(self._size, offset + len(data))

    def _write_beyond(self, offset: int, data: Buffer) -> None:
        """Write behind what is committed; once that has failed, only hold: HDF5 reads back, or hangs."""
        if self._error is None:
            try:
                write_all(self._storage, self._fd, [data], offset)
                self.disk_end = max(self.disk_end, offset + len(data))
            except BaseException as e:  # noqa: BLE001 -- through the C of HDF5 it ends the process
                self._error = e
        if self._error is not None:
            self._extents.put(offset, bytes(data))

    def _grow(self, size: int) -> None:
        """Make it longer by zeros; what is committed where it was cut before is none."""
        stale_end = min(size, self._disk_size)
        if self._size < stale_end:
            self._extents.put(self._size, bytes(stale_end - self._size))
        self._size = max(self._size, size)

    def _cut_beyond(self, size: int) -> None:
        try:
            self._storage.truncate(self._fd, size)
            self.disk_end = size
        except BaseException as e:  # noqa: BLE001 -- as above
            self._error = self._error or e

    def _read_at(self, offset: int, count: int) -> Buffer:
        end = offset + count
        if offset >= self._disk_size or end <= self._kept:
            found = self._storage.pread(self._fd, count, offset)
            pieces = list(self._extents.within(offset, end))
            if len(found) == count and not pieces:
                return found
            mixed = bytearray(found).ljust(count, b"\0")
        else:
            pieces = list(self._extents.within(offset, end))
            mixed = bytearray(count)
            for begin, stop in ((offset, min(end, self._kept)), (self._disk_size, end)):
                if begin < stop:
                    found = self._storage.pread(self._fd, stop - begin, begin)
                    mixed[begin - offset : begin - offset + len(found)] = found
        for start, data in pieces:
            mixed[start - offset : start - offset + len(data)] = data
        return mixed


class _Extents:
    """Bytes at offsets; none overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._data: dict[int, Buffer] = {}

    def __iter__(self) -> Iterator[Range]:
        for start in self._starts:
            yield Range(start, self._data[start])

    def put(self, offset: int, data: Buffer) -> None:
        """Add bytes, in place of those that are there."""
        old = self._data.get(offset)
        if old is not None and len(old) == len(data):
            self._data[offset] = data
            return
        end = offset + len(data)
        first, last = self._overlapping(offset, end)
        kept: list[Range] = []
        for start in self._starts[first:last]:
            held = self._data.pop(start)
            if start < offset:
                kept.append(Range(start, memoryview(held)[: offset - start]))
            if start + len(held) > end:
                kept.append(Range(end, memoryview(held)[end - start :]))
        kept.append(Range(offset, data))
        kept.sort(key=lambda piece: piece.offset)
        self._starts[first:last] = [start for start, _ in kept]
        self._data.update(kept)

    def add_below(self, offset: int, data: Buffer, limit: int) -> None:
        """Add bytes before ``limit`` where there are none."""
        end = min(offset + len(data), limit)
        at = offset
        for start, held in [*self.within(offset, end), Range(max(end, offset), b"")]:
            if at < start:
                self.put(at, memoryview(data)[at - offset : start - offset])
            at = start + len(held)

    def cut(self, size: int) -> None:
        """Forget what lies from ``size`` on."""
        first, _ = self._overlapping(size, size + 1)
        if first < len(self._starts) and self._starts[first] < size:
            start = self._starts[first]
            self._data[start] = memoryview(self._data[start])[: size - start]
            first += 1
        for start in self._starts[first:]:
            del self._data[start]
        del self._starts[first:]

    def within(self, begin: int, end: int) -> Iterator[Range]:
        """Yield what lies between two offsets, in order."""
        first, last = self._overlapping(begin, end)
        for start in self._starts[first:last]:
            data = self._data[start]
            if start < begin or start + len(data) > end:
                data = memoryview(data)[max(begin - start, 0) : end - start]
            yield Range(max(start, begin), data)

    def _overlapping(self, begin: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._starts, begin)
        if first and self._starts[first - 1] + len(self._data[self._starts[first - 1]]) > begin:
            first -= 1
        return first, max(bisect.bisect_left(self._starts, end), first)


def _changes(old: Buffer, new: Buffer) -> list[tuple[int, int]]:
    """Return the range outside of which both are equal; none when they are."""
    if old == new:
        return []
    differs = np.frombuffer(old, "u1") != np.frombuffer(new, "u1")
    begin = int(differs.argmax())
    return [(begin, len(differs) - int(differs[::-1].argmax()))]
