from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from edgedaq.control import ControlError, request

ROOT = Path(__file__).resolve().parents[2]
JOBS = """
import os, pathlib, signal, subprocess, sys, time
from edgedaq.config import DAQJobConfig
from edgedaq.job import DAQJob

class Config(DAQJobConfig):
    log: str = ""

class Job(DAQJob):
    config_type = Config
    def note(self, text):
        with open(self.config.log, "a") as file:
            file.write(text + "\\n")

class Runs(Job):
    def start(self):
        while True:
            self.sleep(0.05)

class Notes(Job):
    def start(self):
        try:
            while True:
                self.sleep(0.05)
        finally:
            time.sleep(0.2)
            self.note(self.config.daq_job_unique_id)

class Finishes(Job):
    def start(self):
        pass

class Fails(Job):
    def start(self):
        raise RuntimeError("the crate is off")

class Stuck(Job):
    def start(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        self.note(str(child.pid))
        while True:
            try:
                time.sleep(100)
            except BaseException:
                pass

class Helped(Job):
    def start(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        self.note(str(child.pid))
        while True:
            self.sleep(0.05)

class Hangs(Job):
    def start(self):
        time.sleep(100)
"""


class Run:
    """One supervisor in a process of its own."""

    def __init__(self, config_dir, runtime_dir, **environment):
        self.runtime_dir = runtime_dir
        self.log = config_dir / "log.txt"
        places = [ROOT / "common", ROOT / "agent", ROOT / "aggregator"]
        held = {
            key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "INVOCATION_ID")
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).parent / "supervised.py"),
                    str(config_dir),
                    str(runtime_dir),
                ],
                env={**held, "PYTHONPATH": os.pathsep.join(map(str, places)), **environment},
                stdin=subprocess.DEVNULL,
                stderr=log,
                process_group=0,
            )

    def jobs(self):
        with contextlib.suppress(ControlError):
            return {job["unique_id"]: job for job in request(self.runtime_dir, "status", limit_s=1.0)["jobs"]}
        return {}

    def wait(self, condition, limit_s=15.0):
        deadline = time.monotonic() + limit_s
        while not (found := condition(self.jobs())):
            assert time.monotonic() < deadline, (self.jobs(), self.log.read_text())
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.03)
        return found

    def wait_running(self, *names):
        return self.wait(
            lambda jobs: all(jobs.get(name, {}).get("state") == "RUNNING" for name in names) and jobs
        )

    def stop(self, number=signal.SIGTERM):
        begun = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(20)
        return status, time.monotonic() - begun


@pytest.fixture
def start(tmp_path, runtime_dir):
    """Return what writes job files and starts a supervisor on them; what is left at the end is killed."""
    runs = []
    (tmp_path / "jobs.py").write_text(JOBS)

    def begin(environment=None, **files):
        for name, text in files.items():
            kind, _, more = text.partition("\n")
            (tmp_path / f"{name}.toml").write_text(
                f'daq_job_type = "jobs.py:{kind}"\nlog = "{tmp_path / "notes"}"\n'
                f'restart_backoff = "50 ms"\n{more}'
            )
        run = Run(tmp_path, runtime_dir / "r", **(environment or {}))
        runs.append(run)
        return run

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.stop()


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_gone(pids, limit_s):
    deadline = time.monotonic() + limit_s
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if not gone(pid)]
        time.sleep(0.02)


def test_each_job_is_in_the_state_that_it_earned(start):
    run = start(a="Runs", b="Finishes", c="Fails", d="Fails\nrestart_limit = 1", e="NoSuchClass")
    jobs = run.wait(
        lambda jobs: (
            jobs
            and jobs["a"]["state"] == "RUNNING"
            and jobs["b"]["state"] == "STOPPED"
            and jobs["c"]["restart_count"] >= 2
            and "the crate is off" in jobs["c"]["reason"]
            and jobs["d"]["state"] == "FAILED"
            and jobs
        )
    )
    assert jobs["b"]["reason"] == "finished"
    assert jobs["c"]["last_restart_ns"] > 0
    assert jobs["d"]["reason"].startswith("gave up after 1 restarts: ")
    assert jobs["e"]["state"] == "FAILED"
    assert "daq_job_type names a class" in jobs["e"]["reason"]
    status, seconds = run.stop()
    assert status == 0
    assert seconds < 5
    assert not run.runtime_dir.exists()


def test_a_killed_job_comes_back_and_its_account_goes_on(start):
    run = start(a="Runs")
    first = run.wait_running("a")["a"]
    os.kill(first["pid"], signal.SIGKILL)
    second = run.wait(
        lambda jobs: (job := jobs["a"])["state"] == "RUNNING" and job["restart_count"] == 1 and job
    )
    assert second["pid"] != first["pid"]
    assert "killed by SIGKILL" in run.log.read_text()


