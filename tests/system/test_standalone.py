"""One directory, one command: the job of the seed with only its imports changed, and a store."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edgedaq.clock import utc_ns

from tests.system.harness import ROOT, environment

EXAMPLES = ROOT / "configs" / "examples"
SENSOR = """
from edgedaq import DAQJob, StorableDAQJobConfig


class MySensorConfig(StorableDAQJobConfig):
    interval_seconds: float = 1.0


class DAQJobMySensor(DAQJob):
    config_type = MySensorConfig

    def start(self):
        reading = 0
        while True:
            self.put_rows([[reading, reading * 0.5]], ["reading", "volts"])
            reading += 1
            self.sleep(self.config.interval_seconds)
"""

pytestmark = pytest.mark.timeout(90)


class Standalone:
    """The command as a person runs it, in a directory of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.out = home / "data"
        self.config_dir = home / "configs"
        self.config_dir.mkdir()
        self.environment = environment()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, name: str, *more: str) -> list[str]:
        module = [sys.executable, "-m", "edgedaq_aggregator.cli"]
        return [*module, name, "--config-dir", str(self.config_dir), *more]

    def start(self) -> None:
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command("standalone", "--out", str(self.out)),
                env=self.environment,
                cwd=self.home,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(10) == 0, self.log()

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")[-4000:]

    def rows(self, name: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for path in sorted(self.out.glob(f"*/{name}")):
            with path.open(newline="", encoding="utf-8") as file:
                found += csv.DictReader(file)
        return found

    def wait_rows(self, name: str, count: int) -> None:
        end = time.monotonic() + 30
        while len(self.rows(name)) < count:
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)


@pytest.fixture
def standalone(tmp_path: Path):
    made = Standalone(tmp_path)
    (made.config_dir / "store_csv.toml").write_text('daq_job_type = "DAQJobStoreCSV"\n')
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_the_seeds_job_and_a_store_in_one_directory_run_with_one_command(standalone: Standalone):
    for name in ("my_sensor.py", "my_job.toml"):
        text = (EXAMPLES / name).read_text().replace("interval_seconds = 1.0", "interval_seconds = 0.05")
        (standalone.config_dir / name).write_text(text)
    standalone.start()
    standalone.wait_rows("my_job.csv", 10)
    standalone.stop()
    assert {float(row["value"]) for row in standalone.rows("my_job.csv")} == {42.0}
    assert abs(float(standalone.rows("my_job.csv")[-1]["timestamp"]) - utc_ns() / 1e9) < 60


def test_the_files_that_the_readme_shows_run_as_they_stand(standalone: Standalone):
    shown = re.findall(
        r"`([a-z_]+\.(?:py|toml))`:\n```[a-z]+\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert {name for name, _ in shown} == {"my_sensor.py", "my_sensor.toml", "store_csv.toml"}
    for name, text in shown:
        (standalone.config_dir / name).write_text(text)
    standalone.start()
    standalone.wait_rows("????-??-??_sensor_data.csv", 2)
    standalone.stop()


def test_the_seeds_sensor_file_says_where_its_data_goes_and_a_second_run_continues(standalone: Standalone):
    (standalone.config_dir / "my_sensor.py").write_text(SENSOR)
    (standalone.config_dir / "my_sensor.toml").write_text(
        'daq_job_type = "my_sensor.py:DAQJobMySensor"\ninterval_seconds = 0.02\n'
        '[store_config.csv]\nfile_path = "sensor_data.csv"\nadd_date = true\n'
    )
    checked = subprocess.run(
        standalone.command("check"),
        env=standalone.environment,
        cwd=standalone.home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    for _ in range(2):
        present = len(standalone.rows("????-??-??_sensor_data.csv"))
        standalone.start()
        standalone.wait_rows("????-??-??_sensor_data.csv", present + 20)
        standalone.stop()
    readings = [int(row["reading"]) for row in standalone.rows("????-??-??_sensor_data.csv")]
    begin = readings.index(0, 1)
    assert readings == [*range(begin), *range(len(readings) - begin)]


def test_status_from_a_second_terminal_shows_jobs_nodes_and_ledger(standalone: Standalone):
    (standalone.config_dir / "my_sensor.py").write_text(SENSOR)
    (standalone.config_dir / "my_sensor.toml").write_text(
        'daq_job_type = "my_sensor.py:DAQJobMySensor"\ninterval_seconds = 0.02\n'
        '[store_config.csv]\nfile_path = "sensor_data.csv"\n'
    )
    standalone.start()
    standalone.wait_rows("sensor_data.csv", 10)

    def ask(*more: str) -> str:
        arguments = standalone.command("status", *more)
        done = subprocess.run(
            arguments, env=standalone.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    status = json.loads(ask("--json"))
    states = {job["unique_id"]: job["state"] for job in status["jobs"]}
    assert states == dict.fromkeys(("my_sensor", "uplink", "intake", "store_csv"), "RUNNING")
    said = ask()
    assert "my_sensor" in said
    assert "store_csv" in said
    standalone.stop()
