"""A producing process under a test's command: real memory, real sockets, real death.

Run as a program it makes an outlet and obeys commands, one JSON map per line; ``Producer`` is its other side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import zmq
from edgedaq.clock import mono_ns
from edgedaq.errors import JobError
from edgedaq.frame import Frame, split
from edgedaq.inlet import Inlet, Run
from edgedaq.logsetup import configure
from edgedaq.outlet import Outlet
from edgedaq.ring import Identity
from edgedaq.schema import Column, Schema

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Schema((Column("n", "i8"), Column("square", "f8"), Column("small", "u2")))
LIMIT_S = 10.0


def row_of(n: int) -> tuple[int, float, int]:
    return n, float(n * n), n % 65536


def message_of(n: int, size: int) -> bytes:
    block = n.to_bytes(8, "little") + bytes((n + i) % 251 for i in range(97))
    return (block * (size // len(block) + 1))[:size]


class Producer:
    """One producing process."""

    def __init__(
        self, rings_dir: Path, *, claims: dict[str, list[str]] | None = None, **options: Any
    ) -> None:
        setup = {
            "rings_dir": str(rings_dir),
            "claims": {"up": ["store"]} if claims is None else claims,
            "options": options,
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'common'}{os.pathsep}{ROOT}"},
        )
        self.life: str = self._answer()["life"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, op: str, **arguments: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        self.tell(op, **arguments)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def last_answers(self) -> list[dict[str, Any]]:
        """Return what it had still said before it died."""
        assert self.process.stdout
        lines = self.process.stdout.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue


class Taken:
    """What a consumer has taken: copies of whole frames, in order."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.runs: list[tuple[str, int]] = []

    def take(self, runs: Iterable[Run], *, release: bool = True) -> None:
        for run in runs:
            self.frames += split(memoryview(bytes(run.frames)))
            self.runs.append((run.ring.life, run.end))
            if release:
                run.ring.release(run.end)

    def rows(self) -> int:
        return sum(frame.rows for frame in self.frames)


def pump(
    inlet: Inlet, taken: Taken, until: Callable[[], object], *, release: bool = True, limit_s: float = LIMIT_S
) -> None:
    """Let an inlet take until a condition holds."""
    end = time.monotonic() + limit_s
    while True:
        inlet.scan()
        taken.take(inlet.receive(), release=release)
        if until():
            return
        assert time.monotonic() < end, f"took {len(taken.frames)} frames, {taken.rows()} rows, then nothing"
        poller = zmq.Poller()
        for socket in inlet.pollables():
            poller.register(socket, zmq.POLLIN)
        poller.poll(10)


def _main(setup: dict[str, Any]) -> None:
    configure("ERROR")
    identity = Identity("node", "job", "Type", os.urandom(8).hex(), "boot", setup["claims"])
    outlet = Outlet(Path(setup["rings_dir"]), identity, **setup["options"])
    ended = threading.Event()
    service = threading.Thread(target=_serve, args=(outlet, ended))
    service.start()
    _say(life=identity.life)
    where: dict[str, Any] = {"topics": ["store.X"], "store_config": {"raw": {"file_path": "x.bin"}}}
    for line in sys.stdin:
        command = json.loads(line)
        op = command.pop("op")
        if op == "close":
            break
        try:
            _say(**_obey(outlet, op, command, where))
        except JobError as e:
            _say(error=type(e).__name__, text=str(e), accepted=getattr(e, "accepted", None))
    ended.set()
    service.join()
    outlet.close()
    _say(closed=True)


def _serve(outlet: Outlet, ended: threading.Event) -> None:
    while not ended.is_set():
        due = outlet.service()
        poller = zmq.Poller()
        for pollable in outlet.pollables():
            poller.register(pollable, zmq.POLLIN)
        poller.poll(20 if due is None else max(0, min(20, (due - mono_ns()) // 1_000_000)))


def _obey(outlet: Outlet, op: str, command: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    if "topics" in command:
        where = {**where, "topics": command["topics"]}
    if "tag" in command:
        where = {**where, "tag": command["tag"]}
    match op:
        case "rows":
            first, count = command["first"], command["count"]
            writer = outlet.table(SCHEMA, **where)
            writer.put_rows([row_of(n) for n in range(first, first + count)], command.get("timeout_s"))
        case "values":
            outlet.table(SCHEMA, **where).put_rows(command["rows"])
        case "raw":
            for n, size in command["messages"]:
                outlet.raw(**where).put_within(message_of(n, size), command.get("timeout_s"))
        case "event":
            outlet.event(**where).put(command["metadata"], command["data"].encode())
        case "loss":
            outlet.report_loss(outlet.table(SCHEMA, **where), command["count"], command["reason"])
        case "arrow":
            import pyarrow as pa

            for first in command["firsts"]:
                numbers = pa.array(range(first, first + command["count"]))
                batch = pa.RecordBatch.from_arrays(
                    [numbers, pa.array([f"t{first}"] * len(numbers))], names=["n", "t"]
                )
                outlet.arrow(bytes(batch.schema.serialize()), **where).put_batch(batch)
        case "stuck":
            _stuck(outlet, command, where)
        case "endless":
            _endless(outlet, command, where)
        case "side":
            _side(outlet, command, where)
    return {
        "out_count": outlet.out_count,
        "dropped_count": outlet.dropped_count,
        "queued_count": outlet.queued_count,
        "blocked_by": outlet.blocked_by,
        "consumers": {facts["consumer"]: facts for facts in outlet.consumers()},
        "put_blocked_s": outlet.put_blocked_s,
        "is_blocked": outlet.is_blocked,
        "streams": outlet.stream_rows(),
    }


def _stuck(outlet: Outlet, command: dict[str, Any], where: dict[str, Any]) -> None:
    """Say from another thread by whom a put is held, while it is; it ends once that is over."""

    def say() -> None:
        while not outlet.is_blocked:
            time.sleep(0.001)
        _say(blocked_by=outlet.blocked_by)

    thread = threading.Thread(target=say)
    thread.start()
    writer = outlet.table(SCHEMA, **where)
    n = command["first"]
    while thread.is_alive():
        writer.put(row_of(n))
        n += 1
    thread.join()


def _endless(outlet: Outlet, command: dict[str, Any], where: dict[str, Any]) -> None:
    """Put for ever, and say after each put that it has returned; the pipe is the witness."""
    rows, raw = outlet.table(SCHEMA, **where), outlet.raw(**where)
    n = 0
    while True:
        if command["kind"] == "rows":
            rows.put(row_of(n))
        elif command["kind"] == "columns":
            rows.put((n, None if n % 3 else float(n * n), n % 65536))
        else:
            raw.put(message_of(n, 8 + (n * 7919) % command["largest"]))
        n += 1
        os.write(1, b'{"n": %d}\n' % n)


def _side(outlet: Outlet, command: dict[str, Any], where: dict[str, Any]) -> None:
    def put(start: int) -> None:
        for n in range(start, start + command["count"]):
            with outlet.side():
                outlet.table(SCHEMA, **where).put(row_of(n))

    threads = [threading.Thread(target=put, args=(k * command["count"],)) for k in range(3)]
    for thread in threads:
        thread.start()
    main = outlet.table(SCHEMA, **where)
    for n in range(command["count"]):
        main.put(row_of(10**6 + n))
    for thread in threads:
        thread.join()


def _say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
