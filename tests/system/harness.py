"""Runs an agent and an aggregator as a site does: real processes, TOML files, loopback, signals.

``Site`` owns one of each, a directory with everything they keep, and a short runtime directory on tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from edgedaq.clock import utc_ns
from edgedaq.control import ControlError, request
from edgedaq.keys import ENROLMENT_NAME, Enrolment, aggregator_keys, new_key_pair, write_enrolment
from edgedaq_aggregator.authority import NodesFile
from edgedaq_aggregator.ledger import LedgerRow, read_ledger

from tests.system.oracle import Verdict, judge_csv, judge_raw, witnessed

ROOT = Path(__file__).resolve().parents[2]
NODE = "node-1"
STOP_LIMIT_S = 10.0
_WITNESS = f"{Path(__file__).parent / 'witness_job.py'}:DAQJobWitness"
_QUICK = 'restart_backoff = "50 ms"\nrestart_backoff_max = "200 ms"\n'


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def environment(mutation: Path | None = None) -> dict[str, str]:
    """Return the environment of a command of this tree, installed or not.

    Args:
        mutation: Directory with a ``sitecustomize.py`` that takes a safety out of every process.
    """
    places = [ROOT / "common", ROOT / "agent", ROOT / "aggregator", ROOT]
    if mutation is not None:
        places.insert(0, mutation)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}


def kill_seed() -> int:
    """Return the seed of a run at random moments, printed so that it can be given back in ``KILL_SEED``."""
    seed = int(os.environ.get("KILL_SEED") or secrets.randbits(32))
    print(f"seed of this run: KILL_SEED={seed}")
    return seed


class Side:
    """One supervisor that can be started, asked, stopped and killed.

    Args:
        command: Module and arguments after ``python -m``.
        mutation: Directory with a ``sitecustomize.py`` that takes a safety out of every process of this side.
    """

    def __init__(self, command: list[str], runtime_dir: Path, log: Path, *, mutation: Path | None = None):
        self.runtime_dir = runtime_dir
        self.log = log
        self.mutation = mutation
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Return the supervisor, which must have been started."""
        assert self._process is not None
        return self._process

    @property
    def is_running(self) -> bool:
        """Tell whether its supervisor lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, is_awaited: bool = True) -> None:
        """Start the supervisor and, if wanted, wait until all of its workers run."""
        assert not self.is_running
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.mutation),
                cwd=self.log.parent,
                start_new_session=True,
            )
        if is_awaited:
            self.wait_running()

    def wait_running(self, limit_s: float = 30.0) -> None:
        """Wait until every worker runs."""
        self.wait(
            lambda: {job["state"] for job in self.jobs().values()} <= {"RUNNING", "BLOCKED"} and self.jobs(),
            limit_s,
            "all workers run",
        )

    def wait(self, condition: Callable[[], object], limit_s: float, what: str) -> float:
        """Wait for a condition; return how long it took.

        Raises:
            AssertionError: It did not come about; with the end of the log.
        """
        begun_s = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - begun_s
            assert waited_s < limit_s, f"not within {limit_s:g} s: {what}\n{self.tail()}"
            assert self._process is None or self.is_running, f"has ended, waiting for: {what}\n{self.tail()}"
            time.sleep(0.02)
        return time.monotonic() - begun_s

    def status(self) -> dict[str, Any]:
        """Return what the supervisor says of itself; empty while it does not answer."""
        try:
            return request(self.runtime_dir, "status", limit_s=2.0)
        except ControlError:
            return {}

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the status of each worker by its unique id."""
        return {job["unique_id"]: job for job in self.status().get("jobs", [])}

    def pid_of(self, unique_id: str) -> int:
        """Return the pid of a worker; 0 while it has none, or nobody answers."""
        return int(self.jobs().get(unique_id, {}).get("pid") or 0)

    def kill_worker(self, unique_id: str) -> int:
        """Kill a worker that runs with SIGKILL; return the pid that it had."""
        self.wait(lambda: self.pid_of(unique_id), 20.0, f"{unique_id} has a process")
        pid = self.pid_of(unique_id)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_replaced(self, unique_id: str, old_pid: int, limit_s: float = 30.0) -> float:
        """Wait until a worker runs again in another process; return how long it took."""

        def is_replaced() -> bool:
            job = self.jobs().get(unique_id, {})
            return job.get("pid") not in (None, old_pid) and job.get("state") in ("RUNNING", "BLOCKED")

        return self.wait(is_replaced, limit_s, f"{unique_id} comes back")

    def kill(self) -> None:
        """Kill the supervisor with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """Kill the supervisor and all of its workers, so that none can react to another's end."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        for pid in (self.process.pid, *(worker.pid for worker in workers)):
            os.kill(pid, signal.SIGSTOP)
        for pid in (self.process.pid, *(worker.pid for worker in workers)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._process = None
        self.wait(lambda: all(_has_ended(worker) for worker in workers), 5.0, "all workers are dead")

    def stop(self, number: int = signal.SIGTERM, *, expected_status: int = 0) -> float:
        """Stop the supervisor in order; return how long it took, which the promise limits."""
        begun_s = time.monotonic()
        self.process.send_signal(number)
        try:
            status = self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            message = f"did not end within {STOP_LIMIT_S} s of signal {number}\n{self.tail()}"
            raise AssertionError(message) from None
        assert status == expected_status, f"ended with status {status}\n{self.tail()}"
        return time.monotonic() - begun_s

    def close(self) -> None:
        """End whatever is left, by pid."""
        pids = {self.process.pid} if self.is_running else set()
        for path in self.runtime_dir.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pids.add(int(path.read_text()))
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.pid == os.getpid() or "edgedaq" not in " ".join(process.cmdline()):
                    continue
                process.kill()
        if self._process is not None:
            self._process.wait()

    def tail(self, count: int = 40) -> str:
        """Return the last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- {self.log.name}", *lines[-count:]])


class Site:
    """One agent and one aggregator on this machine.

    Args:
        agent_port: Where the agent dials, if not straight to the aggregator: a proxy's port.
    """

    def __init__(self, root: Path, runtime_dir: Path, *, agent_port: int = 0, port: int = 0) -> None:
        self.root = root
        self.port = port or free_port()
        self.out_dir = root / "out"
        self.node_dir = self.out_dir / NODE
        self.state_dir = root / "aggregator-state"
        self.spool_dir = root / "agent-state"
        self.witness_dir = root / "witness"
        self.agent_dir = root / "agent"
        self.aggregator_dir = root / "aggregator"
        for directory in (self.agent_dir, self.aggregator_dir, self.witness_dir):
            directory.mkdir()
        (self.agent_dir / "agent.toml").write_text(
            f'supervisor_id = "{NODE}"\n'
            f'aggregator = "tcp://127.0.0.1:{agent_port or self.port}"\n'
            f'state_dir = "{self.spool_dir}"\nruntime_dir = "{runtime_dir / "a"}"\n'
        )
        (self.aggregator_dir / "aggregator.toml").write_text(
            f'listen = "tcp://127.0.0.1:{self.port}"\n'
            f'out_dir = "{self.out_dir}"\nstate_dir = "{self.state_dir}"\n'
            f'runtime_dir = "{runtime_dir / "c"}"\n'
        )
        self.add_store("csv", "DAQJobStoreCSV")
        self.add_store("raw", "DAQJobStoreRaw")
        self.agent = Side(
            ["edgedaq_agent.cli", "run", "--config-dir", str(self.agent_dir)],
            runtime_dir / "a",
            root / "agent.log",
        )
        self.aggregator = Side(
            ["edgedaq_aggregator.cli", "run", "--config-dir", str(self.aggregator_dir)],
            runtime_dir / "c",
            root / "aggregator.log",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.agent.close()
        self.aggregator.close()

    def enrol(self) -> None:
        """Give the node a key that the aggregator demands, as the two commands would; before both start."""
        keys, now_ns = new_key_pair(), utc_ns()
        with (self.aggregator_dir / "aggregator.toml").open("a") as file:
            file.write("require_keys = true\n")
        self.state_dir.mkdir()
        nodes = NodesFile(self.state_dir, "aggregator")
        assert nodes.join(nodes.invite(NODE, now_ns, None, ""), keys.public, now_ns) == NODE
        enrolment = Enrolment(
            node=NODE,
            aggregator=f"tcp://127.0.0.1:{self.port}",
            aggregator_key=aggregator_keys(self.state_dir).public,
            secret_key=keys.secret,
        )
        write_enrolment(self.agent_dir / ENROLMENT_NAME, enrolment)

    def add_store(self, name: str, job_type: str, settings: str = "") -> None:
        """Write the TOML of a store."""
        (self.aggregator_dir / f"{name}.toml").write_text(f'daq_job_type = "{job_type}"\n{_QUICK}{settings}')

    def add_table_job(self, name: str = "table", *, more_stores: str = "", **settings: object) -> None:
        """Write the TOML of a witness job whose rows go to ``<name>.csv``, and where ``more_stores`` says."""
        store = f'[store_config.csv]\nfile_path = "{name}.csv"\n{more_stores}'
        self._add_witness(name, "table", store, settings)

    def add_raw_job(self, name: str = "raw", **settings: object) -> None:
        """Write the TOML of a witness job whose messages go to ``<name>.bin``."""
        self._add_witness(name, "raw", f'[store_config.raw]\nfile_path = "{name}.bin"\n', settings)

    def remove_jobs(self) -> None:
        """Remove the TOML of every job of the agent; its uplink stays."""
        for path in self.agent_dir.glob("*.toml"):
            if path.name != "agent.toml":
                path.unlink()

    def judge_table(self, name: str = "table", batch_count: int = 1) -> Verdict:
        """Judge the stored rows of a table job."""
        paths = self.node_dir.glob(f"*{name}*.csv")
        return judge_csv(paths, witnessed(self.witness_dir, name), batch_count)

    def judge_raw(self, name: str = "raw", batch_count: int = 1) -> Verdict:
        """Judge the stored messages of a raw job."""
        return judge_raw(self.node_dir / f"{name}.bin", witnessed(self.witness_dir, name), batch_count)

    def put_count(self, name: str) -> int:
        """Return how many rows put has returned for in all lives of a job."""
        return sum(witnessed(self.witness_dir, name).values())

    def wait_put(self, name: str, more: int, limit_s: float = 30.0) -> None:
        """Wait until a job has put this many more."""
        self.wait_put_count(name, self.put_count(name) + more, limit_s)

    def wait_put_count(self, name: str, count: int, limit_s: float = 30.0) -> None:
        """Wait until a job has put this many in all its lives."""
        self.agent.wait(lambda: self.put_count(name) >= count, limit_s, f"{name} has put {count}")

    def ledger(self) -> list[LedgerRow]:
        """Return the ledger from the files alone."""
        return read_ledger(self.state_dir)

    def deliver_rest(self, limit_s: float = 60.0) -> list[LedgerRow]:
        """Let everything arrive: stop the jobs, run the uplink alone until the ledger balances, stop both.

        Returns:
            The ledger, of which every stream is closed and waits for nothing.
        """
        if self.agent.is_running:
            self.agent.stop()
        self.remove_jobs()
        if not self.aggregator.is_running:
            self.aggregator.start()
        self.agent.start()
        try:
            self.aggregator.wait(self._is_settled, limit_s, "the ledger balances and nothing waits")
        except AssertionError as e:
            rows = "\n".join(str(row) for row in self.ledger() if not _is_settled(row))
            message = f"{e}\n{self.agent.tail()}\n{rows}"
            raise AssertionError(message) from None
        self.agent.stop()
        self.aggregator.stop()
        return self.ledger()

    def _is_settled(self) -> bool:
        held = {(row.job, row.life) for row in self.ledger() if _is_settled(row)}
        known = {(row.job, row.life) for row in self.ledger()}
        lives = sum(
            count > 0
            for name in {path.name.split(".")[0] for path in self.witness_dir.iterdir()}
            for count in witnessed(self.witness_dir, name).values()
        )
        return held == known and len(known) >= lives

    def _add_witness(self, name: str, form: str, store: str, settings: Mapping[str, object]) -> None:
        lines = [f'daq_job_type = "{_WITNESS}"', f'form = "{form}"', f'witness_dir = "{self.witness_dir}"']
        lines += [f"{key} = {value!r}" for key, value in settings.items()]
        (self.agent_dir / f"{name}.toml").write_text("\n".join(lines) + f"\n{_QUICK}{store}")


def _has_ended(process: psutil.Process) -> bool:
    """Tell whether a process is dead; who reaps an orphan may take a while to do so."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_settled(row: LedgerRow) -> bool:
    return row.closed and row.balances and row.waiting == 0
