"""Throughput and latency from ``put`` to a stored file, everything durable, every byte checked.

Each run starts an aggregator and an agent as real processes on loopback, lets ``DAQJobBenchmark`` put raw
messages as fast as they are taken, and stops the clock when the commit record of the raw store covers the
last one: by then journal and stored file have been fdatasynced. Then every message of the file is compared
with what was put. In the same turn the same number of bytes is written and fdatasynced bare: absolute figures
belong to the machine of the moment, the ratios to these carry over.

Run by ``make bench``; ``--help`` says what can be changed. Uses at most 4 GB of disk at a time.
"""

from __future__ import annotations

import argparse
import csv
import mmap
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgedaq.storage import OsStorage
from edgedaq_agent.jobs.benchmark import filler, filler_count
from edgedaq_aggregator.stores.commits import read_commits

from benchmarks.bare_disk import settle, write_durably
from tests.system.harness import Site

MB = 1_000_000
WAITING_JOB = f"{Path(__file__).parent / 'waiting_job.py'}:WaitingBenchmark"
RUN_LIMIT_S = 120.0


@dataclass(frozen=True)
class Case:
    """One size of message, and what ENRGDAQ's verified path did at it (which lost data)."""

    name: str
    payload_bytes: int
    count: int
    enrgdaq: str
    enrgdaq_mb_per_s: float

    @property
    def total_bytes(self) -> int:
        """Return how many bytes are put."""
        return self.payload_bytes * self.count


CASES = (
    Case("1 kB", 1_000, 400_000, "11.6k msg/s, 40 % lost", 11.6),
    Case("16 kB", 16_000, 40_000, "143 MB/s, 35 % lost", 143.0),
    Case("160 kB", 160_000, 6_000, "525 MB/s", 525.0),
    Case("1 MB", 1_000_000, 1_000, "594 MB/s", 594.0),
)


@dataclass
class Measured:
    """Megabytes per second of one case, one entry per repetition."""

    end_to_end: list[float] = field(default_factory=list)
    with_keys: list[float] = field(default_factory=list)
    bare_one: list[float] = field(default_factory=list)
    bare_two: list[float] = field(default_factory=list)


