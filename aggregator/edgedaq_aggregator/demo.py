"""``demo``: an aggregator and an agent on this machine, as real processes, with real input.

What it leaves in the directory that it is given::

    OUT/stats.csv, stats_remote.csv
    OUT/demo-node/                    PC metrics, test rows, detector events, temperatures; raw waveforms
    OUT/.demo/aggregator, agent       the directories of TOMLs that were run, and a log of each
    OUT/.demo/mysql, redis            its own servers, for stores that need them and are wanted
    OUT/.state                        journal, commit records, spool: what a second run goes on from

It ends as an experiment should: first the agent (everything put is sent, or in its spool), then, when all
of that is stored, the aggregator; then the ledger is read from the files alone. Ctrl-C ends it in the same
way, at once. The demo's own processes never outlive it: each wait has a limit, after which they are killed;
if the demo itself is killed, they see the end of their lifelines and stop in order, and the kernel ends the
servers. All of them hold ``OUT/.demo/lock``, so that a second demo waits until the last of the first is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from edgedaq.clock import mono_ns
from edgedaq.control import ControlError, request
from edgedaq.errors import ConfigError, StoreError
from edgedaq.runtime_dir import default_runtime_dir
from edgedaq.tables import LiveTable, format_status, summary_line

from edgedaq_aggregator.demo_configs import check_stores, write_configs
from edgedaq_aggregator.demo_servers import SERVERS, DemoServer, needed
from edgedaq_aggregator.ledger import format_ledger, read_ledger

__all__ = ["DemoProcess", "run_demo"]

START_LIMIT_S = 40.0
STOP_LIMIT_S = 15.0
LOCK_LIMIT_S = 30.0
STORE_LIMIT_S = 20.0
_POLL_S = 0.1
_SHOW_S = 0.5
_LOG_LINES = 15
_REPORT_AGE_NS = 1_000_000_000
"""What intake and stores say of themselves may be so old when their report is made."""


class DemoProcess:
    """One of the demo's two commands. A context manager: leaving it ends the process.

    Args:
        lock_fd: A lock that it holds for as long as it lives.
    """

    def __init__(self, module: str, role: str, config_dir: Path, lock_fd: int) -> None:
        self.role = role
        self.log_path = config_dir.with_suffix(".log")
        self._runtime_dir = default_runtime_dir(config_dir, role)
        theirs, self._lifeline_fd = os.pipe()
        with self.log_path.open("ab") as log, os.fdopen(theirs, "rb"):
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", module, "run"),
                    *("--config-dir", str(config_dir), "--lifeline-fd", str(theirs)),
                ],
                pass_fds=(theirs, lock_fd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the demo alone, which ends them in order
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        os.close(self._lifeline_fd)

    @property
    def is_running(self) -> bool:
        """The process has not ended."""
        return self._process.poll() is None

    def status(self) -> dict[str, Any] | None:
        """Return what it says about itself, None while it says nothing."""
        try:
            return request(self._runtime_dir, "status", limit_s=1.0)
        except ControlError:
            return None

    def stop(self) -> int:
        """End it in order, or by force when that takes too long; return its exit status."""
        if self.is_running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(STOP_LIMIT_S)
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def log_tail(self) -> str:
        """Return the end of its log."""
        with contextlib.suppress(OSError):
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(lines[-_LOG_LINES:])
        return ""


def run_demo(out_dir: Path, seconds: float, stores: Sequence[str], stream: TextIO = sys.stdout) -> int:
    """Run the demo; in the main thread, because Ctrl-C and SIGTERM are its end.

    Args:
        out_dir: Made if it is not there; a second run continues the files of the first.
        seconds: How long to take data; 0 until Ctrl-C.
        stores: Their keys, as ``chosen_stores`` returns them.
        stream: Where the live table and the ledger are written.

    Returns:
        0 when both sides ran and the ledger balances, else 1.

    Raises:
        ConfigError: Another demo runs there, or none of the stores can be had.
    """
    out_dir = out_dir.resolve()
    state_dir = out_dir / ".state"
    notes = [f"writing to {out_dir}; Ctrl-C ends"]
    problems: list[str] = []
    _say(stream, *notes)
    with _stop_requests() as stops, _only_demo(out_dir, stops) as lock_fd, contextlib.ExitStack() as servers:
        sockets, left_out = _start_servers(out_dir, stores, lock_fd, stops, servers, stream)
        if stops:
            return 0
        notes += left_out
        taken = check_stores([key for key in stores if key not in SERVERS or key in sockets])
        earlier = {row.stream for row in read_ledger(state_dir)}
        directories = write_configs(out_dir, _free_port(), taken, sockets)
        _run_both(directories, lock_fd, seconds, stops, _View(stream, notes), problems)
        rows = read_ledger(state_dir)
    new_count = sum(row.stream not in earlier for row in rows)
    _say(stream, "", format_ledger(rows, limit=max(new_count, 1)))
    if not all(row.balances for row in rows):
        problems.append("the ledger does not balance")
    elif not rows and not stops:
        problems.append("nothing was stored")
    if stream.isatty():
        _say(stream, *left_out)  # the live table has covered them
    _say(stream, *problems)
    return 1 if problems else 0


def _start_servers(
    out_dir: Path,
    stores: Sequence[str],
    lock_fd: int,
    stops: list[int],
    servers: contextlib.ExitStack,
    stream: TextIO,
) -> tuple[dict[str, Path], list[str]]:
    """Start the servers that stores need; return the sockets of those that run, and why others do not."""
    sockets: dict[str, Path] = {}
    left_out: list[str] = []
    for key in SERVERS:
        if key not in stores or stops:
            continue
        directory = out_dir / ".demo" / key
        reason = needed(key)
        if not reason:
            _say(stream, f"{key} gets a server of its own, in {directory}")
            try:
                server = DemoServer(key, directory, lock_fd, lambda: stops)
            except StoreError as e:
                reason = str(e)
            else:
                sockets[key] = servers.enter_context(server).socket
        if reason and not stops:
            left_out.append(f"{key} is left out: {reason}")
            _say(stream, left_out[-1])
    return sockets, left_out


class _View:
    """What the user sees: notes that stay, under them the status of both sides."""

    def __init__(self, stream: TextIO, notes: Sequence[str]) -> None:
        self.stream = stream
        self._notes = "\n".join(notes)
        self._live = LiveTable(stream)

    def show(self, statuses: Sequence[dict[str, Any]]) -> None:
        """Draw it anew."""
        self._live.show(
            "\n\n".join([self._notes, *map(format_status, statuses)]), "; ".join(map(summary_line, statuses))
        )


def _run_both(
    directories: tuple[Path, Path],
    lock_fd: int,
    seconds: float,
    stops: list[int],
    view: _View,
    problems: list[str],
) -> None:
    """Run the aggregator and, while it does, the agent; end them in order."""
    with DemoProcess("edgedaq_aggregator.cli", "aggregator", directories[0], lock_fd) as aggregator:
        if _is_ready(aggregator, stops, problems):
            with DemoProcess("edgedaq_agent.cli", "agent", directories[1], lock_fd) as agent:
                if _is_ready(agent, stops, problems):
                    _watch(aggregator, agent, seconds, stops, view, problems)
                _say(view.stream, "the agent ends: what it has put is sent, or spooled")
            _say(view.stream, "the aggregator ends once everything is stored")
            _wait_until_stored(aggregator)


def _is_ready(process: DemoProcess, stops: list[int], problems: list[str]) -> bool:
    """Wait until all jobs of a process run; say what is wrong if they do not, or it has ended."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.is_running and time.monotonic() < deadline and not stops:
        status = process.status()
        if status is not None and all(job["state"] == "RUNNING" for job in status["jobs"]):
            return True
        time.sleep(_POLL_S)
    if not stops:
        problems.append(
            f"the {process.role} does not run; {process.log_path} ends with:\n{process.log_tail()}"
        )
    return False


