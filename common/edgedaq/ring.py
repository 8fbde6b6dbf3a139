"""Ring files: made, locked and mapped by their producer; mapped and watched by consumers.

What lies where in such a file, and in which order it is stored, is drawn in ``ring_layout``.

A ring outlives its process. Whether its producer lives is the kernel's word: the producer holds a record lock
on the file until its process ends. Such a lock is lost when the process closes *any* descriptor of the file,
so a producer never opens its own ring a second time: ``is_own`` tells which are its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

from edgedaq.clock import utc_ns
from edgedaq.errors import JobError, WireError
from edgedaq.ring_layout import HEADER_AREA_BYTES, Identity, Layout, plan_layout, read_layout, write_header

__all__ = ["Identity", "Layout", "ProducedRing", "is_alive", "is_own", "map_ring"]

_own: set[str] = set()


class ProducedRing:
    """The producer's own ring: created, locked and mapped. Closing it gives the lock up.

    Raises:
        JobError: It cannot be created, with the reason: most often the tmpfs is full.
    """

    def __init__(
        self,
        rings_dir: Path,
        identity: Identity,
        *,
        ring_bytes: int,
        slot_bytes: int,
        slots: int,
    ) -> None:
        self.path = rings_dir / f"{identity.life}.ring"
        self.layout = plan_layout(identity, utc_ns(), ring_bytes, slot_bytes, slots)
        temporary = rings_dir / f".{identity.life}.new"
        try:
            rings_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            message = f"{self.path}: a ring cannot be created: {e.strerror}"
            raise JobError(message) from e
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Allocated in full now: a page that a full tmpfs lacks later would end the process by SIGBUS.
            _allocate(self._fd, self.layout.file_bytes)
            self._map = mmap.mmap(self._fd, self.layout.file_bytes)
            self.buffer = memoryview(self._map)
            write_header(self.buffer, self.layout)
            _own.add(identity.life)
            temporary.rename(self.path)
        except (OSError, JobError) as e:
            self._undo(temporary)
            if isinstance(e, JobError):
                raise
            free = _free_bytes(rings_dir) if e.errno == errno.ENOSPC else None
            detail = f"; {free} bytes are free there" if free is not None else ""
            message = (
                f"{self.path}: a ring needs {self.layout.file_bytes} bytes (ring_bytes "
                f"{self.layout.ring_bytes}, {slots} slots of {self.layout.slot_bytes}): {e.strerror}{detail}"
            )
            raise JobError(message) from e

    def _undo(self, temporary: Path) -> None:
        _own.discard(self.layout.identity.life)
        os.close(self._fd)
        temporary.unlink(missing_ok=True)

    def close(self, *, unlink: bool = False) -> None:
        """Give up map and lock; nothing may be put any more. Views that someone still holds stay valid."""
        if unlink:
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".sock").unlink(missing_ok=True)
        self.buffer.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._fd)
        _own.discard(self.layout.identity.life)


def is_own(life: str) -> bool:
    """Tell whether this process produces that ring: it must not open the file again."""
    return life in _own


def is_alive(fd: int) -> bool:
    """Tell whether a process, not this one, still produces the ring behind ``fd``: the kernel's word."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return False


def map_ring(path: Path) -> tuple[int, mmap.mmap, Layout]:
    """Open and map another process's ring for reading.

    Returns:
        Descriptor (for ``is_alive``; the caller closes it), map, layout.

    Raises:
        FileNotFoundError: It is gone.
        WireError: It is not a ring of this version.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapped, layout = _map_checked(fd)
    except WireError as e:
        os.close(fd)
        message = f"{path}: {e}"
        raise WireError(message) from e
    return fd, mapped, layout


def _map_checked(fd: int) -> tuple[mmap.mmap, Layout]:
    size = os.fstat(fd).st_size
    if size < HEADER_AREA_BYTES:
        message = f"a ring needs a header of {HEADER_AREA_BYTES} bytes, got {size}"
        raise WireError(message)
    mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    try:
        with memoryview(mapped) as buffer:
            return mapped, read_layout(buffer)
    except WireError:
        mapped.close()
        raise


def _allocate(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    zeros = bytes(1 << 20)  # macOS
    for at in range(0, size, len(zeros)):
        os.pwrite(fd, zeros[: size - at], at)


def _free_bytes(directory: Path) -> int:
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize
