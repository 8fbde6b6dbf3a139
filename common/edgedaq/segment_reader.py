"""Reading a log: in order from any position, in any process, without a lock, beside its writer.

A reader goes only as far as it is told (``upto``): a process other than the writer learns through a socket
what is durable, and never looks for itself. What it passes over it yields as a ``Hole``, followed by the GAPs
that the absence means for each stream (``segment_gaps.py``); so a consumer that judges by identity sees no
difference between a log that was damaged and one into which the GAPs had been written.

Segments may be trimmed under a slow reader, even the one it has open: its bytes then stop being valid, its
name is gone, and the reader goes on at the begin of the log behind a ``Hole`` that says ``trimmed``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.segment_file import SegmentFile, list_segments
from edgedaq.segment_format import Control, Entry, Hole, Record
from edgedaq.segment_gaps import Explainer
from edgedaq.storage import OsStorage, Storage

__all__ = ["SegmentReader", "find_open", "read_table", "segment_end", "table_at"]

_CHUNK_BYTES = (1 << 20) + (64 << 10)  # one frame as large as they are made fits, with its headers
_PROBE_BYTES = 64 << 10
_FOR_EVER = (1 << 64) - 1


class SegmentReader:
    """Reads a log from a position on.

    Args:
        directory: Of the log; may be absent until there is something to read.
        position: Where to begin: any position that a record, a ``Hole`` or the log's ``end`` gave.
        wants: Which streams to decode, asked per frame; frames of others are passed over, judged by a checked
            header. OPEN frames come for every stream. May change its answers between reads.

    Not for several threads at once. Must be closed.
    """

    def __init__(
        self,
        directory: Path,
        position: int,
        *,
        storage: Storage | None = None,
        wants: Callable[[int], bool] | None = None,
    ) -> None:
        self.position = position
        """Everything before it was returned."""
        self._directory = directory
        self._storage: Storage = storage or OsStorage()
        self._wants = wants
        self._start = position
        self._file: SegmentFile | None = None
        self._file_end: int | None = None
        self._last_first: int | None = None
        self._explainer: Explainer | None = None
        self._is_passing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open; safe to call again, and reading goes on with the next ``read``."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._file_end = None

    def table_at_start(self) -> StreamTable:
        """Return the account of all streams at the position that the reader began at; reads a segment."""
        return table_at(self._directory, self._start, storage=self._storage)

    def read(self, upto: int, max_bytes: int = _CHUNK_BYTES) -> list[Record | Hole]:
        """Return what comes next, in order; empty once ``position`` has reached ``upto``.

        Args:
            upto: A position up to which records are known to be there, e.g. the log's ``durable``.
            max_bytes: How much to read at once; a larger record is read all the same.

        Raises:
            OSError: The disk failed in a way that is not damage, e.g. too many open files.
        """
        while self.position < upto:
            file, end = self._file, self._file_end
            if file is None or (end is not None and self.position >= end):
                found = self._next_file()
                if found is None:
                    break
            else:
                found = self._read_chunk(file, upto, max_bytes)
            if found:
                return found
        return []

    def _read_chunk(self, file: SegmentFile, upto: int, max_bytes: int) -> list[Record | Hole]:
        """Read from the open segment; an empty answer means: look again."""
        entries: list[Entry] = []
        limit = min(upto, file.first + file.size if self._file_end is None else self._file_end)
        begun = self.position
        problem = -1
        if begun < limit:
            size = _PROBE_BYTES if self._is_passing else max_bytes
            self.position, problem = file.chunk(begun, limit, entries, max_bytes=size, wants=self._wants)
            # Behind one large frame for others there is often the next one: its header alone is read.
            self._is_passing = not entries and self.position - begun > size
        if problem and self.position == begun:
            if not file.is_current:
                self.close()
                return []
            if self._file_end is None:
                self._file_end = self._end_of(file, list_segments(self._storage, self._directory))
                if self._file_end is not None:
                    return []
            resume = file.find(begun + (-problem if problem < -1 else 8), limit)
            if not file.is_current:
                self.close()
                return []
            if resume is None:
                resume = upto if self._file_end is None else limit
            entries.append(Hole(begun, resume, "damaged"))
            self.position = resume
        if self._explainer is None and not any(isinstance(entry, Hole) for entry in entries):
            return [entry for entry in entries if isinstance(entry, Record)]
        return self._explained(entries)

    def _next_file(self) -> list[Record | Hole] | None:
        """Open the segment that ``position`` is in, or the one behind it; None when there is none yet."""
        firsts = list_segments(self._storage, self._directory)
        at = bisect_right(firsts, self.position) - 1
        came_from = self._last_first
        target = at
        try:
            if at >= 0 and self.position > firsts[at]:
                file = SegmentFile(self._storage, self._directory, firsts[at])
                end = self._end_of(file, firsts)
                if end is None or self.position < end:
                    self._enter(file, end)
                    return []
                file.close()
                came_from = firsts[at]
                target = at + 1
            if target >= len(firsts):
                self.close()
                return None
            file = SegmentFile(self._storage, self._directory, firsts[max(target, 0)])
            end = self._end_of(file, firsts)
        except FileNotFoundError:
            self.close()
            return []
        return self._cross(file, end, came_from, is_behind=target >= 0)

    def _cross(
        self, file: SegmentFile, end: int | None, came_from: int | None, *, is_behind: bool
    ) -> list[Record | Hole]:
        """Enter a segment at its begin, with what was lost on the way.

        Args:
            file: Taken over.
            end: Of the segment.
            came_from: First position of the segment that was read before; None when none was.
            is_behind: False when everything that ``position`` was in, or next to, has been trimmed.
        """
        before, header = self.position, file.header
        checkpoint = file.checkpoint()
        self._enter(file, end)
        if not is_behind and not (header and header.previous_end <= before):
            self._explainer = None
            return [Hole(before, self.position, "trimmed", checkpoint[0] if checkpoint else StreamTable())]
        found: list[Record | Hole] = []
        if is_behind and came_from is not None and not (header and header.previous == came_from):
            found += self._explained([Hole(before, self.position, "missing" if header else "damaged")])
        if self._explainer is not None and checkpoint is not None:
            at = self.position
            found += [Record(at, at, frame) for frame in self._explainer.arrive(checkpoint[0])]
            self._explainer = None
        return found

    def _enter(self, file: SegmentFile, end: int | None) -> None:
        self.close()
        self._file = file
        self._file_end = end
        self._last_first = file.first
        self.position = max(self.position, file.begin)

    def _end_of(self, file: SegmentFile, firsts: list[int]) -> int | None:
        return segment_end(self._storage, self._directory, file, firsts)

    def _explained(self, entries: list[Entry]) -> list[Record | Hole]:
        found: list[Record | Hole] = []
        for entry in entries:
            if isinstance(entry, Hole):
                if self._explainer is None:
                    table = table_at(self._directory, entry.first, storage=self._storage, before=True)
                    self._explainer = Explainer(table, self._find_open, self._wants)
                self._explainer.reason = entry.reason
                found.append(entry)
            elif isinstance(entry, Record):
                if self._explainer is None:
                    found.append(entry)
                    continue
                frames = self._explainer.explain(entry.frame)
                found += [Record(entry.position, entry.position, frame) for frame in frames[:-1]]
                found.append(entry)
        return found

    def _find_open(self, stream: int) -> StreamState | None:
        behind = self.position if self._file is None else self._file.first
        return find_open(self._storage, self._directory, behind, stream)


def find_open(storage: Storage, directory: Path, position: int, stream: int) -> StreamState | None:
    """Return the account of a stream in the first checkpoint behind ``position`` that has it."""
    for first in list_segments(storage, directory):
        if first <= position:
            continue
        try:
            with SegmentFile(storage, directory, first) as file:
                checkpoint = file.checkpoint()
        except FileNotFoundError:
            continue
        if checkpoint is not None:
            state = checkpoint[0].streams.get(stream) or checkpoint[0].tombstones.get(stream)
            if state is not None:
                return state
    return None


def table_at(
    directory: Path, position: int, *, storage: Storage | None = None, before: bool = False
) -> StreamTable:
    """Return the account of all streams at a position: a checkpoint and the records behind it.

    Reads at most one segment, or more where checkpoints are damaged.

    Args:
        before: Where a segment begins at ``position``, do not trust its checkpoint, but what lies before.
    """
    while True:
        try:
            return _table_at(storage or OsStorage(), directory, position, before=before)
        except FileNotFoundError:
            continue  # trimmed meanwhile: what is listed now begins later


def _table_at(storage: Storage, directory: Path, position: int, *, before: bool) -> StreamTable:
    firsts = list_segments(storage, directory)
    last = (bisect_left if before else bisect_right)(firsts, position) - 1
    start = last
    table: StreamTable | None = None
    while start >= 0 and table is None:
        with SegmentFile(storage, directory, firsts[start]) as file:
            checkpoint = file.checkpoint()
        if checkpoint is not None:
            table = checkpoint[0]
        else:
            start -= 1
    start = max(start, 0)
    explainer = Explainer(
        table or StreamTable(), lambda stream: find_open(storage, directory, firsts[start], stream)
    )
    came_from: int | None = None
    is_whole = True
    for first in firsts[start : last + 1]:
        with SegmentFile(storage, directory, first) as file:
            checkpoint = file.checkpoint()
            is_next = came_from is None or (file.header is not None and file.header.previous == came_from)
            if checkpoint is not None and not (is_whole and is_next):
                explainer.arrive(checkpoint[0])
                is_whole = True
            came_from = first
            end = segment_end(storage, directory, file, firsts)
            limit = min(position, file.first + file.size if end is None else end)
            for entry in file.walk(file.begin, limit, trusted=end is not None or position <= limit):
                if isinstance(entry, Record):
                    explainer.explain(entry.frame)
                elif isinstance(entry, Hole):
                    is_whole = False
    return explainer.table


def read_table(directory: Path, *, storage: Storage | None = None) -> StreamTable:
    """Return the account of all streams at the end of a log, also of one that its writer has open."""
    return table_at(directory, _FOR_EVER, storage=storage)


def segment_end(storage: Storage, directory: Path, file: SegmentFile, firsts: list[int]) -> int | None:
    """Return where the records of a segment end; None while it is the newest."""
    at = bisect_right(firsts, file.first)
    if at == len(firsts):
        return None
    with SegmentFile(storage, directory, firsts[at]) as following:
        header = following.header
    if header is not None and header.previous == file.first:
        return header.previous_end
    end = file.begin
    for entry in file.walk(file.begin, file.first + file.size, trusted=False):
        if isinstance(entry, Record | Control):
            end = entry.end
    return end
