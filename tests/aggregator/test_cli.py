from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edgedaq.control import ControlError, request
from edgedaq.runtime_dir import default_runtime_dir
from edgedaq_aggregator import app, cli

ROOT = Path(__file__).resolve().parents[2]
SEED_JOB = """
import time

from edgedaq import DAQJob, DAQJobConfig, DAQJobMessageStoreTabular, DAQJobStoreConfig, StorableDAQJobConfig

class MyJobConfig(StorableDAQJobConfig):
    interval_seconds: float = 1.0

class DAQJobMySensor(DAQJob):
    config_type = MyJobConfig
    config: MyJobConfig

    def start(self):
        while True:
            self._put_message_out(
                DAQJobMessageStoreTabular(
                    store_config=self.config.store_config,
                    keys=["timestamp", "value"],
                    data=[[time.time(), 42.0]],
                )
            )
            time.sleep(self.config.interval_seconds)
"""


def start(*arguments, cwd=None, stdout=subprocess.PIPE):
    places = [ROOT / "common", ROOT / "agent", ROOT / "aggregator"]
    held = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "INVOCATION_ID")}
    return subprocess.Popen(
        [sys.executable, "-m", "edgedaq_aggregator.cli", *map(str, arguments)],
        env={**held, "PYTHONPATH": os.pathsep.join(map(str, places))},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        process_group=0,
    )


