"""A supervisor with jobs that put, and a listener in a process of its own, for tests of the live plane."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq
from edgedaq.live_feed import LiveFeed
from edgedaq.messages import DAQJobMessage, MessageReader

from tests.system.harness import ROOT, Side, environment

LIMIT_S = 15.0
JOBS = """
import os, time
from edgedaq import *
from edgedaq.config import DAQJobConfig

class Config(DAQJobConfig):
    topic: str = "store.X"
    rate_hz: float = 200.0
    rows: int = 1
    witness: str = ""
    message_bytes: int = 0

class Counts(DAQJob):
    config_type = Config
    config: Config
    def start(self):
        n, begun = 0, time.monotonic()
        config = self.config
        while True:
            if config.message_bytes:
                block = n.to_bytes(8, "little") * (config.message_bytes // 8)
                self.put_raw(block, topics=[config.topic])
                n += 1
            else:
                rows = [[k, k * 0.5] for k in range(n, n + config.rows)]
                self.put_rows(rows, ["n", "half"], topics=[config.topic])
                n += config.rows
            if config.witness:
                with open(config.witness, "w") as file:
                    file.write(str(n))
            ahead = n / config.rate_hz - (time.monotonic() - begun)
            if ahead > 0:
                self.sleep(ahead)

class Watches(DAQJob):
    config_type = Config
    config: Config
    live_topics = ("store",)
    def handle_message(self, message):
        with open(self.config.witness, "a") as file:
            for row in message.data:
                file.write(f"{message.source.job} {row[0]} {message.is_live}\\n")
"""


class LiveSite:
    """A supervisor of job files in one directory."""

    def __init__(self, root: Path, runtime_dir: Path) -> None:
        self.root = root
        self.runtime_dir = runtime_dir / "r"
        self.config_dir = root / "config"
        self.config_dir.mkdir(exist_ok=True)
        (self.config_dir / "jobs.py").write_text(JOBS)
        arguments = ["tests.common.supervised", str(self.config_dir), str(self.runtime_dir)]
        self.side = Side(arguments, self.runtime_dir, root / "log.txt")

    def add(self, name: str, kind: str = "Counts", **options: Any) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
        text = "\n".join([f'daq_job_type = "jobs.py:{kind}"', 'restart_backoff = "50 ms"', *lines])
        (self.config_dir / f"{name}.toml").write_text(text + "\n")

    def witness(self, name: str) -> Path:
        return self.root / f"witness-{name}"

    def count(self, name: str) -> int:
        try:
            return int(self.witness(name).read_text() or 0)
        except FileNotFoundError:
            return 0


@contextmanager
def live_site(root: Path, runtime_dir: Path) -> Iterator[LiveSite]:
    site = LiveSite(root, runtime_dir)
    try:
        yield site
    finally:
        if site.side.is_running:
            site.side.process.send_signal(signal.SIGCONT)
            site.side.stop()
        site.side.close()


class Looker:
    """Takes what a feed shows, until a condition holds."""

    def __init__(self, feed: LiveFeed) -> None:
        self.feed = feed
        self.reader = MessageReader(is_live=True)
        self.messages: list[DAQJobMessage] = []
        self.missed_rows = self.row_count = 0

    def until(self, condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        poller = zmq.Poller()
        for socket in self.feed.pollables():
            poller.register(socket, zmq.POLLIN)
        while not condition():
            assert time.monotonic() < end, f"{len(self.messages)} messages, then not what was awaited"
            poller.poll(20)
            for shown in self.feed.receive():
                self.missed_rows += shown.missed_rows
                if not shown.is_continuous:
                    self.reader.forget(shown.frames[0].stream)
                for frame in shown.frames:
                    self.row_count += frame.rows
                    self.messages += self.reader.read(shown.info, frame)

    def numbers(self, job: str) -> list[int]:
        """Return the first column of all rows of a job."""
        return [
            row[0]
            for message in self.messages
            if message.source and message.source.job == job
            for row in getattr(message, "data", None) or ()
        ]


@contextmanager
def listener(runtime_dir: Path, topic: str) -> Iterator[psutil.Process]:
    """Run a process that listens and counts on stdout; wait until it has taken something."""
    code = (
        "import sys, zmq; from pathlib import Path; from edgedaq.live_feed import LiveFeed\n"
        "feed = LiveFeed(Path(sys.argv[1]), [sys.argv[2]]); n = 0\n"
        "while True:\n"
        "    feed.pollables()[0].poll(100); n += len(feed.receive()); print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runtime_dir), topic],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if int(line) > 0:
                break
        yield psutil.Process(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()
