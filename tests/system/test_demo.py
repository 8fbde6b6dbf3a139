"""The first thing that a newcomer types, as they see it: exit status, files, terminal, what is left."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest

from tests.system.harness import ROOT, environment

BLUE = (0x1F / 255, 0x77 / 255, 0xB4 / 255)
RED = (0xD6 / 255, 0x27 / 255, 0x28 / 255)

STATS = (
    "supervisor,daq_job,is_alive,last_message_in_date,message_in_count,last_message_out_date,message_out_count,"
    "message_in_queue_size,message_out_queue_size,last_restart_date,restart_count,unique_id,state,"
    "message_in_megabytes,message_out_megabytes,dropped_count,put_blocked_s,latency_p50_ms,latency_p95_ms,"
    "latency_p99_ms,cpu_percent,rss_megabytes"
)
STATS_REMOTE = (
    "supervisor,is_alive,last_active,message_in_count,message_in_megabytes,message_out_count,message_out_megabytes,"
    "message_in_mb_per_s,message_out_mb_per_s,stored_count,waiting_count,dropped_count,duplicate_count,gap_count,"
    "latency_p50_ms,latency_p95_ms,latency_p99_ms,spool_megabytes,oldest_unacknowledged_s,jobs_running,jobs_total,"
    "restart_count,cpu_percent,rss_megabytes,clock_offset_ms,clock_error_ms,version"
)

pytestmark = pytest.mark.timeout(120)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgedaq_aggregator.cli", *arguments]


def run_demo(out: Path, seconds: float) -> str:
    arguments = command("demo", "--seconds", str(seconds), "--out", str(out))
    done = subprocess.run(
        arguments, env=environment(), cwd=out.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sequences(paths: list[Path]) -> list[int]:
    found = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            found += [int(row["sequence"]) for row in csv.DictReader(file)]
    return found


def dated(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"????-??-??_{name}"))


def plot(out: Path, pictures: Path) -> None:
    """Run the script of the documentation, and look at what it has drawn."""
    script = [sys.executable, str(ROOT / "docs" / "plots.py"), str(out), str(pictures)]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, colours in (("pulse", [BLUE]), ("temperature", [BLUE, RED])):
        path = pictures / f"{name}.png"
        assert path.stat().st_size < 60_000
        pixels = matplotlib.image.imread(path)[:, :, :3]
        for colour in colours:
            drawn = (abs(pixels - colour).max(axis=2) < 0.05).any(axis=0)
            assert drawn.mean() > 0.5, f"a curve across {path}"


def test_a_demo_and_a_second_one_leave_whole_files_and_a_ledger_that_balances(tmp_path: Path):
    out = tmp_path / "out"
    for lives_count in (1, 2):
        said = run_demo(out, 3)
        assert "ledger" in said.lower() or "balance" in said.lower(), said
        folder = out / "demo-node"
        found = sequences(dated(folder, "test.csv"))
        begins = [number for number, sequence in enumerate(found) if sequence == 0]
        assert len(begins) == lives_count
        for begin, end in zip(begins, [*begins[1:], len(found)], strict=True):
            assert found[begin:end] == list(range(end - begin))
            assert end - begin > 50
        assert dated(folder, "pc_metrics.csv")
        assert dated(folder, "waveforms.bin")[0].stat().st_size > 0
        plot(out, tmp_path / "pictures")
    with (out / "stats.csv").open(newline="", encoding="utf-8") as file:
        jobs = list(csv.reader(file))
    assert ",".join(jobs[0]) == STATS
    assert {"demo-node", "demo-aggregator"} <= {row[0] for row in jobs[1:]}
    with (out / "stats_remote.csv").open(newline="", encoding="utf-8") as file:
        nodes = list(csv.reader(file))
    assert ",".join(nodes[0]) == STATS_REMOTE
    assert nodes[-1][0] == "ALL"
    assert "demo-node" in {row[0] for row in nodes[1:]}


def test_ctrl_c_ends_a_demo_without_an_end_in_order(tmp_path: Path):
    out = tmp_path / "out"
    with (tmp_path / "said.txt").open("w+", encoding="utf-8") as said:
        arguments = command("demo", "--seconds", "0", "--out", str(out))
        process = subprocess.Popen(
            arguments, env=environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            folder = out / "demo-node"
            end = time.monotonic() + 30
            while not (dated(folder, "test.csv") and sequences(dated(folder, "test.csv"))):
                assert time.monotonic() < end
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(20)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        assert status == 0, said.read()
    found = sequences(dated(out / "demo-node", "test.csv"))
    assert found == list(range(len(found)))
