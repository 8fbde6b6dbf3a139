"""How long an agent takes from its start until it works, and what it holds: ``python -m benchmarks.start``.

Each number is the median of some starts, with one and with ten idle jobs. The reference of the same run is
how long it takes Python to start and to import a worker's modules, once.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

JOB = """
from edgedaq import DAQJob

class Idle(DAQJob):
    def start(self):
        while True:
            self.sleep(1.0)
"""
_REPEATS = 5
_SETTLE_S = 2.0


def proportional_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants, what they share counted once."""
    process = psutil.Process(pid)
    return sum(one.memory_full_info().pss for one in (process, *process.children(recursive=True)))


def measure(jobs_count: int, place: Path) -> tuple[float, float]:
    """Return seconds to READY and megabytes of one start."""
    config_dir = place / "configs"
    config_dir.mkdir(parents=True)
    main = (
        'supervisor_id = "n1"\naggregator = "tcp://127.0.0.1:1"\n'
        f'state_dir = "{place / "state"}"\nruntime_dir = "{place / "run"}"\n'
    )
    (config_dir / "agent.toml").write_text(main)
    (config_dir / "idle.py").write_text(JOB)
    for number in range(jobs_count):
        (config_dir / f"idle{number}.toml").write_text('daq_job_type = "idle.py:Idle"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(place / "notify"))
        notified.settimeout(60)
        begun_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "edgedaq_agent.cli", "run", "--config-dir", str(config_dir)],
            env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while notified.recv(4096) != b"READY=1":
                pass
            ready_s = time.monotonic() - begun_s
            time.sleep(_SETTLE_S)
            held = proportional_bytes(process.pid) / 1e6
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return ready_s, held


def reference_s() -> float:
    """Return how long one Python takes to start and to import what a worker does."""
    begun_s = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", "import edgedaq.worker"], check=True)
    return time.monotonic() - begun_s


def main() -> None:
    """Print the table."""
    reference = statistics.median(reference_s() for _ in range(_REPEATS))
    print(f"one Python with a worker's modules: {reference:.2f} s (reference)")
    for jobs_count in (1, 10):
        with tempfile.TemporaryDirectory(prefix="edq-") as place:
            found = [measure(jobs_count, Path(place) / str(number)) for number in range(_REPEATS)]
        ready = statistics.median(ready_s for ready_s, _ in found)
        held = statistics.median(held for _, held in found)
        ratio = ready / reference
        print(f"{jobs_count:3} idle jobs: ready after {ready:.2f} s ({ratio:.1f} x), {held:.1f} MB (PSS)")


if __name__ == "__main__":
    main()