def command(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.fixture
def seed_dir(tmp_path):
    """Return the seed's two files: a job, and the store that its data goes to."""
    directory = tmp_path / "my_project"
    directory.mkdir()
    (directory / "my_sensor.py").write_text(SEED_JOB)
    (directory / "my_sensor.toml").write_text(
        'daq_job_type = "my_sensor.py:DAQJobMySensor"\ninterval_seconds = 0.05\n\n'
        '[store_config.csv]\nfile_path = "sensor_data.csv"\nadd_date = true\n'
    )
    (directory / "csv.toml").write_text('daq_job_type = "DAQJobStoreCSV"\n')
    return directory


def wait_for(process, condition, what):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.terminate()
            pytest.fail(f"not within 20 s: {what}\n{process.communicate()}")
        time.sleep(0.05)
    return found


def status_of(runtime_dir):
    try:
        return request(runtime_dir, "status", limit_s=1.0)
    except ControlError:
        return {}


def test_standalone_stores_the_seeds_two_files_and_ends_with_a_ledger_that_balances(seed_dir, tmp_path):
    out_dir = tmp_path / "data"
    process = start("standalone", "--config-dir", seed_dir, "--out", out_dir)
    runtime_dir = default_runtime_dir(seed_dir, app.ROLE)
    files = wait_for(process, lambda: list(out_dir.glob("*/*sensor_data.csv")), "a stored file")
    wait_for(process, lambda: files[0].read_text().count("\n") > 10, "stored rows")
    wait_for(process, (out_dir / "stats_remote.csv").exists, "statistics")
    status, text, _ = command("status", "--config-dir", seed_dir)
    assert status == 0
    assert all(name in text for name in ("my_sensor", "uplink", "intake", "csv"))
    facts = json.loads(command("status", "--config-dir", seed_dir, "--json")[1])
    assert (facts["role"], facts["out_dir"]) == ("standalone", str(out_dir))
    assert facts["ledger"]
    status, text, _ = command("nodes", "--config-dir", seed_dir)
    assert status == 0
    assert facts["node"] in text
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, (out, err)
    assert time.monotonic() - begun < 10
    assert not runtime_dir.exists()
    with files[0].open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["timestamp", "value"]
    assert {float(row[1]) for row in rows[1:]} == {42.0}
    with (out_dir / "stats_remote.csv").open() as file:
        (last,) = [row for row in csv.DictReader(file) if row["supervisor"] == facts["node"]]
    assert int(last["stored_count"]) == int(last["message_in_count"]) >= len(rows) - 1


def test_standalone_goes_on_and_ends_when_nobody_reads_what_it_shows(seed_dir, tmp_path):
    reading, writing = os.pipe()
    process = start("standalone", "--config-dir", seed_dir, "--out", tmp_path / "data", stdout=writing)
    runtime_dir = default_runtime_dir(seed_dir, app.ROLE)
    assert os.read(reading, 7) == b"writing"
    # Opened anew, so that not waiting is this end's alone.
    filling = os.open(f"/proc/self/fd/{writing}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b"." * 65536)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b".")

    def stored():
        nodes = status_of(runtime_dir).get("statistics", {}).get("nodes", [])
        return nodes[-1]["stored_count"] if nodes else 0

    wait_for(process, stored, "stored rows")
    time.sleep(2.5)  # some lines that find no room
    before = stored()
    wait_for(process, lambda: stored() > before, "more stored rows")
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert time.monotonic() - begun < 10
    assert "the ledger is not shown" in err
    for fd in (reading, writing, filling):
        os.close(fd)


def test_standalone_warns_of_a_store_that_is_named_but_absent(seed_dir):
    (seed_dir / "csv.toml").unlink()
    status, _, err = command("check", "--config-dir", seed_dir)
    assert status == 0
    assert "my_sensor.toml: [store_config.csv] needs a store of type DAQJobStoreCSV" in err


def test_run_takes_its_directories_from_its_file(seed_dir, tmp_path, runtime_dir):
    for name in ("my_sensor.toml", "my_sensor.py"):
        (seed_dir / name).unlink()
    (seed_dir / "aggregator.toml").write_text(
        f'supervisor_id = "control-room"\nlisten = "tcp://127.0.0.1:{_free_port()}"\nout_dir = "../stored"\n'
        f'state_dir = "../kept"\nruntime_dir = "{runtime_dir / "r"}"\n'
    )
    process = start("run", "--config-dir", seed_dir)
    wait_for(
        process,
        lambda: [job for job in status_of(runtime_dir / "r").get("jobs", []) if job["state"] == "RUNNING"][
            1:
        ],
        "intake and store run",
    )
    facts = status_of(runtime_dir / "r")
    assert facts["node"] == "control-room"
    assert [job["unique_id"] for job in facts["jobs"]] == ["intake", "csv"]
    wait_for(process, (tmp_path / "stored" / "stats.csv").exists, "statistics")
    process.terminate()
    assert process.wait(10) == 0
    process.communicate()
    assert (tmp_path / "kept" / "journal").is_dir()


def test_status_where_nothing_runs_says_what_to_type(seed_dir):
    for name in ("status", "nodes"):
        status, out, err = command(name, "--config-dir", seed_dir)
        assert (status, out) == (1, "")
        assert f"edgedaq-aggregator run --config-dir {seed_dir}" in err


def test_invite_where_no_node_could_connect_says_which_key_to_edit(seed_dir):
    status, out, err = command("invite", "pi3", "--config-dir", seed_dir)
    assert (status, out) == (78, "")
    assert 'listen must be an address that other machines reach, e.g. "tcp://0.0.0.0:7770"' in err


def test_nodes_are_invited_listed_and_revoked_whether_or_not_it_runs(tmp_path):
    config_dir = tmp_path / "config"
    config_dir.mkdir()
    (config_dir / "aggregator.toml").write_text(
        f'listen = "tcp://0.0.0.0:7770"\nout_dir = "{tmp_path / "out"}"\n'
    )
    where = ("--config-dir", config_dir)
    status, out, _ = command(
        "invite", "pi3", *where, "--topics", "store,stats", "--address", "tcp://hub:7770"
    )
    assert status == 0
    assert "edgedaq-agent join tcp://hub:7770 pi3." in out
    status, out, _ = command("nodes", *where)
    assert status == 0
    assert out.splitlines()[1].split() == ["pi3", "invited", "-", "store", "stats", "never", "-"]
    assert command("revoke", "pi3", *where)[0] == 0
    (row,) = json.loads(command("nodes", *where, "--json")[1])["authorised"]
    assert row["standing"] == "never joined"
    for arguments, text in (
        (("revoke", "pi4"), "has no node 'pi4' (known: pi3)"),
        (("invite", "../x"), "node must be 1 to 63 letters"),
        (("invite", "aggregator"), "the aggregator's own supervisor_id"),
        (("invite", "pi5", "--topics", "a..b"), "a topic must be"),
        (("invite", "pi5", "--expires", "2001-01-01"), "must be in the future"),
        (("invite", "pi5", "--expires", "soon"), "must be a UTC date"),
    ):
        status, _, err = command(*arguments, *where)
        assert status == 78
        assert text in err


def test_help_has_examples_and_says_what_the_exit_status_means(capsys):
    for arguments in (["--help"], ["standalone", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "edgedaq-aggregator standalone" in text
        assert "exit status: 0; 78" in text


def _free_port():
    return int(app._free_endpoint().rpartition(":")[2])
