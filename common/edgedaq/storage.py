"""The few file operations that a log on disk is made of, behind an interface so that tests can lose them.

Everything that ``segments.py`` promises about power cuts rests on which of these calls came before which;
keeping them this few lets a test record them and replay any prefix, with any unsynced write missing.

All methods raise ``OSError`` and nothing else. Descriptors are those of the operating system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["OsStorage", "Storage", "write_all"]

Buffer = bytes | bytearray | memoryview

_WHOLE_FILE = struct.Struct("@hhqqi4x")
"""Linux' ``struct flock``: type, whence, start, length (0: to the end), pid (0)."""


class Storage(Protocol):
    """What a log needs from a file system."""

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        """Open a file and return its descriptor; ``create`` makes it where it is absent."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def lock(self, path: Path) -> int:
        """Take a file for this process alone, until the returned descriptor is closed.

        Raises:
            BlockingIOError: Another holder has it.
        """

    def size(self, fd: int) -> int:
        """Return the length of an open file."""

    def is_at(self, fd: int, path: Path) -> bool:
        """Tell whether ``path`` still names the open file."""

    def preallocate(self, fd: int, size_bytes: int) -> None:
        """Reserve the blocks of a file in full and set its length; new bytes read as zeros."""

    def truncate(self, fd: int, size_bytes: int) -> None:
        """Cut a file."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write buffers back to back; returns how many bytes were taken, which may be less than all."""

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        """Read up to ``size_bytes``; fewer only at the end of the file."""

    def fdatasync(self, fd: int) -> None:
        """Return once what was written to the file, and its length, survive a power cut."""

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in the same directory; durable after ``sync_directory``."""

    def unlink(self, path: Path) -> None:
        """Remove a name; durable after ``sync_directory``."""

    def sync_directory(self, path: Path) -> None:
        """Return once the names in a directory survive a power cut."""

    def names(self, directory: Path) -> list[str]:
        """Return the names in a directory, in no order."""

    def free_bytes(self, directory: Path) -> int:
        """Return what an ordinary process may still allocate there."""


class OsStorage:
    """``Storage`` by the operating system."""

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        """See ``Storage``; never waits for the other end of a pipe that somebody put there."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT if create else 0)
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)

    def close(self, fd: int) -> None:
        """See ``Storage``."""
        os.close(fd)

    def lock(self, path: Path) -> int:
        """See ``Storage``; by the open file, so that a second holder in this same process is refused too.

        Not by flock, where that can be: readers of HDF5 take that.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if hasattr(fcntl, "F_OFD_SETLK") and sys.platform == "linux":
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            else:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def size(self, fd: int) -> int:
        """See ``Storage``."""
        return os.fstat(fd).st_size

    def is_at(self, fd: int, path: Path) -> bool:
        """See ``Storage``."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(fd), path.stat())
        return False

    def preallocate(self, fd: int, size_bytes: int) -> None:
        """See ``Storage``; where the platform cannot reserve, only the length is set."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
        else:
            os.ftruncate(fd, size_bytes)

    def truncate(self, fd: int, size_bytes: int) -> None:
        """See ``Storage``."""
        os.ftruncate(fd, size_bytes)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See ``Storage``."""
        return os.pwritev(fd, buffers, offset)

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        """See ``Storage``."""
        return os.pread(fd, size_bytes, offset)

    def fdatasync(self, fd: int) -> None:
        """See ``Storage``."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """See ``Storage``."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """See ``Storage``."""
        path.unlink()

    def sync_directory(self, path: Path) -> None:
        """See ``Storage``."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def names(self, directory: Path) -> list[str]:
        """See ``Storage``."""
        return [path.name for path in directory.iterdir()]

    def free_bytes(self, directory: Path) -> int:
        """See ``Storage``."""
        state = os.statvfs(directory)
        return state.f_bavail * state.f_frsize


def write_all(storage: Storage, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write buffers back to back, continuing after short writes.

    Raises:
        OSError: The device took only a part; what was written before it stays.
    """
    total = sum(map(len, buffers))
    done = storage.pwritev(fd, buffers, offset)
    if done == total:
        return
    rest = memoryview(b"".join(buffers))
    while done < total:
        written = storage.pwritev(fd, [rest[done:]], offset + done)
        if written <= 0:
            message = f"the device took {done} of {total} bytes"
            raise OSError(message)
        done += written
