"""Real servers for the tests: private MariaDB and Redis instances on unix sockets.

Each belongs to the test process that started it, listens on no port, and ends with that process. It can be
killed as by ``kill -9`` and started again on what it left, as often as a test likes.

Where a server is not installed a test is skipped with that reason; in CI it fails. ``make servers`` installs
what is missing on Debian.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pymysql
import pytest
import redis

__all__ = ["MariaDB", "RedisServer", "owned_processes", "require"]

_LIMIT_S = 60.0
_MEMORY = Path("/dev/shm")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_MARIADB = (
    "--no-defaults",
    "--skip-networking",
    "--skip-name-resolve",
    "--innodb-flush-method=fsync",
    "--innodb-log-file-size=64M",
    "--innodb-buffer-pool-size=64M",
    "--performance-schema=OFF",
)

_owned: set[int] = set()


def owned_processes() -> set[int]:
    """Return the pids of servers that live longer than one test, on purpose."""
    return set(_owned)


def require(*names: str) -> str:
    """Return the path of the first of some programs that is installed; skip the test, or fail in CI."""
    for name in names:
        path = shutil.which(name, path=_PATH)
        if path:
            return path
    message = f"{names[0]} is not installed; 'make servers' installs it on Debian"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class _Server:
    """One process of a server, and the directory that outlives it."""

    def __init__(self, parent: Path | None) -> None:
        if parent is None and _MEMORY.is_dir():
            parent = _MEMORY  # a kill loses nothing there either, and tests wait for no disk
        self.directory = Path(tempfile.mkdtemp(prefix="edq_server-", dir=parent))
        self.socket = self.directory / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Tell whether it takes requests."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it on what is in its directory; return when it answers."""
        assert self.process is None
        self.socket.unlink(missing_ok=True)
        # The kernel ends it with us, however we end.
        parent = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([*parent, *self.command], stdout=log, stderr=log)
        _owned.add(self.process.pid)
        end = time.monotonic() + _LIMIT_S
        while not self.answers():
            log_text = (self.directory / "log").read_text(errors="replace")
            assert self.process.poll() is None, log_text
            assert time.monotonic() < end, f"{self.command[0]} does not answer: {log_text}"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as by ``kill -9``."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def revive(self) -> None:
        """Start it if it does not run."""
        if self.process is None:
            self.start()

    def suspend(self) -> None:
        """Let it hang."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove what it had."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        process.wait(_LIMIT_S)
        _owned.discard(process.pid)


class MariaDB(_Server):
    """A MariaDB instance whose root has no password.

    Args:
        options: More of mariadbd's own, e.g. ``--local-infile=0``.
        parent: Where its directory is made; in memory if not given.
    """

    def __init__(self, *options: str, parent: Path | None = None) -> None:
        super().__init__(parent)
        self.options = list(options)
        self._program = require("mariadbd", "mysqld")
        install = require("mariadb-install-db", "mysql_install_db")
        user = ["--user=root"] if os.geteuid() == 0 else []
        made = subprocess.run(
            [
                install,
                "--no-defaults",
                f"--datadir={self._data}",
                "--skip-test-db",
                "--auth-root-authentication-method=normal",
                "--innodb-log-file-size=64M",
                *user,
            ],
            capture_output=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def command(self) -> list[str]:
        user = ["--user=root"] if os.geteuid() == 0 else []
        place = [f"--datadir={self._data}", f"--socket={self.socket}", f"--pid-file={self.directory}/pid"]
        return [self._program, *_MARIADB, *place, *user, *self.options]

    def answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:  # PyMySQL leaves a socket open that finds nobody
                probe.connect(str(self.socket))
            with self.connect():
                return True
        except (OSError, pymysql.Error):
            return False

    def connect(self, database: str | None = None) -> pymysql.Connection[Any]:
        """Return a connection as root, which a ``with`` closes."""
        return pymysql.connect(
            unix_socket=str(self.socket), user="root", database=database, charset="utf8mb4", autocommit=True
        )

    def rows(self, query: str, *values: Any, database: str | None = None) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(query, values or None)
            return list(cursor.fetchall())


class RedisServer(_Server):
    """A Redis instance.

    Args:
        options: More of redis-server's own, e.g. ``--appendonly yes``.
        parent: Where its directory is made; in memory if not given.
    """

    def __init__(self, *options: str, parent: Path | None = None) -> None:
        super().__init__(parent)
        self.options = list(options)
        self._program = require("redis-server", "valkey-server")

    @property
    def command(self) -> list[str]:
        place = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory)]
        return [self._program, *place, "--save", "", *self.options]

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        """Return a client that gives bytes, which a ``with`` closes."""
        return redis.Redis(unix_socket_path=str(self.socket))
