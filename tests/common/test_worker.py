from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from edgedaq.clock import boot_id
from edgedaq.frame import Kind
from edgedaq.inlet import Inlet
from edgedaq.link import Link, LinkClosed
from edgedaq.schema import decode_open, unpack_rows
from edgedaq.stats import snapshot_from_map

from tests.common.producing import ROOT, Taken, pump

LIMIT_S = 15.0
HEAD = """
import os, socket, threading, time
from edgedaq import *
from edgedaq.errors import *
PAIR = socket.socketpair()
STORE = DAQJobStoreConfig(csv=DAQJobStoreConfigCSV(file_path="a.csv"))

class Config(DAQJobConfig):
    value: int = 1

class Job(DAQJob):
    config_type = Config
"""


class Worker:
    """A worker process with the test as its supervisor."""

    def __init__(self, directory: Path, runtime_dir: Path, code: str, **spec: Any) -> None:
        file = directory / "job.py"
        file.write_text(HEAD + textwrap.indent(textwrap.dedent(code), "    "), encoding="utf-8")
        (runtime_dir / "rings").mkdir(exist_ok=True)
        self.runtime_dir = runtime_dir
        self.rings_dir = runtime_dir / "rings"
        self.link, theirs = Link.pair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edgedaq.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / "common")},
                process_group=0,
            )
        self.messages: list[dict[str, Any]] = []
        self.errors = ""
        self.link.send(
            {
                "type": "spec",
                "unique_id": "job1",
                "job_type": "Job",
                "target": f"{file}:Job",
                "config": {"daq_job_type": "Job"},
                "config_file": str(directory / "job1.toml"),
                "node": "node1",
                "boot": boot_id(),
                "runtime_dir": str(runtime_dir),
                "claims": {"uplink": ["store"]},
                **spec,
            }
        )

    def until(self, kind: str, condition: Callable[[dict[str, Any]], object] = bool) -> dict[str, Any]:
        """Return the first new message of that type for which a condition holds."""
        end = time.monotonic() + LIMIT_S
        at = len(self.messages)
        while time.monotonic() < end:
            try:
                self.messages += self.link.receive()
            except LinkClosed:
                break
            for message in self.messages[at:]:
                if message["type"] == kind and condition(message):
                    return message
            at = len(self.messages)
            time.sleep(0.01)
        raise AssertionError(f"no {kind}: {self.messages}, {self.end()}")

    def end(self) -> int:
        """Return the exit status; all that it said is in ``messages``, its log in ``errors``."""
        try:
            _, self.errors = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        try:
            while True:
                self.messages += self.link.receive()
                time.sleep(0.01)
        except LinkClosed:
            return self.process.returncode

    def all_of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]


@contextmanager
def worker(directory: Path, runtime_dir: Path, code: str, **spec: Any) -> Iterator[Worker]:
    started = Worker(directory, runtime_dir, code, **spec)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        if started.process.stderr and not started.process.stderr.closed:
            started.process.communicate()
        started.link.close()


def drained(rings_dir: Path) -> Taken:
    taken = Taken()
    with Inlet(rings_dir, "uplink", ["store"], retire=True) as inlet:
        pump(inlet, taken, lambda: not inlet.rings)
    return taken


def rows_of(taken: Taken) -> list[tuple[Any, ...]]:
    schemas = {frame.stream: decode_open(frame).schema for frame in taken.frames if frame.kind is Kind.OPEN}
    rows: list[tuple[Any, ...]] = []
    for frame in taken.frames:
        schema = schemas[frame.stream]
        if frame.kind is Kind.PACKED and schema:
            rows += unpack_rows(schema, frame.body)
    return rows


