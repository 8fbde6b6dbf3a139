from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edgedaq.control import ControlError, request
from edgedaq_agent import cli

ROOT = Path(__file__).resolve().parents[2]
JOB = """
from edgedaq.job import DAQJob

class Quiet(DAQJob):
    def start(self):
        while True:
            self.sleep(0.05)
"""


@pytest.fixture
def config_dir(tmp_path, runtime_dir):
    directory = tmp_path / "configs"
    directory.mkdir()
    (directory / "agent.toml").write_text(
        f'supervisor_id = "n1"\naggregator = "tcp://127.0.0.1:1"\nstate_dir = "../state"\n'
        f'runtime_dir = "{runtime_dir / "r"}"\n'
    )
    (directory / "my.py").write_text(JOB)
    (directory / "quiet.toml").write_text('daq_job_type = "my.py:Quiet"\n')
    return directory


def start(*arguments, **environment):
    places = [ROOT / "common", ROOT / "agent"]
    held = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "INVOCATION_ID")}
    return subprocess.Popen(
        [sys.executable, "-m", "edgedaq_agent.cli", *map(str, arguments)],
        env={**held, "PYTHONPATH": os.pathsep.join(map(str, places)), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def command(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def wait_status(process, runtime_dir, condition):
    deadline = time.monotonic() + 15
    while True:
        try:
            jobs = {job["unique_id"]: job for job in request(runtime_dir, "status", limit_s=1.0)["jobs"]}
        except ControlError:
            jobs = {}
        if jobs and condition(jobs):
            return jobs
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, jobs
        time.sleep(0.03)


@pytest.fixture
def running(config_dir, runtime_dir):
    process = start("run", "--config-dir", config_dir)
    wait_status(process, runtime_dir / "r", lambda jobs: jobs["quiet"]["state"] == "RUNNING")
    yield process
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=20)


def test_check_says_that_nothing_is_wrong_and_starts_and_makes_nothing(config_dir, runtime_dir, tmp_path):
    status, out, err = command("check", "--config-dir", config_dir)
    assert (status, err) == (0, "")
    assert "1 jobs, no mistake found" in out
    assert not (runtime_dir / "r").exists()
    assert not (tmp_path / "state").exists()


def test_the_option_has_the_name_that_it_had_in_enrgdaq_too(config_dir):
    assert command("check", "--daq-job-config-path", config_dir)[0] == 0


def test_check_of_a_directory_without_jobs_warns(config_dir):
    (config_dir / "quiet.toml").unlink()
    status, _, err = command("check", "--config-dir", config_dir)
    assert status == 0
    assert err.startswith("warning: ")
    assert "has no job" in err


def test_status_shows_the_jobs_of_a_running_agent_as_text_and_as_json(running, config_dir):
    status, out, _ = command("status", "--config-dir", config_dir)
    assert status == 0
    assert "quiet" in out
    assert "uplink" in out
    status, out, _ = command("status", "--config-dir", config_dir, "--json")
    facts = json.loads(out)
    assert (status, facts["node"], facts["role"], facts["pid"]) == (0, "n1", "agent", running.pid)
    assert {job["unique_id"]: job["group"] for job in facts["jobs"]} == {
        "quiet": "device",
        "uplink": "uplink",
    }


def test_status_where_nothing_runs_says_what_to_type(config_dir):
    status, out, err = command("status", "--config-dir", config_dir)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "nothing runs" in err
    assert f"edgedaq-agent run --config-dir {config_dir}" in err


def test_a_second_run_is_refused_with_the_pid_of_the_first(running, config_dir):
    status, _, err = command("run", "--config-dir", config_dir)
    assert status == 78
    assert f"already running as process {running.pid}" in err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_end_it_in_order_with_the_aggregator_away(running, runtime_dir, number):
    begun = time.monotonic()
    running.send_signal(number)
    assert running.wait(10) == 0
    assert time.monotonic() - begun < 10
    assert not (runtime_dir / "r").exists()


def test_under_a_service_a_broken_job_is_failed_and_the_others_run(config_dir, runtime_dir):
    (config_dir / "broken.toml").write_text('daq_job_type = "my.py:Quiet"\nbogus = 1\n')
    process = start("run", "--config-dir", config_dir, INVOCATION_ID="x")
    jobs = wait_status(
        process,
        runtime_dir / "r",
        lambda jobs: jobs["quiet"]["state"] == "RUNNING" and ((jobs["uplink"]["total"] or {}).get("extra")),
    )
    assert jobs["broken"]["state"] == "FAILED"
    assert "unknown key 'bogus'" in jobs["broken"]["reason"]
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert {"job.failed", "supervisor.ready", "supervisor.ended"} <= {event["event"] for event in events}


def test_help_has_examples_and_says_what_the_exit_status_means(capsys):
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "edgedaq-agent run" in text
        assert "exit status: 0; 78" in text


def test_a_node_that_has_not_joined_says_what_to_do_and_takes_data_all_the_same(config_dir, runtime_dir):
    main = config_dir / "agent.toml"
    main.write_text(main.read_text().replace("tcp://127.0.0.1:1", "tcp://192.0.2.1:7770"))
    status, out, err = command("check", "--config-dir", config_dir)
    assert (status, "no mistake found" in out) == (0, True)
    assert "aggregator must be an address of this machine alone" in err
    assert "`edgedaq-agent join`" in err
    process = start("run", "--config-dir", config_dir)

    def has_told(jobs):
        extra = ((jobs["uplink"].get("total") or {}).get("extra")) or {}
        return jobs["quiet"]["state"] == "RUNNING" and "as long as this node has no key" in extra.get(
            "reason", ""
        )

    try:
        wait_status(process, runtime_dir / "r", has_told)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
