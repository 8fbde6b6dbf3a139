from __future__ import annotations

import csv
import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from edgedaq.errors import ConfigError
from edgedaq.worker_process import worker_environment
from edgedaq_aggregator.demo_configs import NODE, chosen_stores, write_configs
from edgedaq_aggregator.demo_servers import needed
from edgedaq_aggregator.ledger import read_ledger
from edgedaq_aggregator.stats_columns import JOB_COLUMNS, NODE_COLUMNS

RECORD_BYTES = 16 + 2 * 512
DATED = re.compile(r"\d{4}-\d\d-\d\d")


def start(out: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "edgedaq_aggregator.cli",
            "demo",
            "--out",
            str(out),
            "--seconds",
            str(seconds),
        ],
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(demo: subprocess.Popen[str], limit_s: float = 60.0) -> str:
    try:
        output, _ = demo.communicate(timeout=limit_s)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 0, output
    return output


def rows_of(out: Path, name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for path in sorted((out / NODE).glob(f"*{name}")):
        assert DATED.search(path.name), path
        with path.open(newline="") as file:
            found += csv.DictReader(file)
    return found


def lives(sequences: list[int]) -> list[list[int]]:
    """Split at each 0; a hole or a repetition makes a piece that does not count up from 0."""
    found: list[list[int]] = []
    for sequence in sequences:
        if sequence == 0:
            found.append([])
        assert found, sequences[:5]
        found[-1].append(sequence)
    return found


def check_files(out: Path, runs: int) -> int:
    sequences = [int(row["sequence"]) for row in rows_of(out, "test.csv")]
    assert len(lives(sequences)) == runs
    for life in lives(sequences):
        assert life == list(range(len(life)))
    assert len(rows_of(out, "pc_metrics.csv")) >= runs
    events = [int(row["event"]) for row in rows_of(out, "events.csv")]
    waveforms = b"".join(path.read_bytes() for path in sorted((out / NODE).glob("*waveforms.bin")))
    assert len(waveforms) % RECORD_BYTES == 0
    numbers = [struct.unpack_from("<Q", waveforms, at)[0] for at in range(0, len(waveforms), RECORD_BYTES)]
    assert numbers == events
    assert len(lives(events)) == runs
    return len(sequences)


def check_statistics(out: Path, test_rows: int) -> None:
    with (out / "stats.csv").open(newline="") as file:
        jobs = {row["unique_id"]: row for row in csv.DictReader(file)}
    with (out / "stats_remote.csv").open(newline="") as file:
        nodes = {row["supervisor"]: row for row in csv.DictReader(file)}
    assert tuple(jobs["test"]) == JOB_COLUMNS
    assert list(nodes)[-1] == "ALL"
    assert tuple(nodes["ALL"]) == NODE_COLUMNS
    assert int(jobs["test"]["message_out_count"]) <= test_rows
    assert int(jobs["test"]["message_out_count"]) >= test_rows * 0.5
    node = nodes[NODE]
    assert int(node["stored_count"]) > test_rows
    assert int(node["message_in_count"]) == int(node["stored_count"])
    assert (node["waiting_count"], node["dropped_count"], node["gap_count"]) == ("0", "0", "0")


def test_a_demo_and_one_that_is_interrupted_leave_continued_files_statistics_and_a_balanced_ledger(tmp_path):
    out = tmp_path / "out"
    assert "writing to" in finish(start(out, 3))
    check_statistics(out, check_files(out, 1))
    first = {path: path.read_bytes() for path in (out / NODE).iterdir() if not path.name.startswith("_")}
    demo = start(out, 0)
    assert demo.stdout is not None
    stored = [0]
    while len(stored) < 2 or stored[-1] == stored[1]:
        line = demo.stdout.readline()
        assert line, "the demo has ended"
        stored += [int(count) for count in re.findall(r"(\d+) stored", line)]
    os.kill(demo.pid, signal.SIGINT)
    finish(demo)
    check_files(out, 2)
    for path, content in first.items():
        assert path.read_bytes().startswith(content)
    ledger = read_ledger(out / ".state")
    assert ledger
    assert all(row.balances and row.closed and row.waiting == 0 for row in ledger)


def test_a_demo_interrupted_while_it_starts_leaves_nothing_behind(tmp_path):
    demo = start(tmp_path, 0)
    assert demo.stdout is not None
    assert "writing to" in demo.stdout.readline()
    time.sleep(0.3)
    os.kill(demo.pid, signal.SIGTERM)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode in (0, 1), output
    assert "Traceback" not in output


def test_a_demo_that_is_killed_leaves_no_process_behind_and_nothing_half_done(tmp_path):
    demo = start(tmp_path / "out", 0)
    assert demo.stdout is not None
    while not (line := demo.stdout.readline()) or not re.search(r"[1-9]\d* stored", line):
        assert line, "the demo has ended"
    started = psutil.Process(demo.pid).children(recursive=True)
    assert len(started) >= 8
    demo.kill()
    demo.communicate(timeout=10)
    _, alive = psutil.wait_procs(started, timeout=12)
    assert not alive
    finish(start(tmp_path / "out", 2))
    check_files(tmp_path / "out", 2)


def test_the_demos_configurations_meet_each_other(tmp_path):
    aggregator, agent = write_configs(tmp_path, 7123, ("csv", "raw"), {})
    assert "tcp://127.0.0.1:7123" in (aggregator / "aggregator.toml").read_text()
    assert "tcp://127.0.0.1:7123" in (agent / "agent.toml").read_text()
    assert io.StringIO((agent / "agent.toml").read_text()).readline() == f'supervisor_id = "{NODE}"\n'


def test_a_store_that_is_wanted_no_more_is_taken_out_of_both_directories(tmp_path):
    write_configs(tmp_path, 7123, ("csv", "raw", "redis"), {"redis": tmp_path / 'a "quoted" place'})
    aggregator, agent = write_configs(tmp_path, 7123, ("sqlite",), {})
    assert [path.name for path in aggregator.glob("store_*")] == ["store_sqlite.toml"]
    for path in agent.glob("*.toml"):
        assert not re.search(r"store_config\.(csv|raw|redis)", path.read_text()), path


def test_stores_are_named_in_any_order_and_all_is_every_one():
    assert chosen_stores(" raw, csv,csv") == ("csv", "raw")
    assert {"csv", "raw", "sqlite", "parquet", "mysql", "redis"} <= set(chosen_stores("all"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cvs,raw", "did you mean 'csv'"),
        ("raw", "one for tables"),
        ("", "stores must be of"),
        ("csv,", "got ''"),
    ],
)
def test_a_list_of_stores_that_cannot_be_is_refused_with_what_can(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen_stores(text)


@pytest.mark.parametrize(("key", "package"), [("mysql", "mariadb-server"), ("redis", "redis-server")])
def test_a_server_that_is_not_installed_is_told_with_the_command_that_installs_it(tmp_path, key, package):
    assert f"sudo apt install {package}" in needed(key, str(tmp_path))