def test_a_job_that_finishes_reports_and_ends_with_0(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        for n in range(1000):
            self.put_rows([[n, n * 0.5]], ["n", "x"], store_config=STORE)
    """
    with worker(tmp_path, runtime_dir, code) as w:
        assert w.end() == 0
        (started,) = w.all_of("started")
        (ended,) = w.all_of("ended")
        assert started["pid"] == w.process.pid
        snapshot = snapshot_from_map(ended["snapshot"])
        assert (snapshot.life, snapshot.out_count, snapshot.job) == (started["life"], 1000, "job1")
        assert list(snapshot.streams.values()) == [1000]
        assert ended["reason"] == "finished"
    assert rows_of(drained(runtime_dir / "rings")) == [(n, n * 0.5) for n in range(1000)]


@pytest.mark.parametrize(
    "wait",
    [
        "self.sleep(1000)",
        "time.sleep(1000)",
        "PAIR[0].recv(1)",
        "threading.Event().wait()",
        "pass",
        "self.put_rows([[1]], ['n'], store_config=STORE)",
    ],
)
def test_a_stop_ends_a_job_wherever_it_is_and_lets_it_clean_up(
    tmp_path: Path, runtime_dir: Path, wait: str
) -> None:
    code = f"""
    def start(self):
        self.put_rows([[1]], ["n"], store_config=STORE)
        try:
            while True:
                {wait}
        finally:
            time.sleep(0.2)
            self.sleep(0.01)
            self.put_raw(b"the last", store_config=STORE, timeout_s=0.5)
    """
    ring = {"ring_bytes": 256 << 10} if "1000" in wait else {"ring_bytes": 64 << 20}
    with worker(tmp_path, runtime_dir, code, ring=ring) as w:
        w.until("started")
        w.until("report", lambda report: report["snapshot"]["out_count"])
        begun = time.monotonic()
        w.link.send({"type": "stop"})
        assert w.end() == 0
        assert time.monotonic() - begun < 5
        (ended,) = w.all_of("ended")
        assert ended["reason"] == "stopped"
    taken = drained(runtime_dir / "rings")
    assert [bytes(frame.body[4:]) for frame in taken.frames if frame.kind is Kind.RAW] == [b"the last"]
    assert taken.rows() == snapshot_from_map(ended["snapshot"]).out_count


def test_sigterm_stops_a_job_that_is_blocked_because_its_ring_is_full(
    tmp_path: Path, runtime_dir: Path
) -> None:
    code = """
    def start(self):
        n = 0
        while True:
            self.put_raw(n.to_bytes(1000, "little"), store_config=STORE)
            n += 1
    """
    with worker(tmp_path, runtime_dir, code, ring={"ring_bytes": 256 << 10}) as w:
        w.until("report", lambda report: report["snapshot"]["is_blocked"])
        os.kill(w.process.pid, signal.SIGINT)  # it is the supervisor's business
        w.until("report", lambda report: report["snapshot"]["is_blocked"])
        os.kill(w.process.pid, signal.SIGTERM)
        assert w.end() == 0
        (ended,) = w.all_of("ended")
        snapshot = snapshot_from_map(ended["snapshot"])
        assert snapshot.put_blocked_s > 0.2
    taken = drained(runtime_dir / "rings")
    assert taken.rows() == snapshot.out_count


def test_when_the_supervisor_is_gone_the_job_ends_in_order(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        self.put_rows([[1]], ["n"], store_config=STORE)
        try:
            self.sleep(1000)
        finally:
            self.put_rows([[2]], ["n"], store_config=STORE)
    """
    with worker(tmp_path, runtime_dir, code) as w:
        w.until("started")
        w.until("report", lambda report: report["snapshot"]["out_count"])
        w.link.close()
        _, errors = w.process.communicate(timeout=LIMIT_S)
        assert w.process.returncode == 0, errors
    assert rows_of(drained(runtime_dir / "rings")) == [(1,), (2,)]


def test_an_exception_is_logged_and_told_in_one_line_with_status_1(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        self.put_rows([[1]], ["n"], store_config=STORE)
        raise DeviceError("hv: no answer from /dev/ttyUSB0\\nafter 3 tries")
    """
    with worker(tmp_path, runtime_dir, code) as w:
        assert w.end() == 1
        (ended,) = w.all_of("ended")
        assert ended["reason"] == "hv: no answer from /dev/ttyUSB0 after 3 tries"
        assert ended["snapshot"]["out_count"] == 1
        assert "Traceback" in w.errors
        assert "job.py" in w.errors
    assert rows_of(drained(runtime_dir / "rings")) == [(1,)]


def test_a_wrong_configuration_ends_with_78(tmp_path: Path, runtime_dir: Path) -> None:
    with worker(tmp_path, runtime_dir, "", config={"daq_job_type": "Job", "vaule": 3}) as w:
        assert w.end() == 78
        (ended,) = w.all_of("ended")
        assert "value" in ended["reason"]
    with worker(tmp_path, runtime_dir, "", target=f"{tmp_path / 'job.py'}:Jobs") as w:
        assert w.end() == 78


def test_a_job_without_anything_to_do_says_so(tmp_path: Path, runtime_dir: Path) -> None:
    with worker(tmp_path, runtime_dir, "pass") as w:
        assert w.end() == 1
        assert "needs start()" in w.all_of("ended")[0]["reason"]


def test_a_thread_that_does_not_end_does_not_keep_the_process(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        threading.Thread(target=time.sleep, args=(1000,)).start()
        threading.Thread(target=self.fill).start()
        self.sleep(1000)

    def fill(self):
        while True:
            self.put_raw(bytes(1000), store_config=STORE)
    """
    with worker(tmp_path, runtime_dir, code, ring={"ring_bytes": 256 << 10}) as w:
        w.until("report", lambda report: report["snapshot"]["is_blocked"])
        w.link.send({"type": "stop"})
        assert w.end() == 0


def test_a_later_process_of_a_job_ends_an_earlier_one_that_hangs(tmp_path: Path, runtime_dir: Path) -> None:
    with worker(tmp_path, runtime_dir, "def start(self): self.sleep(1000)") as first:
        first.until("started")
        with worker(tmp_path, runtime_dir, "def start(self): pass") as second:
            assert second.end() == 0
        assert first.process.wait(LIMIT_S) == -signal.SIGKILL


def test_a_job_without_puts_makes_no_ring_and_needs_no_sockets(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        import sys
        assert not {"zmq", "numpy", "pyarrow"} & set(sys.modules), sorted(sys.modules)
        assert not os.listdir(self.rings_dir)
    """
    with worker(tmp_path, runtime_dir, code) as w:
        assert w.end() == 0, w.errors


def test_messages_of_the_supervisor_reach_the_job_and_the_other_way_round(
    tmp_path: Path, runtime_dir: Path
) -> None:
    code = """
    stops_itself = True

    def on_link_message(self, message):
        if message["type"] == "boom":
            raise ValueError("boom")
        self.send_to_supervisor({"type": "echo", "of": message["x"]})

    def report(self):
        return {"temperature": 21.5}

    def start(self):
        import select
        select.select([self.stop_fd], [], [])
        assert self.is_stopping
        self.sleep(100)
    """
    with worker(tmp_path, runtime_dir, code) as w:
        w.until("started")
        w.link.send({"type": "boom"})
        w.link.send({"type": "question", "x": 42})
        assert w.until("echo")["of"] == 42
        assert w.until("report")["snapshot"]["extra"] == {"temperature": 21.5}
        w.link.send({"type": "stop"})
        assert w.end() == 0


def test_who_is_no_supervisor_is_refused(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Link(ours) as link, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgedaq.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "PYTHONPATH": str(ROOT / "common")},
        )
        link.send({"type": "spec", "unique_id": 5})
        assert process.wait(LIMIT_S) == 1
