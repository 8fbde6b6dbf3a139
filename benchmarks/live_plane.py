"""What the live plane costs a job that puts: rate of puts with nobody, somebody and somebody stuck listening.

A job's outlet and its service thread put rows of 72 bytes singly, as fast as they go, into a ring that
nobody else reads; broker and listeners are processes of their own. Each round measures all cases one after
the other, and the table gives the median of the ratios to the first case of the same round.

    python -m benchmarks.live_plane --rounds 5
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
from edgedaq.clock import mono_ns
from edgedaq.outlet import Outlet
from edgedaq.ring import Identity
from edgedaq.schema import Column, Schema

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = Schema(tuple(Column(f"c{index}", "f8") for index in range(9)))
ROW = tuple(float(index) for index in range(9))
BURST_ROWS = 1000
_BROKER = "import sys, time; from pathlib import Path; from edgedaq.broker import Broker\n\
with Broker(Path(sys.argv[1])): print('ready', flush=True); time.sleep(3600)"
_LISTENER = "import sys, zmq; from pathlib import Path; from edgedaq.live_feed import LiveFeed\n\
feed = LiveFeed(Path(sys.argv[1]), ['']); print('ready', flush=True)\n\
while True: feed.pollables()[0].poll(); feed.receive()"


@contextmanager
def child(code: str, directory: Path) -> Iterator[int]:
    """Run a process until it says that it is ready, and end it afterwards."""
    process = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None  # noqa: S101
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def serve(outlet: Outlet, ended: threading.Event) -> None:
    """Be the service thread of an outlet."""
    while not ended.is_set():
        due = outlet.service()
        poller = zmq.Poller()
        for pollable in outlet.pollables():
            poller.register(pollable, zmq.POLLIN)
        poller.poll(100 if due is None else max(0, min(100, (due - mono_ns()) // 1_000_000)))


def rates_of(directory: Path, case: str, seconds: float) -> tuple[float, float]:
    """Return how many rows are put in one case per second, and per second of the process's CPU time."""
    identity = Identity("node", "job", "Type", os.urandom(8).hex(), "boot", {})
    with ExitStack() as stack:
        if case != "no live plane":
            stack.enter_context(child(_BROKER, directory))
        listener = 0
        if "listener" in case and "no listener" not in case:
            listener = stack.enter_context(child(_LISTENER, directory))
        live_dir = None if case == "no live plane" else directory
        outlet = stack.enter_context(Outlet(directory / "rings", identity, live_dir=live_dir))
        ended = threading.Event()
        service = threading.Thread(target=serve, args=(outlet, ended))
        service.start()
        put = outlet.table(SCHEMA, topics=["store.X"]).put
        put(ROW)
        time.sleep(0.5)  # connections and subscriptions
        if case == "a stuck listener":
            os.kill(listener, signal.SIGSTOP)
        count, begun_s, cpu_s = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begun_s < seconds:
            for _ in range(BURST_ROWS):
                put(ROW)
            count += BURST_ROWS
        rates = count / (time.perf_counter() - begun_s), count / (time.process_time() - cpu_s)
        ended.set()
        service.join()
        return rates


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (%(default)s)")
    options = parser.parse_args()
    cases = ("no live plane", "no listener", "a listener", "a stuck listener")
    rates: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            with tempfile.TemporaryDirectory(prefix="edq-live-", dir="/dev/shm") as name:
                rates[case].append(rates_of(Path(name), case, options.seconds))
    print(f"{'case':20} {'rows/s':>12} {'ratio':>7} {'rows/CPU s':>12} {'ratio':>7}")
    for case in cases:
        text = f"{case:20}"
        for which in (0, 1):
            found = [rate[which] for rate in rates[case]]
            ratio = statistics.median(
                rate / first[which] for rate, first in zip(found, rates[cases[0]], strict=True)
            )
            text += f" {statistics.median(found):12,.0f} {ratio:7.3f}"
        print(text)


if __name__ == "__main__":
    main()
