"""What a job's TOML says about it is what happens to it: with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.test_supervisor import JOBS
from tests.common.test_supervisor import start as _start

start = _start

MORE = '''
import threading
from edgedaq.errors import DeviceError

class Opens(Job):
    """Needs a device that is a file; works once it is there."""
    def start(self):
        if not os.path.exists(self.config.log + ".device"):
            raise DeviceError("no such device")
        while True:
            self.sleep(0.05)

class Wedged(Job):
    """Hangs until its device is reset."""
    def start(self):
        self.device = threading.Event()
        self.sleep(0.01)
        self.device.wait()
        while True:
            self.sleep(0.05)
    def reset_device(self):
        self.note("reset")
        self.device.set()

class Crashes(Job):
    def start(self):
        self.sleep(0.01)
        raise DeviceError("overrun")
    def reset_device(self):
        self.note("reset before a restart")

class WedgedForGood(Job):
    def start(self):
        self.sleep(0.01)
        threading.Event().wait()

class Burns(Job):
    def start(self):
        while True:
            self.beat()
'''


@pytest.fixture(autouse=True)
def _more_jobs(start, tmp_path):
    (tmp_path / "jobs.py").write_text(JOBS + MORE)


def notes(tmp_path: Path) -> list[str]:
    path = tmp_path / "notes"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_an_absent_device_is_treated_as_its_file_says_and_nobody_waits_for_it(start, tmp_path):
    limits = "restart_limit = 1\nrestart_backoff_max = '100 ms'\n"
    run = start(
        retried=f'Opens\n{limits}startup_error_behavior = "retry"',
        failed='Opens\nstartup_error_behavior = "fail"',
        ignored='Opens\nstartup_error_behavior = "ignore"',
        counted=f"Opens\n{limits}",
        neighbour="Runs",
    )
    run.wait_running("neighbour")
    run.wait(lambda jobs: jobs["retried"]["restart_count"] >= 4 and jobs["counted"]["state"] == "FAILED")
    jobs = run.jobs()
    assert (jobs["failed"]["state"], jobs["failed"]["reason"]) == ("FAILED", "no such device")
    assert (jobs["ignored"]["state"], jobs["ignored"]["reason"]) == ("STOPPED", "left out: no such device")
    (tmp_path / "notes.device").touch()
    run.wait_running("retried")


def test_a_hang_that_a_reset_of_the_device_ends_costs_no_restart(start, tmp_path):
    run = start(a='Wedged\nhang_limit = "4 s"')
    run.wait(lambda _: notes(tmp_path))
    jobs = run.wait(lambda jobs: jobs["a"]["reason"] == "" and jobs["a"]["state"] == "RUNNING" and jobs)
    assert jobs["a"]["restart_count"] == 0
    assert notes(tmp_path) == ["reset"]


def test_a_device_is_reset_before_a_job_that_failed_begins_again(start, tmp_path):
    run = start(a="Crashes\nrestart_limit = 2")
    run.wait(lambda jobs: jobs.get("a", {}).get("state") == "FAILED")
    assert notes(tmp_path) == ["reset before a restart"] * 2


def test_a_hang_climbs_from_the_reset_command_over_restarts_to_failed(start, tmp_path):
    run = start(
        a='WedgedForGood\nhang_limit = "1500 ms"\nstop_limit = 0.3\nrestart_limit = 1\n'
        f'reset_command = ["/bin/sh", "-c", "echo command >> {tmp_path / "notes"}"]'
    )
    job = run.wait(lambda jobs: jobs.get("a", {}).get("state") == "FAILED" and jobs["a"], 30)
    assert job["reason"] == "gave up after 1 restarts: did nothing for 1.5 s (hang_limit)"
    # Where it hung, before it was started again, and where it hung again.
    assert notes(tmp_path) == ["command"] * 3


def test_a_reset_command_that_fails_is_told_and_the_ladder_goes_on(start):
    run = start(a='Crashes\nreset_command = ["/bin/false"]', b='Fails\nreset_command = ["/nowhere/x"]')
    run.wait(lambda jobs: jobs and jobs["b"]["restart_count"] >= 2)
    assert "reset_command ['/nowhere/x'] failed" in run.log.read_text()


def test_a_job_that_takes_a_core_for_itself_is_restarted(start):
    run = start(a="Burns\ncpu_limit = 2\nstop_limit = 0.3", b="Runs\ncpu_limit = 90")
    job = run.wait(lambda jobs: jobs and jobs["a"]["restart_count"] >= 1 and jobs["a"], 60)
    assert job["state"] in ("STARTING", "RUNNING")
    assert "% of a core, more than 2 % (cpu_limit)" in run.log.read_text()
    assert run.jobs()["b"]["restart_count"] == 0


def test_the_kernel_would_end_a_job_before_what_carries_the_data(start):
    run = start(a="Runs")
    pid = run.wait_running("a")["a"]["pid"]
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= max(own, 300)