def test_a_job_that_somebody_else_stops_comes_back_also_in_its_first_moments(start):
    run = start(runs="Runs\n")
    run.wait_running("runs")
    run.wait(lambda jobs: jobs["runs"]["total"])
    os.kill(run.jobs()["runs"]["pid"], signal.SIGTERM)
    run.wait(lambda jobs: jobs["runs"]["restart_count"] == 1)
    run.wait_running("runs")
    os.kill(run.jobs()["runs"]["pid"], signal.SIGTERM)
    begun = run.wait(lambda jobs: jobs["runs"]["state"] == "STARTING" and jobs["runs"]["pid"])
    os.kill(begun, signal.SIGTERM)
    run.wait(lambda jobs: jobs["runs"]["restart_count"] == 3)
    run.wait_running("runs")
    assert "killed by SIGTERM" not in run.log.read_text()
    assert run.stop()[0] == 0


def test_groups_end_one_after_the_other(start, tmp_path):
    run = start(stores_d="Notes", intake_c="Notes", uplink_b="Notes", a="Notes", a2="Notes")
    run.wait_running("a", "a2", "uplink_b", "intake_c", "stores_d")
    assert run.stop(signal.SIGINT)[0] == 0
    ended = (tmp_path / "notes").read_text().split()
    assert sorted(ended[:2]) == ["a", "a2"]
    assert ended[2:] == ["uplink_b", "intake_c", "stores_d"]


def test_a_job_that_does_not_stop_is_killed_with_all_that_it_started_and_within_its_limit(start, tmp_path):
    run = start(a="Stuck\nstop_limit = 0.5", b="Runs")
    run.wait_running("a", "b")
    run.wait(lambda _: (tmp_path / "notes").exists() and (tmp_path / "notes").read_text().strip())
    helper = int((tmp_path / "notes").read_text())
    status, seconds = run.stop()
    assert status == 0
    assert 0.5 <= seconds < 4
    wait_gone([helper], 2)


def test_a_second_ctrl_c_changes_nothing(start, tmp_path):
    run = start(a="Notes")
    run.wait_running("a")
    for _ in range(3):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.03)
    assert run.process.wait(10) == 0
    assert (tmp_path / "notes").read_text() == "a\n"


def test_when_the_supervisor_is_killed_nobody_is_left_and_the_next_one_starts_at_once(start, tmp_path):
    run = start(a="Notes", b="Runs")
    jobs = run.wait_running("a", "b")
    run.process.kill()
    run.process.wait()
    again = start()
    new = again.wait_running("a", "b")
    wait_gone([job["pid"] for job in jobs.values()], 10)
    assert new["a"]["pid"] != jobs["a"]["pid"]
    assert again.stop()[0] == 0
    assert (tmp_path / "notes").read_text() == "a\na\n"


def test_when_the_supervisor_is_killed_what_a_job_had_started_ends_with_it(start, tmp_path):
    run = start(helped="Helped\n")
    run.wait_running("helped")
    run.wait(lambda _: (tmp_path / "notes").exists())
    helper = int((tmp_path / "notes").read_text())
    assert not gone(helper)
    run.process.kill()
    run.process.wait()
    wait_gone([helper], 8)


def test_a_second_supervisor_is_refused_by_the_pid_of_the_first(start):
    run = start(a="Runs")
    run.wait_running("a")
    second = start()
    assert second.process.wait(10) == 78
    assert f"already running as process {run.process.pid}" in run.log.read_text()
    assert run.jobs()["a"]["state"] == "RUNNING"


def test_a_job_that_hangs_is_restarted_where_its_file_sets_a_limit(start):
    run = start(a="Hangs\nhang_limit = 1.0\nstop_limit = 0.3", b="Hangs")
    job = run.wait(lambda jobs: jobs and jobs["a"]["restart_count"] == 1 and jobs["a"])
    assert job["state"] in ("STARTING", "RUNNING")
    assert run.jobs()["b"]["restart_count"] == 0


def test_the_stop_command_stops(start):
    run = start(a="Runs")
    run.wait_running("a")
    assert request(run.runtime_dir, "stop") == {"pid": run.process.pid}
    assert run.process.wait(10) == 0


def test_systemd_is_told_when_it_works_how_it_does_and_that_it_ends(start, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        run = start(
            {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}, a="Runs", b="NoSuchClass"
        )
        run.wait_running("a")
        deadline = time.monotonic() + 10
        told: list[str] = []
        wanted = "STATUS=1 of 2 jobs run, 0 rows/s; FAILED: b ("
        while not ({"READY=1", "WATCHDOG=1"} <= set(told) and any(text.startswith(wanted) for text in told)):
            assert time.monotonic() < deadline, told
            told.append(listener.recv(4096).decode())
        assert run.stop()[0] == 0
        while told[-1] != "STOPPING=1":
            told.append(listener.recv(4096).decode())
