"""A consuming process under a test's command, and what it says of each thing that it was handed.

Run as a program it is the consuming side of a job; it says, one JSON list per line: ``["rows", first, last]``
of a message whose rows are numbered in order, or ``["gap", rows, reason]``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from edgedaq.clock import boot_id
from edgedaq.config import DAQJobConfig, InputOptions
from edgedaq.job import DAQJob, JobStopped
from edgedaq.job_context import JobContext, WorkerSpec
from edgedaq.logsetup import configure
from edgedaq.messages import DAQJobMessage, DAQJobMessageGap, DAQJobMessageStoreTabular
from edgedaq.typed_toml import build

from tests.common.producing import ROOT


class Consumer:
    """One consuming process. ``said`` grows while it lives."""

    def __init__(self, runtime_dir: Path, name: str, *, pause_s: float = 0.0, **options: Any) -> None:
        setup = {"runtime_dir": str(runtime_dir), "name": name, "pause_s": pause_s, "options": options}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(setup)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'common'}{os.pathsep}{ROOT}"},
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"
        self.said: list[list[Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, and hear what it had still said."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()

    @property
    def rows(self) -> int:
        return sum(said[2] - said[1] + 1 for said in list(self.said) if said[0] == "rows")

    @property
    def missed(self) -> int:
        return sum(said[1] for said in list(self.said) if said[0] == "gap")

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.said.append(json.loads(line))


def spans(said: list[list[Any]], begin: int = 0) -> tuple[int, list[tuple[int, int]]]:
    """Follow the numbers of rows through what a consumer said; return where they end, and what was missed.

    Fails if a row came twice, out of order, or is neither there nor in a gap.
    """
    missed = []
    for kind, first, last in said:
        if kind == "gap":
            missed.append((begin, begin + first))
            begin += first
        else:
            assert first == begin, f"row {first} came where {begin} was to come"
            begin = last + 1
    return begin, missed


class _Said(DAQJob):
    """Says what it is handed."""

    pause_s = 0.0

    def handle_message(self, message: DAQJobMessage) -> None:
        assert isinstance(message, DAQJobMessageStoreTabular)
        rows = message.data
        assert rows
        numbers = [row[0] for row in rows]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert all(row[1] == float(row[0]) ** 2 for row in rows)
        time.sleep(self.pause_s)
        _say(["rows", numbers[0], numbers[-1]])

    def handle_gap(self, gap: DAQJobMessageGap) -> None:
        _say(["gap", gap.rows, gap.reason])


def _main(setup: dict[str, Any]) -> None:
    configure("ERROR")
    spec = WorkerSpec(
        unique_id=setup["name"],
        job_type="T",
        target="",
        node="n",
        boot=boot_id(),
        runtime_dir=setup["runtime_dir"],
    )
    context = JobContext(spec)
    signal.signal(signal.SIGTERM, lambda *_: context.request_stop())
    options = build(InputOptions, {"topics": ["store"], **setup["options"]}, "options")
    job = _Said(DAQJobConfig(daq_job_type="T", input=options), context)
    job.pause_s = setup["pause_s"]
    print("ready", flush=True)
    with contextlib.suppress(JobStopped):
        job.start()
    context.close()


def _say(what: list[Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
