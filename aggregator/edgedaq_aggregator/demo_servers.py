"""Servers for the demo's stores: private instances of MariaDB and Redis, whatever else runs on the machine.

::

    OUT/.demo/<store>/      0700, so that nobody else gets at the socket
        data/               what the server keeps; a second demo goes on with it
        data.new/           while the first one makes it
        socket              where it listens, and nowhere else
        init.sql, log

They end with the demo: in order when it ends so, and by the kernel when it is killed (decision 0050); what
their stores had committed is on the disk either way.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from edgedaq.errors import StoreError

__all__ = ["SERVERS", "DemoServer", "needed"]

SERVERS = ("mysql", "redis")
"""Keys of the stores that have a server behind them."""

START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
_POLL_S = 0.05
_LOG_LINES = 8
_SOCKET_PATH_MAX = 107
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
_MARIADB = ("--innodb-flush-method=fsync", "--innodb-log-file-size=16M", "--innodb-buffer-pool-size=32M")
_SQL = "CREATE DATABASE IF NOT EXISTS demo;\n"


class _Program(NamedTuple):
    """A program that is needed, by any of its names, and the package of Debian that has it."""

    names: tuple[str, ...]
    package: str


_SETPRIV = _Program(("setpriv",), "util-linux")
_INSTALL = _Program(("mariadb-install-db",), "mariadb-server")
_SERVER = {
    "mysql": _Program(("mariadbd",), "mariadb-server"),
    "redis": _Program(("redis-server", "valkey-server"), "redis-server"),
}
_NEEDED = {
    "mysql": (_SERVER["mysql"], _INSTALL, _SETPRIV),
    "redis": (_SERVER["redis"], _SETPRIV),
}


def needed(key: str, path: str = _PATH) -> str:
    """Return what is missing for the server of a store, and the command that installs it; empty: nothing.

    Args:
        path: Where programs are looked for.
    """
    for program in _NEEDED[key]:
        if not _find(program, path):
            return f"no {program.names[0]}; on Debian: sudo apt install {program.package}"
    return ""


class DemoServer:
    """One server, started on what it has kept. A context manager: leaving it ends the process.

    Args:
        key: Of its store.
        directory: Its own, made if it is not there.
        lock_fd: A lock that it holds for as long as it lives.
        is_stopping: Asked while it starts; once true, nothing is waited for.

    Raises:
        StoreError: It does not start.
    """

    def __init__(self, key: str, directory: Path, lock_fd: int, is_stopping: Callable[[], object]) -> None:
        self.socket = directory / "socket"
        self._key = key
        self._directory = directory
        self._lock_fd = lock_fd
        self._is_stopping = is_stopping
        self._log_path = directory / "log"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            message = f"the path of a socket has at most {_SOCKET_PATH_MAX} bytes, got {self.socket}"
            raise StoreError(message)
        self._make_data()
        self.socket.unlink(missing_ok=True)
        self._process = self._started(self._command())
        try:
            self._wait(self._answers)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it in order, or by force when that takes too long."""
        _end(self._process, signal.SIGTERM)
        self.socket.unlink(missing_ok=True)

    def _make_data(self) -> None:
        """Make the directory that the server keeps its data in; whole, or not at all."""
        data, new = self._directory / "data", self._directory / "data.new"
        if data.is_dir():
            return
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        if self._key == "mysql":
            (self._directory / "init.sql").write_text(_SQL, encoding="ascii")
            install = self._started(
                [
                    *(_find(_INSTALL), "--no-defaults", f"--datadir={new}", "--skip-test-db"),
                    *("--auth-root-authentication-method=normal", *_MARIADB, *_as_root()),
                ]
            )
            try:
                self._wait(lambda: install.poll() is not None)
            finally:
                _end(install, signal.SIGKILL)
            if install.returncode:
                raise self._error(f"could not be set up: status {install.returncode}")
        new.rename(data)

    def _command(self) -> list[str]:
        data, program = self._directory / "data", _find(_SERVER[self._key])
        if self._key == "redis":
            place = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(data)]
            return [program, *place, "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        place = [f"--datadir={data}", f"--socket={self.socket}", f"--pid-file={self._directory / 'pid'}"]
        begin = ["--skip-networking", "--local-infile=1", f"--init-file={self._directory / 'init.sql'}"]
        return [program, "--no-defaults", *place, *begin, *_MARIADB, *_as_root()]

    def _started(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [_find(_SETPRIV), "--pdeathsig", "KILL", "--", *command],
                pass_fds=(self._lock_fd,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the demo alone, which ends it in order
            )

    def _answers(self) -> bool:
        """Tell whether it takes connections.

        Raises:
            StoreError: It has ended.
        """
        if self._process.poll() is not None:
            raise self._error("ended")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.socket))
            return True
        return False

    def _wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not is_done():
            if self._is_stopping():
                message = "the demo was stopped"
                raise StoreError(message)
            if time.monotonic() > deadline:
                raise self._error(f"is not ready after {START_LIMIT_S:g} s")
            time.sleep(_POLL_S)

    def _error(self, what: str) -> StoreError:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_LINES:])
        return StoreError(f"its server {what}; {self._log_path} ends with:\n{tail}")


def _find(program: _Program, path: str = _PATH) -> str:
    return next((found for name in program.names if (found := shutil.which(name, path=path))), "")


def _as_root() -> list[str]:
    """Return what MariaDB demands before it runs as root."""
    return ["--user=root"] if os.geteuid() == 0 else []


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """End a process and what it has started, by force when that takes too long."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, number)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
