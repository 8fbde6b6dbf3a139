"""What every test gets: nothing may be left behind, and short runtime directories.

A test that leaves a process, a thread, an open socket or memory in ``/dev/shm`` fails, by name, and what it
left is ended so that the next test starts clean.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.servers import owned_processes

_SETTLE_S = 3.0
_SHARED = Path("/dev/shm")
_MARK = "EDGEDAQ_TEST_OWNER"

os.environ[_MARK] = str(os.getpid())  # processes inherit it, so that orphans can be told from strangers

# Started in the background of a script, they would be ignored here and in all that tests start.
for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Return an empty directory on tmpfs whose path leaves room for unix sockets (at most 107 bytes)."""
    parent = _SHARED if _SHARED.is_dir() else None
    path = Path(tempfile.mkdtemp(prefix=f"edq-{os.getpid()}-", dir=parent))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    threads = set(threading.enumerate())
    sockets = _open_sockets()
    shared = _shared_memory()
    yield
    left: dict[str, list[str]] = {}
    checks: dict[str, Callable[[], list[str]]] = {
        "processes": lambda: [_describe(process) for process in _processes()],
        "threads": lambda: [thread.name for thread in set(threading.enumerate()) - threads],
        "sockets": lambda: sorted(_open_sockets() - sockets),
        "shared memory": lambda: sorted(_unused(_shared_memory() - shared)),
    }
    for what, find in checks.items():
        found = _settled(find)
        if found:
            left[what] = found
    for process in _processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(_SETTLE_S)
    if left:
        pytest.fail("left behind: " + "; ".join(f"{what}: {found}" for what, found in left.items()))


def _settled(find: Callable[[], list[str]]) -> list[str]:
    """Return what ``find`` still finds once it had time to go away."""
    end = time.monotonic() + _SETTLE_S
    while found := find():
        if time.monotonic() > end:
            return found
        gc.collect()
        time.sleep(0.02)
    return []


def _processes() -> list[psutil.Process]:
    """Return the living processes that this test process started, orphans included, but not the servers."""
    servers = owned_processes()
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    own = f"{_MARK}={os.getpid()}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        pid = int(entry.parent.name)
        if pid in found or pid == os.getpid():
            continue
        try:
            if own in entry.read_bytes().split(b"\0"):
                found[pid] = psutil.Process(pid)
        except (OSError, psutil.Error):
            continue
    return [process for process in found.values() if process.is_running() and process.pid not in servers]


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)


def _open_sockets() -> set[str]:
    """Return this process's open sockets and event descriptors, of which a zmq context holds both."""
    found = set()
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
        elif target.startswith("anon_inode:"):
            found.add(f"{target} (descriptor {entry.name})")
    return found


def _shared_memory() -> set[str]:
    """Return the runtime directories in ``/dev/shm``: what ``runtime_dir`` makes, and the default ones."""
    mine = {str(path) for path in _SHARED.glob(f"edq-{os.getpid()}-*")}
    return mine | {str(path) for path in _SHARED.glob("edgedaq*/*")}


def _unused(paths: set[str]) -> set[str]:
    """Return the paths beneath which no living process holds anything: others may test beside us."""
    held = ""
    for entry in Path("/proc").glob("[0-9]*") if paths else ():
        try:
            held += (entry / "maps").read_text()
            held += "\n".join(str(descriptor.readlink()) for descriptor in (entry / "fd").iterdir())
        except (OSError, UnicodeDecodeError):
            continue
    return {path for path in paths if path not in held}
