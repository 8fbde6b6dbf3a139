"""Storages that end at a chosen operation, and a power cut that loses what was not synced."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from edgedaq.storage import Buffer, OsStorage


class EndedHere(BaseException):
    """The process was killed at this operation."""


class KilledStorage(OsStorage):
    """Counts the operations that change something, and ends the process before the n-th one.

    A write is cut in its middle: half of its bytes are in the file.
    """

    def __init__(self, at: int = -1) -> None:
        self.count = 0
        self._at = at

    def step(self) -> None:
        """Count an operation that is not of files, and end before it if it is the one."""
        if self._step():
            raise EndedHere

    def _step(self) -> bool:
        self.count += 1
        if 0 <= self._at < self.count - 1:
            raise EndedHere
        return self.count - 1 == self._at

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self._step():
            whole = b"".join(buffers)
            super().pwritev(fd, [whole[: len(whole) // 2]], offset)
            raise EndedHere
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self.step()
        super().fdatasync(fd)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self.step()
        super().truncate(fd, size_bytes)

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        self.step()
        super().sync_directory(path)

    def unlink(self, path: Path) -> None:
        self.step()
        super().unlink(path)


class PowerCutStorage(KilledStorage):
    """Remembers what a power cut would leave: synced contents under synced names. ``cut`` makes it so."""

    def __init__(self, roots: Sequence[Path], at: int = -1) -> None:
        super().__init__(at)
        self._roots = roots
        self._contents: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}
        for root in roots:
            for path in [p for p in root.rglob("*") if p.is_file()]:
                self._contents[path.stat().st_ino] = path.read_bytes()
                self._names.setdefault(path.parent, {})[path.name] = path.stat().st_ino
        self._kept_open: list[int] = []

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        size = os.fstat(fd).st_size
        self._contents[os.fstat(fd).st_ino] = os.pread(fd, size, 0)
        # An inode number must not come back for another file as long as its content is remembered.
        self._kept_open.append(os.dup(fd))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._names[path] = {p.name: p.stat().st_ino for p in path.iterdir() if p.is_file()}

    def cut(self) -> None:
        """Lose everything that was not synced."""
        for root in self._roots:
            for path in [p for p in root.rglob("*") if p.is_file()]:
                path.unlink()
        for directory, names in self._names.items():
            for name, inode in names.items():
                directory.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(self._contents.get(inode, b""))
        self.close_all()

    def close_all(self) -> None:
        for fd in self._kept_open:
            os.close(fd)
        self._kept_open.clear()


class FullStorage(OsStorage):
    """Has no space for files below a directory as long as ``is_full``."""

    def __init__(self, below: Path) -> None:
        self.is_full = False
        self.refused_count = 0
        self._below = str(below)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self.is_full and str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(self._below):
            self.refused_count += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, buffers, offset)


class ReadOnlyStorage(OsStorage):
    """Files of one name may not be written to, whoever asks (root may write everything)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def lock(self, path: Path) -> int:
        if path.name == self._name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return super().lock(path)


def end_storage(storage: KilledStorage, *, is_cut: bool = False) -> None:
    """Let the power go, where that is what ends it, and give everything back."""
    if isinstance(storage, PowerCutStorage):
        if is_cut:
            storage.cut()
        storage.close_all()
