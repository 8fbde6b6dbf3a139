"""``demo``: an aggregator and an agent on this machine, as real processes, with real input.

What it leaves in the directory that it is given::

    OUT/stats.csv, stats_remote.csv
    OUT/demo-node/                    CSV files of PC metrics, test rows and detector events; raw waveforms
    OUT/.demo/aggregator, agent       the directories of TOMLs that were run, and a log of each
    OUT/.state/aggregator, agent      journal, spool, commit records: what a second run continues from

It ends as an experiment should: first the agent (everything put is sent, or in its spool), then, when all
of that is stored, the aggregator; then the ledger is read from the files alone. Ctrl-C ends it in the same
way, at once. The demo's own processes never outlive it: each wait has a limit, after which they are killed;
if the demo itself is killed, they see the end of their lifelines and stop in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from edgedaq.clock import mono_ns
from edgedaq.control import ControlError, request
from edgedaq.runtime_dir import default_runtime_dir
from edgedaq.tables import LiveTable, format_status, summary_line

from edgedaq_aggregator.ledger import format_ledger, read_ledger

__all__ = ["NODE", "DemoProcess", "run_demo", "write_configs"]

NODE = "demo-node"
"""The demo's node; its files are under ``OUT/demo-node``."""

START_LIMIT_S = 20.0
STOP_LIMIT_S = 15.0
STORE_LIMIT_S = 20.0
_POLL_S = 0.1
_SHOW_S = 0.5
_LOG_LINES = 15
_REPORT_AGE_NS = 1_000_000_000
"""What intake and stores say of themselves may be so old when their report is made."""

_AGGREGATOR = {
    "aggregator.toml": """\
supervisor_id = "demo-aggregator"
listen = "tcp://127.0.0.1:{port}"
out_dir = "../.."
state_dir = "../../.state/aggregator"
""",
    "store_csv.toml": 'daq_job_type = "DAQJobStoreCSV"\n',
    "store_raw.toml": 'daq_job_type = "DAQJobStoreRaw"\n',
}
_AGENT = {
    "agent.toml": """\
supervisor_id = "demo-node"
aggregator = "tcp://127.0.0.1:{port}"
state_dir = "../../.state/agent"
""",
    "pc_metrics.toml": """\
daq_job_type = "DAQJobPCMetrics"
interval_seconds = 0.5

[store_config.csv]
file_path = "pc_metrics.csv"
add_date = true
""",
    "test.toml": """\
daq_job_type = "DAQJobTest"
rand_min = 1
rand_max = 100
interval_seconds = "10 ms"

[store_config.csv]
file_path = "test.csv"
add_date = true
""",
    "detector.toml": """\
daq_job_type = "DAQJobSimulatedDetector"
rate_hz = 50.0

[store_config.csv]
file_path = "events.csv"
add_date = true

[waveform_store_config.raw]
file_path = "waveforms.bin"
add_date = true
""",
}


class DemoProcess:
    """One of the demo's two commands. A context manager: leaving it ends the process."""

    def __init__(self, module: str, role: str, config_dir: Path) -> None:
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
                pass_fds=(theirs,),
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


def run_demo(out_dir: Path, seconds: float, stream: TextIO = sys.stdout) -> int:
    """Run the demo; in the main thread, because Ctrl-C and SIGTERM are its end.

    Args:
        out_dir: Made if it is not there; a second run continues the files of the first.
        seconds: How long to take data; 0 until Ctrl-C.
        stream: Where the live table and the ledger are written.

    Returns:
        0 when both sides ran and the ledger balances, else 1.
    """
    out_dir = out_dir.resolve()
    aggregator_dir, agent_dir = write_configs(out_dir, _free_port())
    _say(stream, f"writing to {out_dir}; Ctrl-C ends")
    problems: list[str] = []
    with _stop_requests() as stops:
        with DemoProcess("edgedaq_aggregator.cli", "aggregator", aggregator_dir) as aggregator:
            if _is_ready(aggregator, stops, problems):
                with DemoProcess("edgedaq_agent.cli", "agent", agent_dir) as agent:
                    if _is_ready(agent, stops, problems):
                        _watch(aggregator, agent, seconds, stops, LiveTable(stream), problems)
                    _say(stream, "the agent ends: what it has put is sent, or spooled")
                _say(stream, "the aggregator ends once everything is stored")
                _wait_until_stored(aggregator)
        rows = read_ledger(out_dir / ".state" / "aggregator")
        _say(stream, "", format_ledger(rows))
        if not all(row.balances for row in rows):
            problems.append("the ledger does not balance")
        elif not rows and not stops:
            problems.append("nothing was stored")
    _say(stream, *problems)
    return 1 if problems else 0


def write_configs(out_dir: Path, port: int) -> tuple[Path, Path]:
    """Write the directories of TOMLs below ``out_dir``; return the aggregator's and the agent's."""
    directories = []
    for name, files in (("aggregator", _AGGREGATOR), ("agent", _AGENT)):
        directory = out_dir / ".demo" / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (directory / file).write_text(text.replace("{port}", str(port)), encoding="utf-8")
        directories.append(directory)
    return directories[0], directories[1]


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
    live: LiveTable,
    problems: list[str],
) -> None:
    """Show both sides until the time is over, a stop is asked for, or one of them has ended."""
    deadline = time.monotonic() + seconds if seconds else float("inf")
    while time.monotonic() < deadline and not stops:
        statuses = [status for process in (agent, aggregator) if (status := process.status()) is not None]
        live.show(
            "\n\n".join(format_status(status) for status in statuses),
            "; ".join(summary_line(status) for status in statuses),
        )
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
