"""Jobs that misbehave in every way that is known, beside one that measures at 10 kHz and must not notice."""

from __future__ import annotations

import csv
import os
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from edgedaq.control import request

from tests.system.harness import Site

JOBS = '''
import os, signal, subprocess, sys, threading, time
from edgedaq import DAQJob, StorableDAQJobConfig

class Job(DAQJob):
    config_type = StorableDAQJobConfig

class Paced(Job):
    """10 kHz: ten rows a millisecond, with the time at which they were really put."""
    def start(self):
        begun, number = time.monotonic(), 0
        while True:
            now = time.monotonic()
            rows = [[number + i, now] for i in range(10)]
            self.put_rows(rows, ["number", "t"])
            number += 10
            ahead = begun + number / 10000 - time.monotonic()
            if ahead > 0:
                self.sleep(ahead)

class Fails(DAQJob):
    def start(self):
        raise RuntimeError("the crate is off")

class Finishes(DAQJob):
    def start(self):
        pass

class Hangs(DAQJob):
    def start(self):
        self.sleep(0.1)
        threading.Event().wait()

class Leaks(DAQJob):
    def start(self):
        held = []
        while True:
            held.append(os.urandom(4 << 20))
            self.sleep(0.05)

class Forks(DAQJob):
    def start(self):
        while True:
            code = "import time; x = bytearray(16 << 20); time.sleep(600)"
            subprocess.Popen([sys.executable, "-S", "-c", code])
            self.sleep(0.3)

class Deaf(DAQJob):
    def start(self):
        while True:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(0.05)
            except BaseException:
                pass

class Floods(Job):
    def start(self):
        rows = [[i, i * 0.5] for i in range(500)]
        for _ in range(2000):
            self.put_rows(rows, ["a", "b"])
        while True:
            self.sleep(1)

class Blocked(Job):
    def start(self):
        while True:
            self.put_raw(bytes(50000), topics=["slow"])

class Slow(DAQJob):
    topics_to_subscribe = ["slow"]
    def handle_message(self, message):
        self.sleep(0.5)
'''
STORED = '[store_config.csv]\nfile_path = "{name}.csv"\n'
NEIGHBOURS = {
    "fails": ("Fails", 'restart_backoff = "50 ms"\nrestart_limit = 3'),
    "exits": ("Finishes", ""),
    "hangs": ("Hangs", 'hang_limit = "1 s"\nstop_limit = 0.5\nrestart_backoff = "50 ms"'),
    "leaks": ("Leaks", 'memory_limit = "96 MiB"\nrestart_backoff = "50 ms"'),
    "forks": ("Forks", 'memory_limit = "96 MiB"\nrestart_backoff = "50 ms"'),
    "deaf": ("Deaf", "stop_limit = 0.5"),
    "floods": ("Floods", STORED.format(name="floods")),
    "blocked": (
        "Blocked",
        (
            '[ring]\nring_bytes = "512 KiB"\nslot_bytes = "16 KiB"\n'
            '[store_config.raw]\nfile_path = "blocked.bin"\n'
        ),
    ),
    "slow": ("Slow", ""),
}

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def site(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as made:
        (made.agent_dir / "jobs.py").write_text(JOBS)
        (made.agent_dir / "paced.toml").write_text(
            'daq_job_type = "jobs.py:Paced"\n' + STORED.format(name="paced")
        )
        yield made


def add_neighbours(site: Site) -> None:
    for name, (kind, more) in NEIGHBOURS.items():
        (site.agent_dir / f"{name}.toml").write_text(f'daq_job_type = "jobs.py:{kind}"\n{more}\n')


def reason_of(site: Site, name: str) -> str:
    return str(site.agent.jobs().get(name, {}).get("reason"))


def wait_for(site: Site, name: str, what: str, limit_s: float = 40.0, **wanted: object) -> None:
    def has_come() -> bool:
        job = site.agent.jobs().get(name, {})
        return all(job.get(key) == value for key, value in wanted.items()) and what in str(job.get("reason"))

    site.agent.wait(has_come, limit_s, f"{name}: {what} {wanted}: {site.agent.jobs().get(name)}")


def test_a_job_at_10_khz_misses_no_second_beside_jobs_that_misbehave_in_every_way(site: Site):
    site.aggregator.start()
    site.agent.start()
    site.agent.wait((site.node_dir / "paced.csv").exists, 20, "rows are stored")
    add_neighbours(site)
    reload_files(site)
    wait_for(site, "exits", "finished", state="STOPPED", restart_count=0)
    wait_for(site, "fails", "gave up after 3 restarts: RuntimeError: the crate is off", state="FAILED")
    for name, told in (
        ("hangs", "did nothing for 1 s (hang_limit)"),
        ("leaks", "more than 96 MiB (memory_limit)"),
        ("forks", "more than 96 MiB (memory_limit)"),
    ):
        site.agent.wait(partial(has_told, site, name, told), 40, f"{name}: {told}")
        site.agent.wait(partial(has_come_back, site, name), 20, f"{name} again")
    wait_for(site, "blocked", "its ring is full", state="BLOCKED")
    deaf = site.agent.pid_of("deaf")
    for name in NEIGHBOURS:
        (site.agent_dir / f"{name}.toml").unlink()
    reload_files(site)
    site.agent.wait(lambda: not psutil.pid_exists(deaf), 20, "the deaf job was killed")
    down = {"STOPPED", "FAILED"}
    site.agent.wait(
        lambda: all(site.agent.jobs()[name]["state"] in down for name in NEIGHBOURS), 30, "all of them end"
    )
    time.sleep(1.0)  # one more second of data, without them
    assert site.agent.jobs()["paced"]["restart_count"] == 0
    site.deliver_rest()
    assert_no_second_is_missing(site.node_dir / "paced.csv")
    assert not [entry for entry in psutil.process_iter() if is_child_of_forks(entry)]


def has_told(site: Site, name: str, told: str) -> bool:
    lines = site.agent.log.read_text().splitlines()
    return any(f"job={name} " in line and told in line and "BACKOFF" in line for line in lines)


def has_come_back(site: Site, name: str) -> bool:
    return bool(site.agent.jobs()[name]["restart_count"] >= 1)


def reload_files(site: Site) -> None:
    request(site.agent.runtime_dir, "reload", limit_s=20)


def is_child_of_forks(process: psutil.Process) -> bool:
    try:
        mine = f"EDGEDAQ_TEST_OWNER={os.getpid()}" in " ".join(
            f"{key}={value}" for key, value in process.environ().items()
        )
        return mine and "bytearray(16 << 20)" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def assert_no_second_is_missing(path: Path) -> None:
    with path.open() as file:
        rows = [(int(float(row["number"])), float(row["t"])) for row in csv.DictReader(file)]
    assert [number for number, _ in rows] == list(range(len(rows))), "lost or doubled"
    first, last = rows[0][1], rows[-1][1]
    assert last - first > 5
    counts = [0] * (int(last - first) + 1)
    for _, t in rows:
        counts[int(t - first)] += 1
    assert min(counts[:-1]) > 0, counts
    # Late by less than a second at any moment, so that no second is without its own data.
    assert all(abs(t - first - number / 10000) < 1.0 for number, t in rows), counts
