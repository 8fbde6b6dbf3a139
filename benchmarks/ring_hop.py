"""The ring alone: from ``put`` in one process to frames that were checked in others, on this host.

A real worker process puts as fast as it can; real consumers check every frame (xxh3) and give it back.
Beside it, in the same turn, one process copies the same messages into memory of the ring's size and checks
each once: what the producer cannot do without. Ratios to that carry over to other machines.

``--company`` shows what a second consumer costs the first: none, a slow, a stopped and a killed one, each of
which rather misses something (``[input] policy``). ``--puts`` shows what a put costs the job alone.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq
from edgedaq.clock import boot_id
from edgedaq.frame import split
from edgedaq.inlet import Inlet
from edgedaq.job_context import WorkerSpec
from edgedaq.link import Link, LinkClosed
from edgedaq.worker_process import worker_environment
from xxhash import xxh3_64_intdigest

from benchmarks.hop_job import TOPICS, fillers

SIZES = (128, 1_000, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20)
RING_BYTES = 16 << 20
LIMIT_S = 60.0
JOB = f"{Path(__file__).with_name('hop_job.py')}:HopJob"
HOP = "open_raw"
FOLLOWING = ("drop_oldest", "drop_newest")
TROUBLES = ("slow", "stopped", "killed")


def main() -> int:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns; the tables show medians (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default 1)")
    parser.add_argument("--sizes", default="", help="bytes, separated by commas")
    parser.add_argument("--puts", action="store_true", help="only what a put costs the job")
    parser.add_argument("--hop", action="store_true", help="only the hop")
    parser.add_argument("--company", action="store_true", help="only what a second consumer costs the first")
    parser.add_argument("--consume", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.consume:
        rings_dir, name, policy, pause_s = arguments.consume
        consume(Path(rings_dir), name, policy, float(pause_s))
        return 0
    sizes = [int(size) for size in arguments.sizes.split(",")] if arguments.sizes else SIZES
    wanted = [arguments.puts, arguments.hop, arguments.company]
    everything = not any(wanted)
    if everything or arguments.puts:
        print_puts(arguments.repeats, arguments.seconds)
    if everything or arguments.hop:
        print_hop(sizes, arguments.repeats, arguments.seconds)
    if everything or arguments.company:
        print_company(arguments.repeats, arguments.seconds)
    return 0


def print_puts(repeats: int, seconds: float) -> None:
    """Print how fast a job can put while nobody takes anything, and while one consumer does."""
    print("\nPuts of one job, records per second: nobody takes them / one consumer takes and checks them.\n")
    cases = (
        ("128 B messages, put_raw", "raw", 128),
        ("128 B messages, open_raw", "open_raw", 128),
        ("1 kB messages, put_raw", "raw", 1000),
        ("1 kB messages, open_raw", "open_raw", 1000),
        ("rows of 72 bytes, put_rows of 1", "row", 72),
        ("rows of 72 bytes, open_table", "open_table", 72),
        ("rows of 72 bytes, put_rows of 100", "rows", 72),
    )
    for title, mode, size in cases:
        alone, taken = [], []
        for _ in range(repeats):
            alone.append(rate(measure(mode, size, seconds, []), "put_s"))
            taken.append(rate(measure(mode, size, seconds, ["wait"]), "hop_s"))
        print(f"{title:38}  {statistics.median(alone):12,.0f}  {statistics.median(taken):12,.0f}")


def print_hop(sizes: Sequence[int], repeats: int, seconds: float) -> None:
    """Print the hop to one and to two consumers, as ratios to a copy with one check."""
    print("\nRing hop of messages, every frame checked by every consumer; medians, MB/s and of the copy.")
    print("copy: the same messages copied into 16 MiB of memory and checked once, in one process.\n")
    print("    bytes      copy    1 to 1  of copy    1 to 2  of copy   records/s")
    for size in sizes:
        held: dict[str, list[float]] = {"copy": [], "one": [], "two": []}
        for _ in range(repeats):
            held["copy"].append(copy_rate(size, seconds))
            held["one"].append(rate(measure(HOP, size, seconds, ["wait"]), "hop_s"))
            held["two"].append(rate(measure(HOP, size, seconds, ["wait", "wait"]), "hop_s"))
        copy, one, two = (statistics.median(values) for values in held.values())
        print(
            f"{size:9}  {copy * size / 1e6:8.0f}  {one * size / 1e6:8.0f}  {one / copy:7.2f}  "
            f"{two * size / 1e6:8.0f}  {two / copy:7.2f}  {one:10,.0f}"
        )


def print_company(repeats: int, seconds: float, size: int = 16 << 10) -> None:
    """Print the rate of a first consumer beside a second one that is in trouble."""
    print(
        f"\nMessages of {size} bytes to one consumer, beside a second one that misses some: MB/s, of the rate"
    )
    print("alone, and what a gigabyte costs the job in seconds of processor.\n")
    alone = 0.0
    for policy, trouble in (("", ""), *((policy, trouble) for policy in FOLLOWING for trouble in TROUBLES)):
        policies = ["wait", policy] if policy else ["wait"]
        runs = [measure(HOP, size, seconds, policies, trouble=trouble) for _ in range(repeats)]
        found = statistics.median(rate(run, "hop_s") for run in runs)
        cpu_s = statistics.median(run["cpu_s"] / run["records"] / size * 1e9 for run in runs)
        alone = alone or found
        title = f"{trouble}, {policy}" if trouble else "alone"
        print(f"{title:24}  {found * size / 1e6:8.0f}  {found / alone:5.2f}  {cpu_s:6.3f}")


def rate(measured: dict[str, Any], what: str) -> float:
    """Return records per second."""
    return float(measured["records"] / measured[what])


def measure(
    mode: str, payload_bytes: int, seconds: float, policies: Sequence[str], *, trouble: str = ""
) -> dict[str, Any]:
    """Run one job and its consumers; return what the job says.

    Args:
        trouble: What happens to the last consumer: ``slow``, ``stopped`` or ``killed``.
    """
    with _runtime_dir() as runtime_dir:
        rings_dir = runtime_dir / "rings"
        rings_dir.mkdir()
        consumers = []
        try:
            for index, policy in enumerate(policies):
                is_last = index == len(policies) - 1
                pause_s = 0.02 if trouble == "slow" and is_last else 0.0
                consumers.append(start_consumer(rings_dir, f"consumer{index}", policy, pause_s))
            with _job(runtime_dir, mode, payload_bytes, seconds, len(policies)) as link:
                if trouble in ("stopped", "killed"):
                    _await_connected(rings_dir)
                    consumers[-1].send_signal(signal.SIGSTOP if trouble == "stopped" else signal.SIGKILL)
                return _answer(link)
        finally:
            for consumer in consumers:
                consumer.kill()
                consumer.wait()


def start_consumer(rings_dir: Path, name: str, policy: str, pause_s: float) -> subprocess.Popen[bytes]:
    """Start a consuming process, and wait until it has said what it wants."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.ring_hop",
            "--consume",
            str(rings_dir),
            name,
            policy,
            str(pause_s),
        ],
        env=worker_environment(),
    )
    _until((rings_dir / f"{name}.wants").exists)
    return process


