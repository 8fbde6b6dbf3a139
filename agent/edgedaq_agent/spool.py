"""The spool of a lane: what the aggregator has not acknowledged, on the node's own disk.

A thin shell around a ``SegmentLog``: takes entries of the lane, gives back frames from a position. What it
holds need not be everything of a stream, because most frames never pass through it; so it writes the OPEN of
a stream before the first frame of it that comes, and drops only what it has already (after a restart, rings
offer again what they had not been released).

Its positions are the lane's. How far the aggregator is, is saved in the log now and then; what is sent twice
because of an older one is dropped by identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns
from edgedaq.committer import Committer
from edgedaq.delivery import StreamTable, Verdict, gap_of
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, decode
from edgedaq.lane_parts import Entry
from edgedaq.logsetup import get_logger
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_gaps import bridge
from edgedaq.segment_reader import SegmentReader, table_at
from edgedaq.segments import LogError, SegmentLog
from edgedaq.storage import Storage

from edgedaq_agent.corrector import whole_frames

__all__ = ["OpenOf", "Spool", "SpoolPart"]

_SEGMENT_BYTES = 16 << 20
_SEGMENTS_MIN = 4
_STREAMS_KEPT_MAX = 1024
_MINUTE_NS = 60_000_000_000
_DAY_NS = 86_400_000_000_000

OpenOf = Callable[[object, int], bytes | None]
"""Returns the OPEN frame of a stream from who holds the entry."""


class SpoolPart(list[Frame]):
    """Frames read from the spool, in order. ``upto`` is where the next read goes on."""

    upto: int = 0


class Spool:
    """The spool in a directory. A context manager.

    Args:
        gather_s: How long bytes may gather before they are made durable: 0.2 spares an SD card.
        drops: The reason that GAPs give for what ``drop_oldest`` dropped; empty where that is never called.

    Raises:
        LogError: The directory cannot be used, or another process has it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int,
        reserve_bytes: int,
        bad: BadFiles,
        open_of: OpenOf,
        gather_s: float = 0.0,
        drops: str = "",
        storage: Storage | None = None,
    ) -> None:
        segment_bytes = _SEGMENT_BYTES
        while segment_bytes > 1 << 20 and limit_bytes < _SEGMENTS_MIN * segment_bytes:
            segment_bytes //= 2
        self.limit_bytes = max(limit_bytes, 2 * segment_bytes)
        self.problem = ""
        """Why it takes nothing now; empty while it does."""
        self._log = get_logger()
        self._bad = bad
        self._open_of = open_of
        self._directory = directory
        self._storage = storage
        self._segments = SegmentLog(
            directory,
            limit_bytes=self.limit_bytes,
            segment_bytes=segment_bytes,
            reserve_bytes=reserve_bytes,
            storage=storage,
        )
        self._moved_count = 0
        recovery = self._segments.recovery
        if recovery.holes or recovery.cut_bytes:
            self._log.error(
                "spool.damaged",
                hole_count=len(recovery.holes),
                cut_bytes=recovery.cut_bytes,
                path=str(directory),
            )
        self._committer = Committer(self._segments, gather_s=gather_s)
        self._drops = drops
        self._before: StreamTable | None = None
        self.dropped_rows = 0
        """Rows of which GAPs were read in place of what was dropped."""
        self._written_bytes = 0
        self._begun_ns = mono_ns()
        self._reader: SegmentReader | None = None
        self._read: deque[Record] = deque()
        self._resume = -1
        saved = self._segments.cursor.get("acked")
        begin, end = self._segments.begin, self._segments.end
        if not isinstance(saved, int):
            saved = begin
        # What lies before the begin was acknowledged, or dropped: then GAPs are read in its place.
        self.acked = min(saved if drops else max(saved, begin), end)
        """Position up to which the aggregator is known to have everything."""
        self._saved = self.acked

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def end(self) -> int:
        """Position behind the last record."""
        return self._segments.end

    @property
    def durable(self) -> int:
        """Position before which all is safe from a power cut."""
        return self._segments.durable

    @property
    def disk_bytes(self) -> int:
        """What its files take."""
        return self._segments.disk_bytes

    @property
    def has_moved(self) -> bool:
        """The disk failed: what was not durable has, or will have, another place, behind ``end``.

        Until ``settle`` nothing is read.
        """
        return self._segments.moved_count != self._moved_count

    def settle(self) -> bool:
        """Take that the owner forgets the old positions; False while they have no new ones yet."""
        moved_count = self._segments.moved_count
        if not self._segments.is_settled or moved_count != self._segments.moved_count:
            return False
        self._moved_count = moved_count
        return True

    def fileno(self) -> int:
        """Return what becomes readable when ``durable`` may have moved."""
        return self._committer.fileno()

    def clear(self) -> None:
        """Make ``fileno`` unreadable; call it before looking at ``durable``."""
        self._committer.clear()
        error = self._committer.error
        if error is not None:
            self._tell(str(error))

    def append(self, entries: list[Entry]) -> int | None:
        """Append the frames of entries; return the position behind them.

        None when they could not all be written; they may be offered again. Durable later: see ``fileno``.
        """
        size = sum(len(entry.frames) for entry in entries)
        if not self._segments.would_fit(size):
            if self._segments.unsynced_bytes < size + (32 << 20):
                self._tell("the spool is full")
            return None
        for entry in entries:
            try:
                self._segments.append(self._new_frames(entry))
            except LogError as e:
                self._tell(str(e))
                return None
            except WireError as e:
                self._log.error("spool.doubted", reason=str(e))
            self._written_bytes += len(entry.frames)
        self._tell("")
        self._committer.wake()
        return self._segments.end

    def drop_oldest(self) -> bool:
        """Drop the oldest segment, acknowledged or not; False when there is none but the one in use."""
        sizes = self._segments.sizes()
        if len(sizes) < 2:
            return False
        if self._before is None:
            self._before = table_at(self._directory, self.acked, storage=self._storage)
        if self._segments.trim(sizes[1][0]) == sizes[0][0]:
            return False
        self._log.warning("spool.dropped", reason=self._drops, dropped_bytes=sizes[0][1])
        return True

    def bytes_per_day(self, now_ns: int) -> int:
        """Return what is written in a day at the mean rate since the start (of the last minute at least)."""
        return self._written_bytes * _DAY_NS // max(now_ns - self._begun_ns, _MINUTE_NS)

    def read(self, position: int, upto: int, part_bytes: int, room: int) -> SpoolPart:
        """Return frames from a position on: one, and more up to ``part_bytes``, never beyond ``room``.

        Empty, with ``upto`` further on, where records are lost; where it is, when they have moved.
        """
        if position != self._resume:
            self._read.clear()
        if not self._read and not self.has_moved:
            self._fill(position, upto)
        part = SpoolPart()
        part.upto = position
        if self.has_moved:  # perhaps since: then what was read may be a hole that is none
            self._read.clear()
            self._resume = -1
            return part
        size = 0
        while self._read:
            record = self._read[0]
            more = len(record.frame.raw)
            if size + more > (part_bytes if part else room):
                break
            part.append(record.frame)
            size += more
            part.upto = max(record.end, part.upto)
            self._read.popleft()
        if not self._read:
            part.upto = self._reader.position if self._reader is not None else upto
        self._resume = part.upto
        return part

    def acknowledge(self, position: int) -> None:
        """Take that the aggregator has everything before a position; gives back space."""
        self.acked = position
        if position >= self._segments.begin:
            self._before = None
        self._segments.trim(position)

    def save(self) -> None:
        """Write down how far the aggregator is, if that is news."""
        if self.acked == self._saved or self.acked > self._segments.durable:
            return
        self._saved = self.acked
        try:
            self._segments.save_cursor({"acked": self.acked})
        except LogError as e:
            self._tell(str(e))
            return
        self._committer.wake()

    def forget_streams(self) -> None:
        """Forget the streams, when all is acknowledged; whoever goes on brings its OPEN again."""
        table = self._segments.table
        if len(table.streams) + len(table.tombstones) > _STREAMS_KEPT_MAX:
            table.streams.clear()
            table.tombstones.clear()

    def find_open(self, stream: int) -> bytes | None:
        """Return the OPEN frame of a stream that was ever spooled."""
        table = self._segments.table
        state = table.streams.get(stream) or table.tombstones.get(stream)
        return None if state is None else state.open_raw

    def sync(self) -> bool:
        """Make everything durable now; False if that failed. Blocks."""
        try:
            return self._segments.sync() >= self._segments.end
        except LogError as e:
            self._tell(str(e))
            return False

    def close(self) -> None:
        """Make everything durable and let go of the directory."""
        self._committer.close()
        if self._reader is not None:
            self._reader.close()
        self._read.clear()
        try:
            self._segments.close()
        except LogError as e:
            self._log.error("spool.failed", reason=str(e))

    def _new_frames(self, entry: Entry) -> list[Frame]:
        """Return the frames of an entry that are not in the spool, OPENs that it lacks before them."""
        table = self._segments.table
        frames: list[Frame] = []
        next_seqs: dict[int, int] = {}
        for frame in whole_frames(entry.frames, self._bad):
            stream = frame.stream
            try:
                last = gap_of(frame)[0] if frame.kind is Kind.GAP else frame.seq
                next_seq = next_seqs.get(stream)
                if next_seq is None:
                    verdict = table.judge(frame)
                    if verdict is Verdict.UNKNOWN:
                        raw = self._open_of(entry.holder, stream)
                        if raw is None:
                            self._bad.add(stream, frame.seq, "nobody has the OPEN of its stream", frame.raw)
                            continue
                        frames.append(decode(memoryview(raw)))
                    elif verdict is Verdict.DUPLICATE:
                        continue
                elif last < next_seq:
                    continue
            except WireError as e:
                self._bad.add(stream, frame.seq, str(e), frame.raw)
                continue
            next_seqs[stream] = last + 1
            frames.append(frame)
        return frames

    def _fill(self, position: int, upto: int) -> None:
        if self._reader is None or self._reader.position != position:
            if self._reader is not None:
                self._reader.close()
            self._reader = SegmentReader(self._directory, position, storage=self._storage)
        for entry in self._reader.read(upto):
            if isinstance(entry, Record):
                self._read.append(entry)
            elif entry.reason == "trimmed" and self._drops:
                self._read.extend(self._dropped(entry))
            else:
                self._log.error("spool.hole_found", reason=entry.reason, first=entry.first, last=entry.last)
        if not self._read and self._reader.position == position:
            self._log.error("spool.hole_found", reason="nothing readable", first=position, last=upto)
            self._reader.close()
            self._reader = None

    def _dropped(self, hole: Hole) -> list[Record]:
        """Return the frames that say what was dropped, of streams that had something there.

        After a restart nobody knows any more which had; then it is said of all, and what the aggregator has
        it drops by identity.
        """
        before = self._before or StreamTable()
        records = []
        for frame in bridge(before.progress, hole.table or StreamTable(), self._drops):
            records.append(Record(hole.last, hole.last, frame))
            if frame.kind is Kind.GAP:
                self.dropped_rows += gap_of(frame)[1] or 0
        self._log.warning("spool.dropped_told", stream_count=len({r.frame.stream for r in records}))
        return records

    def _tell(self, problem: str) -> None:
        if problem and not self.problem:
            self._log.error("spool.blocked", reason=problem)
        elif self.problem and not problem:
            self._log.info("spool.resumed")
        self.problem = problem
