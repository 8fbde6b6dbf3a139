"""The runtime directory of one supervisor: on tmpfs, for nobody else, with one supervisor at a time.

::

    <runtime>/supervisor.lock   flock, held as long as the supervisor lives; bears its pid
    <runtime>/control.sock      its commands (``control``)
    <runtime>/<job>.pid         locks of workers
    <runtime>/rings/            shared memory and endpoints of producers

By default ``/dev/shm/edgedaq-<uid>/<8 hex digits>``, made from the role and the directory of the TOMLs: the
same for everyone who names the same directory, and short, because a unix socket's path holds 107 bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from xxhash import xxh3_64_hexdigest

from edgedaq.errors import ConfigError

__all__ = [
    "InstanceLock",
    "check_runtime_dir",
    "default_runtime_dir",
    "holder",
    "prepare",
    "remove",
    "write_pid",
]

SOCKET_PATH_MAX = 107
_LONGEST_NAME = "/rings/0123456789abcdef.sock"
_LOCK_NAME = "supervisor.lock"
_ATTEMPTS = 10
_ATTEMPT_S = 0.05


def default_runtime_dir(config_dir: Path, role: str) -> Path:
    """Return the runtime directory that this user's ``role`` with that directory of TOMLs has."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    shared = Path("/dev/shm")  # noqa: S108  # its owner and mode are checked before anything is put there
    parent = shared if shared.is_dir() else Path(tempfile.gettempdir())
    name = xxh3_64_hexdigest(f"{role}:{config_dir.resolve()}".encode("utf-8", "surrogateescape"))[:8]
    return parent / f"edgedaq-{os.getuid()}" / name


def check_runtime_dir(path: Path) -> Path:
    """Return the path if sockets in it can have a name.

    Raises:
        ConfigError: It is too long.
    """
    longest = len(os.fsencode(path)) + len(_LONGEST_NAME)
    if longest > SOCKET_PATH_MAX:
        most = SOCKET_PATH_MAX - len(_LONGEST_NAME)
        message = f"runtime_dir must be at most {most} bytes long, for unix sockets, got {str(path)!r}"
        raise ConfigError(message)
    return path


def prepare(path: Path) -> None:
    """Make the directory and ``rings`` in it, for this user alone.

    Raises:
        ConfigError: It cannot be made, or belongs to somebody else, or others may write to it.
    """
    try:
        for directory in (path.parent, path, path / "rings"):
            if directory == path.parent and directory.exists():
                continue
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (path, path / "rings"):
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                message = f"runtime_dir must be a directory of user {os.getuid()}, {directory} is not"
                raise ConfigError(message)
            if found.st_mode & 0o027:
                directory.chmod(0o700)
    except OSError as e:
        message = f"runtime_dir {str(path)!r} cannot be made: {e.strerror}"
        raise ConfigError(message) from e


def remove(path: Path) -> None:
    """Remove the directory if no ring in it waits to be read; the workers and the lock must have ended."""
    rings = path / "rings"
    if rings.is_dir() and any(entry.suffix == ".ring" for entry in rings.iterdir()):
        return
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        if path.parent.name == f"edgedaq-{os.getuid()}":
            path.parent.rmdir()


class InstanceLock:
    """Held by the supervisor of a runtime directory; the kernel gives it back when that process ends."""

    def __init__(self, runtime_dir: Path) -> None:
        """Take the lock, and make the directory if it is not there.

        Raises:
            ConfigError: Another process holds it; the message names its pid.
        """
        self._path = runtime_dir / _LOCK_NAME
        self._file = -1
        for _ in range(_ATTEMPTS):  # whoever only asks holds it for a moment
            prepare(runtime_dir)  # an ending supervisor may have removed it a moment ago
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            if _try_lock(self._file) and self._is_current():
                break
            self.close()
            time.sleep(_ATTEMPT_S)
        if self._file < 0:
            pid = _read_pid(self._path)
            message = f"already running as process {pid or '?'} with runtime_dir {runtime_dir}"
            raise ConfigError(message)
        write_pid(self._file)
        prepare(runtime_dir)

    def _is_current(self) -> bool:
        """Tell whether the locked file still is the one of that name: an ending supervisor removes it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._file)
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def write_pid(fd: int) -> None:
    """Note in a locked file whose it is, for people; a directory without room for that is none the worse."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def holder(runtime_dir: Path) -> int | None:
    """Return the pid of the supervisor that runs with this directory, 0 if that is not known, or None.

    Takes nothing.
    """
    path = runtime_dir / _LOCK_NAME
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try_lock(file) else _read_pid(path) or 0
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read_pid(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None
