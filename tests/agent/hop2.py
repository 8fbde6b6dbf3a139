"""Uplink, intake and producing jobs as the real worker processes, without supervisors around them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from edgedaq.delivery import gap_of
from edgedaq.frame import Kind
from edgedaq.lane_options import lane_claim
from edgedaq.link import Link, LinkClosed
from edgedaq.segment_format import Record
from edgedaq.segment_reader import SegmentReader
from edgedaq.worker_process import worker_environment

_FOR_EVER = 1 << 63

PUTTER = """
import struct, sys
from edgedaq import DAQJob, DAQJobConfig

class Config(DAQJobConfig, kw_only=True):
    count: int
    size: int = 1000
    rate_hz: float = 0.0
    store: str = "X"
    topic: str = ""

class Putter(DAQJob):
    config_type = Config

    def start(self):
        topics = (self.config.topic or "store." + self.config.store,)
        for number in range(self.config.count):
            self.put_raw(struct.pack("<Q", number).ljust(self.config.size, b"."), topics=topics)
            if self.config.rate_hz:
                self.sleep(1 / self.config.rate_hz)
"""


class Worker:
    """One worker process, and what it last reported."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        self._spec = spec
        self._log = log
        self.snapshot: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.ended: dict[str, Any] | None = None
        link, theirs = Link.pair()
        with theirs, log.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgedaq.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stderr=err,
                env={**worker_environment(), "PYTHONWARNINGS": ""},
            )
        self.link = link
        self.link.send({"type": "spec", **spec})

    @property
    def extra(self) -> dict[str, Any]:
        self.listen()
        extra: dict[str, Any] = self.snapshot.get("extra", {})
        return extra

    def listen(self) -> None:
        try:
            for message in self.link.receive():
                if message.get("type") in {"report", "ended"}:
                    self.snapshot = message["snapshot"] or {}
                    if message["type"] == "ended":
                        self.ended = message
                else:
                    self.messages.append(message)
        except LinkClosed:
            return

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.link.close()

    def stop(self, limit_s: float = 10.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait(limit_s)

    def wait(self, limit_s: float = 20.0) -> int:
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.listen()
            time.sleep(0.01)
        self.listen()
        code = self.process.wait(0.1)
        self.link.close()
        return code


class Hop2:
    """Directories of one node and one aggregator, and the processes started in them. A context manager."""

    def __init__(self, runtime_dir: Path, tmp_path: Path) -> None:
        self.node_runtime, self.hub_runtime = runtime_dir / "n", runtime_dir / "a"
        self.node_state, self.hub_state = tmp_path / "node", tmp_path / "hub"
        for path in (self.node_runtime / "rings", self.hub_runtime, self.node_state, self.hub_state):
            path.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.putter = tmp_path / "putter.py"
        self.putter.write_text(PUTTER, encoding="utf-8")
        self.log = tmp_path / "log.txt"
        self.port = free_port()
        self.workers: list[Worker] = []
        self.lanes: list[tuple[str, list[str], dict[str, Any], dict[str, Any]]] = []
        """Beside ``data``: name, topics, options, and what else its ``LaneSpec`` has."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
            worker.link.close()
        if self.log.exists():
            print(self.log.read_text()[-20000:])

    def intake(self, **config: Any) -> Worker:
        journal = {"segment": 4 << 20, "limit": 1 << 30, "reserve": 0, "stores": ["waited_for"]}
        config = {"listen": f"tcp://127.0.0.1:{self.port}", **journal, **config}
        worker = self._start(
            "intake", "edgedaq_aggregator.intake:Intake", config, "hub", self.hub_runtime, self.hub_state
        )
        wait_for(lambda: worker.process.poll() is not None or _listens(worker.process.pid), 30)
        return worker

    def uplink(
        self,
        *,
        port: int = 0,
        node: str = "n1",
        limit: int = 1 << 30,
        enrolment: str = "",
        lives_after: float = 30.0,
        **data: Any,
    ) -> Worker:
        """Start an uplink with the lanes of this hop; ``data`` are options of its first one."""
        lanes = [
            {"name": name, "topics": topics, "options": options, "limit": limit, "reserve": 0, **more}
            for name, topics, options, more in [("data", ["store"], data, {}), *self.lanes]
        ]
        address = "" if enrolment and not port else f"tcp://127.0.0.1:{port or self.port}"
        config = {"aggregator": address, "enrolment": enrolment, "lanes": lanes, "lives_after": lives_after}
        return self._start(
            "uplink", "edgedaq_agent.uplink:Uplink", config, node, self.node_runtime, self.node_state
        )

    def job(self, unique_id: str = "putter", *, node: str = "n1", **config: Any) -> Worker:
        ring = {"ring_bytes": 2 << 20}
        return self._start(
            unique_id, f"{self.putter}:Putter", config, node, self.node_runtime, self.node_state, ring=ring
        )

    def _start(
        self,
        unique_id: str,
        target: str,
        config: dict[str, Any],
        node: str,
        runtime_dir: Path,
        state_dir: Path,
        **more: Any,
    ) -> Worker:
        job_type = target.rpartition(":")[2]
        spec = {
            "unique_id": unique_id,
            "job_type": job_type,
            "target": target,
            "config": {"daq_job_type": job_type, **config},
            "config_file": f"{unique_id}.toml",
            "node": node,
            "boot": "boot",
            "runtime_dir": str(runtime_dir),
            "state_dir": str(state_dir),
            "claims": self._claims() if runtime_dir == self.node_runtime else {},
            "verbosity": "DEBUG",
            **more,
        }
        worker = Worker(spec, self.log)
        self.workers.append(worker)
        return worker

    def _claims(self) -> dict[str, list[str]]:
        return {"uplink": ["store"], **{lane_claim(name): topics for name, topics, _, _ in self.lanes}}

    def numbers(self) -> dict[int, list[int]]:
        """Return what the journal holds: per stream, in order, the numbers of the putter's messages.

        A hole or a repetition of seq fails; a GAP is entered as ``-rows``.
        """
        held: dict[int, list[int]] = {}
        next_seq: dict[int, int] = {}
        for record in self.records():
            frame = record.frame
            expected = next_seq.get(frame.stream, 0)
            assert frame.seq == expected, f"{frame.stream:016x}: seq {frame.seq}, expected {expected}"
            next_seq[frame.stream] = frame.seq + 1
            numbers = held.setdefault(frame.stream, [])
            if frame.kind is Kind.RAW:
                begin = 4 * frame.rows
                size = (len(frame.body) - begin) // frame.rows
                numbers += [
                    int.from_bytes(frame.body[begin + at * size : begin + at * size + 8], "little")
                    for at in range(frame.rows)
                ]
            elif frame.kind is Kind.GAP:
                last, rows, _ = gap_of(frame)
                next_seq[frame.stream] = last + 1
                numbers.append(-(rows or 0))
        return held

    def records(self) -> list[Record]:
        with SegmentReader(self.hub_state / "journal", 0) as reader:
            found: list[Record] = []
            while entries := reader.read(_FOR_EVER):
                for entry in entries:
                    if isinstance(entry, Record):
                        found.append(entry)
                    elif entry.last != _FOR_EVER:  # position 0 is before the begin of any journal
                        assert entry.first == 0, entry
                        assert entry.table is not None, entry
                        assert not entry.table.streams, entry
            return found

    def logged(self, event: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if event in line]


def _listens(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        held = psutil.Process(pid).net_connections(kind="tcp")
        return any(one.status == psutil.CONN_LISTEN for one in held)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: Callable[[], Any], limit_s: float = 15.0) -> Any:
    """Return the first true value of ``what``; fails after the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(LookupError):
            value = what()
            if value:
                return value
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def rings_of(hop: Hop2) -> list[str]:
    return [path.name for path in (hop.node_runtime / "rings").glob("*.ring")]