def _watch(
    aggregator: DemoProcess,
    agent: DemoProcess,
    seconds: float,
    stops: list[int],
    view: _View,
    problems: list[str],
) -> None:
    """Show both sides until the time is over, a stop is asked for, or one of them has ended."""
    deadline = time.monotonic() + seconds if seconds else float("inf")
    while time.monotonic() < deadline and not stops:
        view.show([status for process in (agent, aggregator) if (status := process.status()) is not None])
        for process in (agent, aggregator):
            if not process.is_running:
                problems.append(
                    f"the {process.role} ended; {process.log_path} ends with:\n{process.log_tail()}"
                )
                return
        show_next = min(time.monotonic() + _SHOW_S, deadline)
        while time.monotonic() < show_next and not stops:
            time.sleep(min(_POLL_S, max(show_next - time.monotonic(), 0)))


def _wait_until_stored(aggregator: DemoProcess) -> None:
    """Wait until the stores have committed all that is in the journal, with a limit."""
    deadline = time.monotonic() + STORE_LIMIT_S
    since_ns = mono_ns() + _REPORT_AGE_NS
    while aggregator.is_running and time.monotonic() < deadline:
        status = aggregator.status()
        if status is not None and _is_all_stored(status, since_ns):
            return
        time.sleep(_POLL_S)


def _is_all_stored(status: dict[str, Any], since_ns: int) -> bool:
    """Tell whether nothing waits in the journal, by reports that are newer than a monotonic time."""
    reports = [job["total"] for job in status["jobs"] if job["group"] in ("intake", "store")]
    is_new = all(report is not None and report["t_mono_ns"] > since_ns for report in reports)
    return is_new and not status["statistics"]["nodes"][-1]["waiting_count"]


@contextlib.contextmanager
def _only_demo(out_dir: Path, stops: list[int]) -> Iterator[int]:
    """Yield a lock that says that a demo runs in a directory; wait for what ends there, or a request to stop.

    Raises:
        ConfigError: Another one runs there.
    """
    path = out_dir / ".demo" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as lock:
        deadline = time.monotonic() + LOCK_LIMIT_S
        while not stops:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                if time.monotonic() > deadline:
                    message = f"another demo runs in {out_dir}: end it, or give another directory"
                    raise ConfigError(message) from e
            time.sleep(_POLL_S)
        yield lock.fileno()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(stream: TextIO, *lines: str) -> None:
    stream.writelines(f"{line}\n" for line in lines)
    stream.flush()


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that grows by a number for each signal that asks to stop; none of them interrupts."""
    stops: list[int] = []
    former = {
        number: signal.signal(number, lambda got, _: stops.append(got))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield stops
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
