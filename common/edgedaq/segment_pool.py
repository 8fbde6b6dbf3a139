"""Where the files of segments come from and go to: preallocated, recycled, counted against the limits.

Writing into blocks that exist costs one device flush per commit instead of two, so files are reserved in full
before use and trimmed ones are used again. A file in waiting is called ``*.free``; only the log names it
``*.seg``, after its new header is written. A trimmed file is written only once the change of its name is
durable: else a power cut could bring the old name back, over bytes that are no longer its own.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import ConfigError, StoreError
from edgedaq.storage import Storage

__all__ = ["FREE_SUFFIX", "FreeFile", "LogError", "LogFull", "SegmentPool", "check_limits", "take_directory"]

FREE_SUFFIX = ".free"
SEGMENT_BYTES_MIN = 16 << 10
_SPARES_MAX = 4


class LogError(StoreError):
    """The log could not write, or could not make durable, what it holds.

    ``kept`` is how many of the frames handed to ``append`` are in the log; the others are not.
    """

    def __init__(self, message: str, *, kept: int = 0) -> None:
        super().__init__(message)
        self.kept = kept


class LogFull(LogError):  # noqa: N818 - it says what is, not what went wrong
    """The log has reached its limit, or the disk is full; trimming makes room."""


class FreeFile(NamedTuple):
    """A file that is taken, or waits to be."""

    path: Path
    size: int


def check_limits(directory: Path, segment_bytes: int, limit_bytes: int) -> None:
    """Refuse limits that contradict each other.

    Raises:
        ConfigError: They do.
    """
    if segment_bytes < SEGMENT_BYTES_MIN or segment_bytes % 4096:
        message = (
            f"{directory}: segment_bytes must be a multiple of 4096, "
            f"at least {SEGMENT_BYTES_MIN}, got {segment_bytes}"
        )
        raise ConfigError(message)
    if limit_bytes < 2 * segment_bytes:
        message = (
            f"{directory}: limit_bytes must be two segments, {2 * segment_bytes}, or more, got {limit_bytes}"
        )
        raise ConfigError(message)


def take_directory(storage: Storage, directory: Path) -> int:
    """Make the directory of a log if it is absent, and lock it; returns the descriptor that holds the lock.

    Raises:
        LogError: Another process has it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return storage.lock(directory / "lock")
    except BlockingIOError as e:
        message = f"{directory}: another process writes this log"
        raise LogError(message) from e
    except OSError as e:
        message = f"{directory}: the log cannot be opened: {e}"
        raise LogError(message) from e


class SegmentPool:
    """The files of one log that hold no records, and the count of all.

    Args:
        directory: Of the log.
        segment_bytes: The usual size of a segment; only such files are kept for another use.
        limit_bytes: What all files of segments, in use or in waiting, may take.
        reserve_bytes: What must stay free on the file system.

    Safe for several threads.
    """

    def __init__(
        self, storage: Storage, directory: Path, segment_bytes: int, limit_bytes: int, reserve_bytes: int
    ) -> None:
        self._storage = storage
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._limit_bytes = limit_bytes
        self._reserve_bytes = reserve_bytes
        self._free: list[FreeFile] = []
        self._unsettled: list[FreeFile] = []
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def disk_bytes(self) -> int:
        """What all files of segments take, in use or in waiting."""
        return self._used_bytes + sum(file.size for file in (*self._free, *self._unsettled))

    def adopt(self, size_bytes: int) -> None:
        """Count a file that is in use, found at start."""
        self._used_bytes += size_bytes

    def adopt_free(self, file: FreeFile) -> None:
        """Take over a file in waiting, found at start."""
        self._keep_or_remove(file)

    def has_room(self, count: int) -> bool:
        """Tell whether ``count`` more segments of the usual size may be taken."""
        with self._lock:
            new = max(0, count - len(self._free) - len(self._unsettled))
            return self._may_grow(new * self._segment_bytes)

    def take(self, size_bytes: int) -> tuple[Path, int, int]:
        """Return the path, descriptor and size of a file of at least ``size_bytes``, open for writing.

        Raises:
            LogFull: A limit is reached, or the disk is full.
            OSError: The disk failed.
        """
        with self._lock:
            if not self._free and self._unsettled and not self._may_grow(size_bytes):
                self._settle()
            if size_bytes <= self._segment_bytes and self._free:
                file = self._free.pop()
                fd = self._storage.open(file.path, write=True)
                self._used_bytes += file.size
                return file.path, fd, file.size
            while self._free and not self._may_grow(size_bytes):
                self._storage.unlink(self._free.pop().path)
            path, fd = self._create(size_bytes)
            self._used_bytes += size_bytes
            return path, fd, size_bytes

    def prepare(self) -> None:
        """Have one file in waiting, so that the next ``take`` is quick. Does nothing where there is no room.

        Raises:
            OSError: The disk failed.
        """
        with self._lock:
            if not self._free and not self._unsettled and self._may_grow(self._segment_bytes):
                with contextlib.suppress(LogFull):
                    path, fd = self._create(self._segment_bytes)
                    self._storage.close(fd)
                    self._free.append(FreeFile(path, self._segment_bytes))

    def settle(self) -> None:
        """Make it durable that trimmed files are no longer the log's: only then are they written again.

        Raises:
            OSError: The disk failed.
        """
        with self._lock:
            renamed = list(self._unsettled)
        if renamed:
            self._storage.sync_directory(self._directory)
            with self._lock:
                self._free += [file for file in renamed if file in self._unsettled]
                self._unsettled = [file for file in self._unsettled if file not in renamed]

    def give_back(self, path: Path, size_bytes: int, *, is_sound: bool = True) -> None:
        """Take a file that is no longer part of the log: kept for another use, or removed.

        Raises:
            OSError: The disk failed.
        """
        with self._lock:
            self._used_bytes -= size_bytes
            self._keep_or_remove(FreeFile(path, size_bytes if is_sound else 0))

    def _keep_or_remove(self, file: FreeFile) -> None:
        if file.size != self._segment_bytes or len(self._free) + len(self._unsettled) >= _SPARES_MAX:
            self._storage.unlink(file.path)
            return
        if file.path.suffix != FREE_SUFFIX:
            path = file.path.with_suffix(FREE_SUFFIX)
            self._storage.rename(file.path, path)
            self._unsettled.append(FreeFile(path, file.size))
        else:
            self._free.append(file)

    def _settle(self) -> None:
        self._storage.sync_directory(self._directory)
        self._free += self._unsettled
        self._unsettled.clear()

    def _may_grow(self, size_bytes: int) -> bool:
        if not size_bytes:
            return True
        if self.disk_bytes + size_bytes > self._limit_bytes:
            return False
        return self._storage.free_bytes(self._directory) - size_bytes >= self._reserve_bytes

    def _create(self, size_bytes: int) -> tuple[Path, int]:
        if not self._may_grow(size_bytes):
            message = (
                f"{self._directory}: {self.disk_bytes} bytes are in use; another {size_bytes} would exceed "
                f"the limit of {self._limit_bytes}, or leave less than {self._reserve_bytes} free on the disk"
            )
            raise LogFull(message)
        path = self._directory / f"{secrets.token_hex(8)}{FREE_SUFFIX}"
        fd = self._storage.open(path, write=True, create=True)
        try:
            self._storage.preallocate(fd, size_bytes)
        except OSError as e:
            self._storage.close(fd)
            self._storage.unlink(path)
            if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                message = f"{self._directory}: no room for a segment of {size_bytes} bytes: {e}"
                raise LogFull(message) from e
            raise
        return path, fd
