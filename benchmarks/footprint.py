"""What a node costs while it does little: processor and memory of each process, idle and at 1000 rows/s.

CPU is in percent of one core over the measured seconds; memory is PSS, which shares common pages out fairly.
The last line of each table is what counts on a Raspberry Pi: all that the agent runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import psutil

from benchmarks.end_to_end import go, site_with_job
from tests.system.harness import Site

MIB = 1 << 20
CASES = {
    "idle": ("rows", 1, 0.001),
    "1000 rows/s put singly": ("rows", 1, 1000.0),
    "1000 messages/s of 72 bytes": ("raw", 72, 1000.0),
}


def main() -> int:
    """Measure and print a table for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, (mode, size, rate) in CASES.items():
        held: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.repeats):
            for process, found in measure(folder, mode, size, rate, arguments.seconds).items():
                held.setdefault(process, []).append(found)
        print_table(name, held)
    return 0


def measure(
    folder: Path, mode: str, size: int, rate: float, seconds: float
) -> dict[str, tuple[float, float]]:
    """Return per process (percent of a core, PSS in MiB), and sums for each side."""
    with site_with_job(folder, size, mode=mode, rate_limit=rate) as site:
        go(site)
        time.sleep(3.0)
        processes = _processes(site)
        before = {name: _cpu_s(process) for name, process in processes.items()}
        begun_s = time.monotonic()
        time.sleep(seconds)
        passed_s = time.monotonic() - begun_s
        found = {
            name: (
                100 * (_cpu_s(process) - before[name]) / passed_s,
                process.memory_full_info().pss / MIB,
            )
            for name, process in processes.items()
        }
        site.agent.stop()
        site.aggregator.stop()
    for side in ("agent", "aggregator"):
        ours = [held for name, held in found.items() if name.startswith(side + " ")]
        found[f"{side} in all"] = (sum(cpu for cpu, _ in ours), sum(pss for _, pss in ours))
    return found


def print_table(name: str, held: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians of one case."""
    print(f"\n{name}")
    for process, found in held.items():
        cpu = statistics.median(one[0] for one in found)
        pss = statistics.median(one[1] for one in found)
        print(f"{process:>24}  {cpu:6.1f} % of a core  {pss:6.1f} MiB")


def _processes(site: Site) -> dict[str, psutil.Process]:
    found = {}
    for name, side in (("agent", site.agent), ("aggregator", site.aggregator)):
        found[f"{name} supervisor"] = psutil.Process(side.process.pid)
        for unique_id, job in side.jobs().items():
            found[f"{name} {unique_id}"] = psutil.Process(job["pid"])
    return found


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    sys.exit(main())
