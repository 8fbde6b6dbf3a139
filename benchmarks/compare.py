"""EdgeDAQ beside what a user would otherwise pick, on this machine, in one run, the same messages.

====================== =============================================================================
EdgeDAQ                put → journal and stored file, both fdatasynced; every byte checked
Redis stream, durable  XADD in pipelines of 100 to a private server with an append-only file, fsync always
ZMQ PUSH/PULL          between processes over TCP; nothing is durable, what is in flight dies with them
arroyopy               its ZMQ listener calling an operator that counts; durable and safe as little as that
====================== =============================================================================

Run by ``make bench-compare``, which installs arroyopy into an environment of its own; what is not there is
left out of the table, with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
import zmq

from benchmarks.end_to_end import MB, Case, run_end_to_end
from tests.system.harness import environment, free_port

CASES = (
    Case("72 B", 72, 200_000, "", 1.0),
    Case("1 kB", 1_000, 100_000, "", 1.0),
    Case("16 kB", 16_000, 10_000, "", 1.0),
    Case("160 kB", 160_000, 2_000, "", 1.0),
)
_PIPELINE = 100
_RECEIVER = """
import sys, time, zmq
count, port = int(sys.argv[1]), int(sys.argv[2])
socket = zmq.Context().socket(zmq.PULL)
socket.bind(f"tcp://127.0.0.1:{port}")
for _ in range(count):
    socket.recv()
print(time.monotonic_ns())
"""
_ARROYO = """
import asyncio, sys, time, zmq, zmq.asyncio
from arroyopy.operator import Operator
from arroyopy.zmq import ZMQListener
count, port = int(sys.argv[1]), int(sys.argv[2])

class Counter(Operator):
    left = count

    async def process(self, message):
        self.left -= 1
        if not self.left:
            listener.stop_requested = True
            print(time.monotonic_ns())

socket = zmq.asyncio.Context().socket(zmq.PULL)
socket.bind(f"tcp://127.0.0.1:{port}")

async def run():
    global listener
    listener = ZMQListener(Counter(), socket)
    await listener.start()

asyncio.run(run())
"""


def main() -> int:
    """Measure everything that is there, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    parser.add_argument("--arroyo-python", default="", help="an interpreter that has arroyopy and pyzmq")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ways: dict[str, Callable[[Case], float]] = {
        "EdgeDAQ, durable, stored": lambda case: run_end_to_end(case, folder),
        "ZMQ PUSH/PULL, not durable": lambda case: run_pushed(case, sys.executable, _RECEIVER),
    }
    if shutil.which("redis-server"):
        ways["Redis stream, durable"] = lambda case: run_redis(case, folder)
    else:
        print("redis-server is not installed: left out")
    if arguments.arroyo_python:
        ways["arroyopy, not durable"] = lambda case: run_pushed(case, arguments.arroyo_python, _ARROYO)
    print(f"messages per second (MB/s), median of {arguments.repeats}")
    for case in CASES:
        for name, way in ways.items():
            rates = [case.count / way(case) for _ in range(arguments.repeats)]
            rate = statistics.median(rates)
            print(
                f"{case.name:>7}  {name:<28} {rate:>10,.0f}/s  ({rate * case.payload_bytes / MB:,.0f} MB/s)"
            )
    return 0


def run_pushed(case: Case, python: str, receiver: str) -> float:
    """Return the seconds from the first send until a process that pulls has the last message."""
    port = free_port()
    taker = subprocess.Popen(
        [python, "-c", receiver, str(case.count), str(port)], stdout=subprocess.PIPE, env=_plain()
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    try:
        socket.connect(f"tcp://127.0.0.1:{port}")
        message = os.urandom(case.payload_bytes)
        socket.send(message)  # waits until the other one is there
        begun_ns = time.monotonic_ns()
        for _ in range(case.count - 1):
            socket.send(message)
        out, _ = taker.communicate(timeout=120)
    finally:
        taker.kill()
        taker.wait()
        socket.close(linger=0)
        context.term()
    return (int(out) - begun_ns) / 1e9


def run_redis(case: Case, folder: Path) -> float:
    """Return the seconds until a Redis server with fsync at each write has acknowledged all messages."""
    root = Path(tempfile.mkdtemp(prefix="redis-", dir=folder))
    server = subprocess.Popen(
        [
            *("redis-server", "--port", "0", "--unixsocket", str(root / "s"), "--dir", str(root)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis(unix_socket_path=str(root / "s"))
        end_s = time.monotonic() + 10
        while True:
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                break
            if time.monotonic() > end_s:
                sys.exit("redis-server does not answer")
            time.sleep(0.05)
        message = os.urandom(case.payload_bytes)
        begun_s = time.monotonic()
        for first in range(0, case.count, _PIPELINE):
            pipeline = client.pipeline(transaction=False)
            for _ in range(min(_PIPELINE, case.count - first)):
                pipeline.xadd("stream", {"m": message})
            pipeline.execute()
        taken_s = time.monotonic() - begun_s
        if client.xlen("stream") != case.count:
            sys.exit("Redis does not have all messages")
        return taken_s
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(root, ignore_errors=True)


def _plain() -> dict[str, str]:
    return {key: value for key, value in environment().items() if key != "PYTHONPATH"}


if __name__ == "__main__":
    sys.exit(main())
