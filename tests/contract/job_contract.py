"""The contract of every device job, run as a real worker process whose ring a consumer reads.

A job's test inherits ``JobContract``, says its type and a fast configuration, and looks at what comes out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import zmq
from edgedaq.clock import boot_id
from edgedaq.config import DAQJobConfig, build_job_config
from edgedaq.errors import ConfigError
from edgedaq.frame import Frame, Kind, decode, split
from edgedaq.inlet import Inlet
from edgedaq.job_context import WorkerSpec
from edgedaq.link import Link, LinkClosed
from edgedaq.registry import load_class
from edgedaq.schema import OpenInfo, decode_columns, decode_open, unpack_rows
from edgedaq.stats import Snapshot, snapshot_from_map
from edgedaq.worker_process import worker_environment
from edgedaq_agent.jobs import JOBS

LIMIT_S = 20.0
NODE = "pi-1"
WITHOUT_NUMPY = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "pyarrow"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Refuse())
sys.argv = ["edgedaq.worker", *sys.argv[1:]]
runpy.run_module("edgedaq.worker", run_name="__main__", alter_sys=True)
"""


class RunningJob:
    """One life of a job, and everything that came out of its ring."""

    def __init__(self, spec: WorkerSpec, runtime_dir: Path) -> None:
        self.link, theirs = Link.pair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WITHOUT_NUMPY, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=worker_environment(),
            )
        self.link.send({"type": "spec", **msgspec.to_builtins(spec)})
        self.inlet = Inlet(runtime_dir / "rings", "uplink", ["store"], retire=True)
        self.infos: dict[int, OpenInfo] = {}
        self.frames: list[Frame] = []
        self.snapshot: Snapshot | None = None
        self.reason = ""

    def until(self, condition: Callable[[], bool]) -> None:
        """Read what comes until the condition holds."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited {LIMIT_S} s in vain, got {len(self.frames)} frames"
            self.read()

    def read(self) -> None:
        self.inlet.scan()
        zmq.select(self.inlet.pollables(), [], [], 0.02)
        for run in self.inlet.receive():
            for frame in split(memoryview(bytes(run.frames))):
                if frame.stream not in self.infos:
                    opened = run.ring.open_frame(frame.stream)
                    assert opened is not None
                    self.infos[frame.stream] = decode_open(decode(memoryview(opened)))
                self.frames.append(frame)
            run.ring.release(run.end)
        try:
            for message in self.link.receive():
                if message.get("snapshot") is not None:
                    self.snapshot = snapshot_from_map(message["snapshot"])
                if message["type"] == "ended":
                    self.reason = str(message["reason"])
        except LinkClosed:
            pass

    def end(self, number: signal.Signals) -> int:
        """End it by a signal, and read to the end of its ring; return its exit status."""
        os.kill(self.process.pid, number)
        status = self.process.wait(LIMIT_S)
        self.until(lambda: bool(self.frames) and self.closed_streams() == set(self.infos))
        self.until(lambda: self.inlet.all_dead_and_drained)
        return status

    def closed_streams(self) -> set[int]:
        return {frame.stream for frame in self.frames if frame.kind is Kind.CLOSE}

    def data(self, form: str, tag: str = "") -> list[Frame]:
        """Return the data frames of the stream of a form and a tag."""
        kinds = {"table": (Kind.PACKED, Kind.COLUMNS), "raw": (Kind.RAW,)}[form]
        return [frame for frame in self.frames if frame.kind in kinds and self.infos[frame.stream].tag == tag]

    def rows(self, tag: str = "") -> list[tuple[Any, ...]]:
        """Return the rows of its table, in order."""
        found: list[tuple[Any, ...]] = []
        for frame in self.data("table", tag):
            schema = self.infos[frame.stream].schema
            assert schema is not None
            if frame.kind is Kind.PACKED:
                found += [tuple(row) for row in unpack_rows(schema, frame.body)]
            else:
                found += list(zip(*decode_columns(schema, frame.body)[0], strict=True))
        return found

    def messages(self, tag: str = "") -> list[bytes]:
        """Return its raw messages that fit a frame, in order."""
        found: list[bytes] = []
        for frame in self.data("raw", tag):
            ends = memoryview(bytes(frame.body[: 4 * frame.rows])).cast("I").tolist()
            body, begin = bytes(frame.body[4 * frame.rows :]), 0
            for end in ends:
                found.append(body[begin:end])
                begin = end
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.link.close()
        self.inlet.close()


class JobContract:
    """Inherit it, and fill in what is marked; ``config`` must make the job put quickly."""

    job_type: ClassVar[str]
    config: ClassVar[dict[str, Any]]

    def check_output(self, job: RunningJob) -> None:
        """Check everything that one life put: complete, in order, as declared."""
        raise NotImplementedError

    def has_enough(self, job: RunningJob) -> bool:
        """Tell whether the job has put enough to be checked."""
        return sum(frame.rows for frame in job.frames) >= 30

    @contextmanager
    def running(self, runtime_dir: Path, **changes: Any) -> Iterator[RunningJob]:
        (runtime_dir / "rings").mkdir(exist_ok=True)
        spec = WorkerSpec(
            unique_id="job",
            job_type=self.job_type,
            target=JOBS[self.job_type],
            config={"daq_job_type": self.job_type, **self.config, **changes},
            node=NODE,
            boot=boot_id(),
            runtime_dir=str(runtime_dir),
            claims={"uplink": ["store"]},
        )
        job = RunningJob(spec, runtime_dir)
        try:
            yield job
        finally:
            job.close()

    def test_it_puts_what_it_declares_without_numpy_and_stops_when_asked(self, runtime_dir):
        with self.running(runtime_dir) as job:
            job.until(lambda: self.has_enough(job))
            began_s = time.monotonic()
            status = job.end(signal.SIGTERM)
            assert (status, job.reason) == (0, "stopped")
            assert time.monotonic() - began_s < 5
            self.check_output(job)
            assert job.snapshot is not None
            assert job.snapshot.out_count == sum(frame.rows for frame in job.frames)
            for info in job.infos.values():
                assert (info.node, info.job, info.job_type) == (NODE, "job", self.job_type)
                assert info.store_config

    def test_what_it_has_put_survives_its_kill_9(self, runtime_dir):
        with self.running(runtime_dir) as job:
            job.until(lambda: self.has_enough(job))
            assert job.end(signal.SIGKILL) == -signal.SIGKILL
            self.check_output(job)

    def test_a_misspelt_key_is_refused_with_the_right_one(self):
        config_type = load_class(JOBS[self.job_type], None).config_type
        key = next(key for key in self.config if key != "store_config")
        raw = {"daq_job_type": self.job_type, **self.config, f"{key}x": 1}
        with pytest.raises(ConfigError, match=rf"job.toml: .*'{key}x', did you mean '{key}'\?"):
            build_job_config(config_type, raw, file="job.toml", stem="job")

    def test_its_configuration_is_one_of_a_job(self):
        assert issubclass(load_class(JOBS[self.job_type], None).config_type, DAQJobConfig)