def main() -> int:
    """Measure what the command line asks for and print it; 1 if a stored byte was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns; the table shows medians (default 5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the bytes of each run (default 1)"
    )
    parser.add_argument("--only", default="", help="a size, e.g. '16 kB', or 'latency'")
    parser.add_argument("--folder", type=Path, default=Path("bench-out"), help="on the disk to measure")
    parser.add_argument(
        "--pause",
        type=float,
        default=10.0,
        help="seconds of rest for the disk before each figure (default 10)",
    )
    parser.add_argument(
        "--curve", action="store_true", help="each case with CURVE as well, and its ratio to without"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        replace(case, count=max(int(case.count * arguments.scale), 1))
        for case in CASES
        if arguments.only in ("", case.name)
    ]
    measured = {case.name: Measured() for case in cases}
    for turn in range(arguments.repeats):
        for case in cases:
            print(f"turn {turn + 1} of {arguments.repeats}: {case.name}", file=sys.stderr)
            measure(case, folder, measured[case.name], arguments.pause, has_keys=arguments.curve)
    if cases:
        print_table(cases, measured, arguments.repeats)
    if arguments.only in ("", "latency"):
        print_latency(folder)
    return 0


def measure(case: Case, folder: Path, measured: Measured, pause_s: float, *, has_keys: bool) -> None:
    """Add one repetition of a case, end to end (with keys as well, if so) and bare."""
    settle(pause_s)
    measured.end_to_end.append(case.total_bytes / run_end_to_end(case, folder) / MB)
    if has_keys:
        settle(pause_s)
        measured.with_keys.append(case.total_bytes / run_end_to_end(case, folder, has_keys=True) / MB)
    for held, files_count in ((measured.bare_one, 1), (measured.bare_two, 2)):
        settle(pause_s)
        held.append(write_durably(folder, case.total_bytes, files_count=files_count) / MB)


def run_end_to_end(case: Case, folder: Path, *, has_keys: bool = False) -> float:
    """Return the seconds from the first put until the last message is durable in the stored file.

    Raises:
        SystemExit: A stored message is not what was put, or one is missing or too many.
    """
    prepare = [Site.enrol] if has_keys else []
    with site_with_job(folder, case.payload_bytes, *prepare, messages=case.count) as site:
        stored = site.node_dir / "job.bin"
        go(site)
        site.aggregator.wait(lambda: _size(stored) >= case.total_bytes, RUN_LIMIT_S, "all is written")
        site.aggregator.wait(lambda: _stored_count(site) >= case.count, 10.0, "all is committed")
        ended_ns = time.monotonic_ns()
        begun_ns = int((site.root / "begun").read_text(encoding="ascii"))
        site.agent.stop()
        site.aggregator.stop()
        check_stored(stored, case.payload_bytes, case.count)
    return (ended_ns - begun_ns) / 1e9


@contextmanager
def site_with_job(
    folder: Path,
    payload_size: int,
    prepare: Callable[[Site], None] = lambda _: None,
    /,
    *,
    mode: str = "raw",
    **settings: float,
) -> Iterator[Site]:
    """Run both sides with one benchmark job that waits for ``go``; rows go to CSV, messages to Raw."""
    shared = Path("/dev/shm")  # noqa: S108  # a directory of its own within it
    root = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    runtime = Path(tempfile.mkdtemp(prefix="edq-bench-", dir=shared if shared.is_dir() else None))
    try:
        with Site(root, runtime) as site:
            lines = [
                f'daq_job_type = "{WAITING_JOB}"',
                f'mode = "{mode}"',
                f"payload_size = {payload_size}",
                f'go_path = "{root / "go"}"',
                f'begun_path = "{root / "begun"}"',
                *(f"{key} = {value}" for key, value in settings.items()),
                *(
                    ["[store_config.raw]", 'file_path = "job.bin"']
                    if mode == "raw"
                    else ["[store_config.csv]", 'file_path = "job.csv"']
                ),
            ]
            (site.agent_dir / "job.toml").write_text("\n".join(lines), encoding="utf-8")
            prepare(site)
            site.aggregator.start()
            site.agent.start()
            yield site
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


def go(site: Site) -> None:
    """Let the job begin."""
    (site.root / "go").touch()


def check_stored(path: Path, payload_bytes: int, count: int) -> None:
    """Compare every byte of a stored file with what was put.

    Raises:
        SystemExit: They differ.
    """
    found_bytes = path.stat().st_size
    if found_bytes != payload_bytes * count:
        sys.exit(f"{path.name}: {found_bytes} bytes are stored, {payload_bytes * count} were put")
    fillers = [filler(index, payload_bytes) for index in range(filler_count(payload_bytes))]
    stamp = struct.Struct("<Q")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for sequence in range(count):
            start = sequence * payload_bytes
            message = content[start : start + payload_bytes]
            if message != stamp.pack(sequence) + fillers[sequence % len(fillers)]:
                (found,) = stamp.unpack_from(message)
                sys.exit(f"{path.name}: message {sequence} is not what was put (its number says {found})")


def print_table(cases: list[Case], measured: dict[str, Measured], repeats: int) -> None:
    """Print the medians, and ratios to the bare disk of the same run."""
    print(
        f"\nEnd to end, durable in journal and stored file, every byte checked; medians of {repeats}, MB/s."
    )
    print(
        "bare: the same bytes written to a new file and fdatasynced every 8 MiB, to one and to two at once.\n"
    )
    head = (
        "size",
        "msg/s",
        "MB/s",
        "ENRGDAQ",
        "x",
        "bare, one file",
        "two files",
        "of two",
    )
    rows: list[tuple[str, ...]] = [head]
    for case in cases:
        held = measured[case.name]
        rate = statistics.median(held.end_to_end)
        bare_two = statistics.median(held.bare_two)
        rows.append(
            (
                case.name,
                f"{rate * MB / case.payload_bytes:,.0f}",
                f"{rate:.0f}",
                case.enrgdaq,
                f"{rate / case.enrgdaq_mb_per_s:.1f}",
                f"{statistics.median(held.bare_one):.0f}",
                f"{bare_two:.0f}",
                f"{rate / bare_two:.2f}",
            )
        )
    if any(measured[case.name].with_keys for case in cases):
        pairs = zip(rows[1:], cases, strict=True)
        rows = [(*head, "CURVE", "of plain"), *(_with_keys(row, measured[case.name]) for row, case in pairs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _with_keys(row: tuple[str, ...], held: Measured) -> tuple[str, ...]:
    with_keys = statistics.median(held.with_keys)
    return (*row, f"{with_keys:.0f}", f"{with_keys / statistics.median(held.end_to_end):.2f}")


def print_latency(folder: Path, rate_hz: float = 1000.0, run_s: float = 10.0) -> None:
    """Print put → durable in the journal at a steady pace, as the aggregator itself measures it."""
    with site_with_job(folder, 1_000, rate_limit=rate_hz) as site:
        go(site)
        time.sleep(run_s)
        with (site.out_dir / "stats.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["unique_id"] == "job"]
        site.agent.stop()
        site.aggregator.stop()
    if not rows:
        sys.exit("stats.csv has no row of the benchmark job")
    figures = ", ".join(f"p{name} {rows[0][f'latency_p{name}_ms']} ms" for name in (50, 95, 99))
    print(f"\nput to durable in the journal at {rate_hz:.0f} msg/s of 1 kB: {figures}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stored_count(site: Site) -> int:
    state, _ = read_commits(site.state_dir / "stores" / "raw", OsStorage())
    table = state.table
    return sum(account.rows for account in [*table.streams.values(), *table.tombstones.values()])


if __name__ == "__main__":
    sys.exit(main())
