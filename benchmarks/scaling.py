"""What a row costs as streams and sessions grow, at the same total rate; and how long an ACK takes then.

``streams``: one job puts into 1, 10, 100 streams in turn. ``sessions``: 1, 10, 100, 300 nodes send to one
intake from at most four load processes. The cost is processor time of everything that EdgeDAQ runs (for
sessions: of the aggregator) per row. Every row is accounted for: acknowledged, stored, the ledger balances.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from edgedaq_aggregator.ledger import read_ledger

from benchmarks.end_to_end import go, site_with_job
from tests.system.harness import ROOT, Side, Site, environment

STREAMS = (1, 10, 100)
SESSIONS = (1, 10, 100, 300)
LOAD_PROCESSES = 4


def main() -> int:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--rate", type=float, default=100_000.0, help="rows per second, all together")
    parser.add_argument("--only", choices=["streams", "sessions"], default="")
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.only != "sessions":
        costs: dict[int, list[float]] = {count: [] for count in STREAMS}
        for _ in range(arguments.repeats):
            for count in STREAMS:
                costs[count].append(cost_of_streams(folder, count, arguments.rate, arguments.seconds))
        print_costs("streams", costs)
    if arguments.only != "streams":
        held: dict[int, list[tuple[float, float, float]]] = {count: [] for count in SESSIONS}
        for _ in range(arguments.repeats):
            for count in SESSIONS:
                held[count].append(cost_of_sessions(folder, count, arguments.rate, arguments.seconds))
        print_costs("sessions", {count: [one[0] for one in found] for count, found in held.items()})
        for count, found in held.items():
            welcome_s, ack_s = (statistics.median(one[at] for one in found) for at in (1, 2))
            print(f"{count:>4} sessions: all welcomed within {welcome_s:.2f} s, longest ACK {ack_s:.2f} s")
    return 0


def cost_of_streams(folder: Path, count: int, rate: float, seconds: float) -> float:
    """Return microseconds of processor per row with so many streams of one job.

    Raises:
        SystemExit: A row is missing or too many.
    """
    rows_per_put = 100
    settings = {"rate_limit": rate / rows_per_put, "streams": count}
    with site_with_job(folder, rows_per_put, mode="rows", **settings) as site:
        go(site)
        time.sleep(2.0)
        processes = _processes(site.aggregator) | _processes(site.agent)
        cpu_s, rows = _cpu_s(processes), _put_rows(site)
        time.sleep(seconds)
        used_s, put = _cpu_s(processes) - cpu_s, _put_rows(site) - rows
        site.agent.stop()
        time.sleep(1.0)
        site.aggregator.stop()
        _check_ledger(site.state_dir)
    return used_s / put * 1e6


def cost_of_sessions(folder: Path, count: int, rate: float, seconds: float) -> tuple[float, float, float]:
    """Return microseconds of the aggregator's processor per row, the last WELCOME, the longest ACK (s)."""
    root = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    runtime = Path(tempfile.mkdtemp(prefix="edq-bench-", dir="/dev/shm"))  # its own directory
    try:
        with Site(root, runtime) as site:
            site.aggregator.start()
            processes = _processes(site.aggregator)
            cpu_s = _cpu_s(processes)
            found = _load(site, count, rate, seconds)
            rows = sum(one["acked_rows"] for one in found)
            if rows != sum(one["rows"] for one in found):
                sys.exit(f"{count} sessions: {rows} rows were acknowledged, others were sent")
            site.aggregator.wait(lambda: _stored(site) == rows, 30.0, "all is stored")
            used_s = _cpu_s(processes) - cpu_s
            site.aggregator.stop()
            _check_ledger(site.state_dir)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
    welcome_s = max(wait for one in found for wait in one["welcome_s"])
    return used_s / rows * 1e6, welcome_s, max(wait for one in found for wait in one["ack_delay_s"])


def print_costs(what: str, costs: dict[int, list[float]]) -> None:
    """Print the medians, and how they grow."""
    base = statistics.median(costs[min(costs)])
    print(f"\nprocessor time per row, median of {len(costs[min(costs)])}")
    for count, found in costs.items():
        cost = statistics.median(found)
        print(f"{count:>4} {what}: {cost:6.3f} us per row, {cost / base:.2f} of one")


def _load(site: Site, count: int, rate: float, seconds: float) -> list[dict[str, Any]]:
    many = min(count, LOAD_PROCESSES)
    shares = [count // many + (at < count % many) for at in range(many)]
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.load"),
                *("--address", f"tcp://127.0.0.1:{site.port}"),
                *("--first", str(sum(shares[:at])), "--nodes", str(share)),
                *("--rate", str(rate * share / count), "--seconds", str(seconds)),
            ],
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
        )
        for at, share in enumerate(shares)
    ]
    return [json.loads(process.communicate(timeout=seconds + 60)[0].splitlines()[-1]) for process in running]


def _processes(side: Side) -> dict[int, psutil.Process]:
    found = psutil.Process(side.process.pid)
    return {process.pid: process for process in [found, *found.children(recursive=True)]}


def _cpu_s(processes: dict[int, psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes.values())


def _put_rows(site: Site) -> int:
    return int(site.agent.jobs()["job"]["total"]["out_count"])


def _stored(site: Site) -> int:
    return sum(row.stored for row in read_ledger(site.state_dir))


def _check_ledger(state_dir: Path) -> None:
    wrong = [row for row in read_ledger(state_dir) if not row.balances or row.waiting or row.dropped]
    if wrong:
        sys.exit(f"the ledger does not balance: {wrong[0]}")


if __name__ == "__main__":
    sys.exit(main())
