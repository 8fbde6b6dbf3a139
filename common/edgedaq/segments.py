"""A log on disk, written by one process: the agent's spool of a lane, and the aggregator's journal.

What is appended is a sequence of whole frames, which the caller has judged (``StreamTable``); what it means
on disk is drawn in ``segment_format.py``, what is left of it after a crash in ``segment_recovery.py``.

Two threads may work on a log: one appends and trims, another one calls ``sync``. Between them::

    appender   write records ── publish end ──►            (a roll enlists its segment before)
    syncer     read end, then the enlisted segments ── fdatasync each ── sync names ── publish durable ──►

Every segment that holds a byte before ``end`` is enlisted before that ``end`` is seen, and leaves the list
only after an fdatasync that began after its last write. So ``durable`` never passes a byte that is not.

A failed fdatasync is final for its file (the kernel forgets what it could not write): the segments that hold
what is not durable are given up from ``durable`` on, and the frames, kept in memory until they are durable,
are written to a new one. Their new positions lie behind all old ones: ``durable >= end`` of any append
still means what it says.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from edgedaq.clock import utc_ns
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import Frame
from edgedaq.segment_format import (
    PREFIX_BYTES,
    SEGMENT_HEADER_BYTES,
    Header,
    RecordKind,
    checkpoint_payload,
    file_name,
    new_salt,
    seal_map,
)
from edgedaq.segment_gaps import apply_all
from edgedaq.segment_pool import LogError, LogFull, SegmentPool, check_limits, take_directory
from edgedaq.segment_reader import table_at
from edgedaq.segment_recovery import RecoveryReport, recover
from edgedaq.segment_writer import SYNCED_RECORD_BYTES, SegmentWriter, begin_segment
from edgedaq.storage import OsStorage, Storage

__all__ = ["LogError", "LogFull", "SegmentLog"]

SEGMENT_BYTES = 64 << 20
UNSYNCED_BYTES_MAX = 64 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SegmentLog:
    """The one writer of a log.

    Args:
        directory: Made if absent; held by a lock until ``close``.
        limit_bytes: What its files may take on disk, preallocated ones included.
        segment_bytes: Size of a file; a frame or checkpoint that does not fit makes its segment larger.
        reserve_bytes: What must stay free on the file system.
        resends: See ``segment_recovery.py``. True for a journal, False for a spool.
        first_position: Where a new log begins.

    Raises:
        ConfigError: The limits contradict each other.
        LogError: Another process has the log, or the directory is unusable. Damage is told in ``recovery``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        reserve_bytes: int = 0,
        resends: bool = False,
        first_position: int = 0,
        storage: Storage | None = None,
    ) -> None:
        check_limits(directory, segment_bytes, limit_bytes)
        self.directory = directory
        self.table = StreamTable()
        """The account of all streams at ``end``."""
        self.cursor: dict[str, object] = {}
        """What ``save_cursor`` saved last, also before a restart."""
        self.recovery = RecoveryReport()
        """What was found at start."""
        self.moved_count = 0
        """How often the disk failed, and what was not durable lost its place."""
        self._storage: Storage = storage or OsStorage()
        self._segment_bytes = segment_bytes
        self._segments: list[SegmentWriter] = []
        self._enlisted: list[SegmentWriter] = []
        self._active: SegmentWriter | None = None
        self._end = self._durable = self._claimed = self._next_first = first_position
        self._unsynced: deque[tuple[int, list[Frame]]] = deque()
        self._owed: list[Frame] = []
        self._owed_table: StreamTable | None = None
        self._is_closed = False
        self._state, self._writing, self._syncing = (threading.Lock() for _ in range(3))
        self._pool = SegmentPool(self._storage, directory, segment_bytes, limit_bytes, reserve_bytes)
        self._lock_fd = take_directory(self._storage, directory)
        try:
            self._recover(resends=resends)
        except OSError as e:
            self._storage.close(self._lock_fd)
            message = f"{directory}: the log cannot be opened: {e}"
            raise LogError(message) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def begin(self) -> int:
        """Position from which the log can be read."""
        return next(iter(self.sizes()), (self._end, 0))[0]

    @property
    def end(self) -> int:
        """Position behind the last record."""
        return self._end

    @property
    def durable(self) -> int:
        """Position before which everything survives a power cut."""
        return self._durable

    @property
    def disk_bytes(self) -> int:
        """What the log's files take on disk, preallocated ones included."""
        return self._pool.disk_bytes

    @property
    def unsynced_bytes(self) -> int:
        """What was appended and is not durable: held in memory too."""
        return self._end - self._durable

    @property
    def is_settled(self) -> bool:
        """All that was appended is durable, where ``end`` says; nothing is still to be written anew."""
        with self._writing:
            return not self._owed and self._end == self._durable

    def sizes(self) -> list[tuple[int, int]]:
        """Return the first position of each segment, and what its records take; positions also skip some."""
        with self._state:
            return [(one.first, min(one.limit, self._end) - one.first) for one in self._segments]

    def would_fit(self, size_bytes: int) -> bool:
        """Tell whether frames of that many bytes can be appended now."""
        if self.is_behind(size_bytes):
            return False
        left = self._active.limit - self._end if self._active else 0
        need = size_bytes + 3 * size_bytes // 8 + 4 * SYNCED_RECORD_BYTES  # the smallest frame has 64
        room = max(self._segment_bytes // 2, self._segment_bytes - (1 << 20))
        return need <= left or self._pool.has_room(-(-(need - left) // room))

    def is_behind(self, size_bytes: int) -> bool:
        """Tell whether so many bytes must wait until ``durable`` has moved: 64 MiB are not durable yet."""
        return bool(self._owed) or self.unsynced_bytes + size_bytes > UNSYNCED_BYTES_MAX

    def append(self, frames: Sequence[Frame]) -> int:
        """Write frames behind the last record and apply them to ``table``; returns the new ``end``.

        They survive a crash of this process from here on, a power cut once ``durable`` has reached that end.
        Their bytes must not change until then.

        Args:
            frames: Each judged ``ACCEPT`` by ``table``, in this order.

        Raises:
            LogFull, LogError: No room, or a disk that takes no more; ``kept`` frames were written.
            WireError: A frame was not what its kind says, or of an unknown stream; it is in the log anyway.
        """
        with self._writing:
            if self._is_closed or self._owed:
                state = "is closed" if self._is_closed else "waits for a disk that takes what it holds"
                message = f"{self.directory}: the log {state}"
                raise LogError(message)
            return self._append(frames, self.table)

    def save_cursor(self, cursor: dict[str, object]) -> None:
        """Write what ``cursor`` is to be after a restart; durable with the next sync.

        Raises:
            LogError: There is no room, or the disk does not take it; the cursor is remembered all the same.
        """
        with self._writing:
            self.cursor = cursor
            if self._is_closed or self._owed:
                return
            payload = seal_map(cursor)
            size = PREFIX_BYTES + len(payload)
            if not self._fits(size):
                self._roll(size, self.table)
                return  # the checkpoint holds it
            self._control(RecordKind.CURSOR, payload)

    def sync(self) -> int:
        """Make durable what was appended before; returns ``durable``. Another thread may append meanwhile.

        Raises:
            LogError: The disk failed. What was not durable has been, or will be at the next call, written to
                another file; call again.
        """
        with self._syncing:
            if self._owed:
                with self._writing:
                    self._write_owed()
            with self._state:
                end, enlisted = self._end, list(self._enlisted)
            if end == self._durable:
                return end
            try:
                for segment in enlisted:
                    self._storage.fdatasync(segment.fd)
                if not all(segment.is_named for segment in enlisted):
                    self._storage.sync_directory(self.directory)
            except OSError as e:
                with self._writing:
                    self._give_up()
                message = f"{self.directory}: fdatasync failed, what was not durable is written anew: {e}"
                raise LogError(message) from e
            done = enlisted[:-1]
            with self._state:
                for segment in enlisted:
                    segment.is_named = True
                del self._enlisted[: len(done)]
                self._durable = end
            for segment in done:
                segment.close()
            while self._unsynced and self._unsynced[0][0] <= end:
                self._unsynced.popleft()
            with contextlib.suppress(OSError):  # here nobody waits for it
                if end - enlisted[-1].first > enlisted[-1].size // 2:
                    self._pool.prepare()
                self._pool.settle()
        return end

    def trim(self, before: int) -> int:
        """Give back whole segments that lie before a position; returns the new ``begin``.

        Only what is durable is trimmed, and never the segment that is written. For the appender's thread.
        """
        with self._writing:
            while True:
                with self._state:
                    following = self._segments[1].first if len(self._segments) > 1 else self._end
                    # The checkpoint behind what goes must be durable, not only all before it.
                    if following > before or following >= self._durable or len(self._segments) < 2:
                        return self._segments[0].first if self._segments else self._end
                    segment = self._segments.pop(0)
                with contextlib.suppress(OSError):
                    self._pool.give_back(segment.path, segment.size, is_sound=segment.is_sound)

    def close(self) -> None:
        """Make everything durable, mark the orderly end, and let go of the directory; safe to call again.

        Raises:
            LogError: Not everything could be made durable; the log is closed all the same.
        """
        if self._is_closed:
            return
        try:
            self.sync()
            with self._writing:
                self._is_closed = True
                if self._claimed < self._durable and self._fits(SYNCED_RECORD_BYTES):
                    self._control(RecordKind.SYNCED, self._durable.to_bytes(8, "little"))
            self.sync()
        finally:
            self._is_closed = True
            with self._state:
                for segment in self._segments:
                    segment.close()
            self._storage.close(self._lock_fd)
            self._unsynced.clear()

    def _recover(self, *, resends: bool) -> None:
        found = recover(self._storage, self.directory, resends=resends, segment_bytes=self._segment_bytes)
        self.table, self.cursor, self.recovery = found.table, found.cursor, found.report
        for file in found.free:
            with contextlib.suppress(OSError):
                self._pool.adopt_free(file)
        for one in found.segments:
            path = self.directory / file_name(one.first)
            self._segments.append(SegmentWriter(self._storage, path, one.first, one.size, one.salt))
            self._pool.adopt(one.size)
        if not found.segments:
            return
        self._end = self._durable = self._claimed = found.segments[-1].end
        self._next_first = found.next_first
        if found.may_continue:
            self._active = self._segments[-1]
            self._active.fd = self._storage.open(self._active.path, write=True)
            self._enlisted.append(self._active)

    def _control(self, kind: RecordKind, payload: bytes) -> None:
        try:
            if self._active is not None:
                self._end = self._active.control(self._end, kind, payload)
        except OSError as e:
            message = f"{self.directory}: the disk does not take a record: {e}"
            raise LogError(message) from e

    def _fits(self, size_bytes: int) -> bool:
        return self._active is not None and self._end + size_bytes <= self._active.limit

    def _append(self, frames: Sequence[Frame], table: StreamTable) -> int:
        done = 0
        failed: WireError | None = None
        while done < len(frames):
            size = PREFIX_BYTES + len(frames[done].raw)
            try:
                active = self._active if self._fits(size) else None
                active = active or self._roll(size, table)
                durable = self._durable
                claim = durable if durable > self._claimed else None
                count, end = active.frames(self._end, frames, done, claim)
            except LogError as e:
                e.kept = done
                raise
            except OSError as e:
                message = f"{self.directory}: the disk does not take {len(frames) - done} frames: {e}"
                raise (LogFull if e.errno in _FULL else LogError)(message, kept=done) from e
            self._claimed = durable
            written = list(frames[done : done + count])
            self._unsynced.append((end, written))
            self._end = end
            done += count
            failed = apply_all(table, written) or failed
        if failed is not None:
            raise failed
        return self._end

    def _roll(self, need_bytes: int, table: StreamTable) -> SegmentWriter:
        """Begin a new segment, large enough for its checkpoint and a record of ``need_bytes``."""
        checkpoint = checkpoint_payload(table, self.cursor)
        overhead = SEGMENT_HEADER_BYTES + PREFIX_BYTES + len(checkpoint)
        size = max(self._segment_bytes, -(-(overhead + SYNCED_RECORD_BYTES + need_bytes) // 4096) * 4096)
        first = self._next_first if self._active is None else self._end
        previous = self._segments[-1].first if self._segments else first
        previous_end = self._end if self._segments else first
        header = Header(first, new_salt(), previous, previous_end, self._durable, utc_ns())
        segment = begin_segment(self._storage, self._pool, self.directory, size, header, checkpoint)
        with self._state:
            self._segments.append(segment)
            self._enlisted.append(segment)
        self._active = segment
        self._end = first + overhead
        return segment

    def _give_up(self) -> None:
        """Leave the files that did not become durable, and write what they held into a new one."""
        self.moved_count += 1  # before anybody can miss a file
        owed = [frame for end, frames in self._unsynced if end > self._durable for frame in frames]
        self._unsynced.clear()
        self._owed = owed
        self._next_first = max(segment.limit for segment in self._enlisted)
        with self._state:
            enlisted, self._enlisted, self._active = self._enlisted, [], None
            self._segments = [one for one in self._segments if one.first < self._durable]
            self._end = self._durable
        for segment in enlisted:
            segment.close()
            segment.is_sound = False
            if segment.first >= self._durable:
                with contextlib.suppress(OSError):
                    self._pool.give_back(segment.path, segment.size, is_sound=False)
        self._write_owed()

    def _write_owed(self) -> None:
        """Write again what was appended before the disk failed; the table knows these frames already.

        Raises:
            LogError: The disk still does not take it all.
        """
        frames = self._owed
        try:
            if self._owed_table is None:
                self._owed_table = table_at(self.directory, self._durable, storage=self._storage, before=True)
            with contextlib.suppress(WireError):  # told when they were appended first
                self._append(frames, self._owed_table)
        except LogError as e:
            self._owed = frames[e.kept :]
            raise
        except OSError as e:
            message = f"{self.directory}: what is durable cannot be read: {e}"
            raise LogError(message) from e
        self._owed = []
        self._owed_table = None