def consume(rings_dir: Path, name: str, policy: str, pause_s: float) -> None:
    """Take and check everything, until killed."""
    poller = zmq.Poller()
    polled: list[Any] = []
    with Inlet(rings_dir, name, TOPICS, policy=policy, limit_bytes=4 << 20) as inlet:  # type: ignore[arg-type]
        scan_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= scan_s:
                inlet.scan()
                scan_s = now_s + 0.1
                if inlet.pollables() != polled:
                    polled = inlet.pollables()
                    poller = zmq.Poller()
                    for socket in polled:
                        poller.register(socket, zmq.POLLIN)
            poller.poll(100 if polled else 10)
            for run in inlet.receive():
                for _ in split(run.frames):
                    pass
                if pause_s:
                    time.sleep(pause_s)
                run.ring.release(run.end)


def copy_rate(payload_bytes: int, seconds: float) -> float:
    """Return how many messages per second one process copies and checks once."""
    with mmap.mmap(-1, RING_BYTES) as memory, memoryview(memory) as view:
        messages = list(fillers(payload_bytes))
        for at in range(0, RING_BYTES, mmap.PAGESIZE):
            view[at] = 1
        at = count = 0
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < seconds:
            for _ in range(max(1, (4 << 20) // payload_bytes)):
                message = messages[count % len(messages)]
                if at + payload_bytes > RING_BYTES:
                    at = 0
                view[at : at + payload_bytes] = message
                xxh3_64_intdigest(view[at : at + payload_bytes])
                at += payload_bytes
                count += 1
        return count / (time.monotonic() - begun_s)


@contextmanager
def _runtime_dir() -> Iterator[Path]:
    shared = Path("/dev/shm")  # noqa: S108  # a directory of its own within it
    path = Path(tempfile.mkdtemp(prefix="edq-bench-", dir=shared if shared.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _job(runtime_dir: Path, mode: str, payload_bytes: int, seconds: float, consumers: int) -> Iterator[Link]:
    config = {
        "daq_job_type": JOB,
        "mode": mode,
        "payload_bytes": payload_bytes,
        "seconds": seconds,
        "consumers": consumers,
        "ring": {"ring_bytes": RING_BYTES},
    }
    spec = WorkerSpec(
        unique_id="job",
        job_type="HopJob",
        target=JOB,
        config=config,
        node="bench",
        boot=boot_id(),
        runtime_dir=str(runtime_dir),
        verbosity="WARNING",
    )
    link, theirs = Link.pair()
    with link:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "edgedaq.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=worker_environment(),
            )
        try:
            link.send({"type": "spec", **msgspec.to_builtins(spec)})
            yield link
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()
            process.wait()


def _answer(link: Link) -> dict[str, Any]:
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        zmq.select([link.fileno()], [], [], 0.5)
        try:
            messages = link.receive()
        except LinkClosed:
            break
        for message in messages:
            if message.get("type") == "measured":
                return message
            if message.get("type") == "ended":
                sys.exit(f"the job has ended: {message.get('reason')}")
    sys.exit("the job said nothing")


def _await_connected(rings_dir: Path) -> None:
    """Wait until the job goes on: it puts once its consumers are there."""
    _until(lambda: any(rings_dir.glob("*.sock")))
    time.sleep(0.3)  # of a measurement of a second; exactness is a matter of the tests, not of this


def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end_s:
            sys.exit("waited in vain")
        time.sleep(0.005)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
