"""verify, restore and forget beside real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from edgedaq.tables import format_status
from edgedaq_aggregator.reading import open_out

from tests.system.harness import NODE, Side, Site, environment

pytestmark = pytest.mark.timeout(300)


def command(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the aggregator as a user does."""
    line = [sys.executable, "-m", "edgedaq_aggregator.cli", *words]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=60, check=False, env=environment(), cwd=site.root
    )


def verify(site: Site) -> subprocess.CompletedProcess[str]:
    return command(site, "verify", str(site.aggregator_dir))


def test_verify_proves_a_running_aggregator_between_kills_and_names_a_byte_that_was_changed(
    tmp_path: Path, runtime_dir: Path
):
    with Site(tmp_path, runtime_dir) as site:
        site.add_table_job(rate_hz=2000.0)
        site.add_raw_job(payload_bytes=2048, rate_hz=500.0)
        site.aggregator.start()
        site.agent.start()
        for victim in ("csv", "raw", "intake"):
            site.wait_put("table", 500)
            ended = verify(site)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            old_pid = site.aggregator.kill_worker(victim)
            ended = verify(site)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            site.aggregator.wait_replaced(victim, old_pid)
        site.deliver_rest()
        ended = verify(site)
        assert ended.returncode == 0, ended.stdout
        put_count = site.put_count("table") + site.put_count("raw")
        verdict = ended.stdout.splitlines()[-1]
        assert verdict == (
            f"verify: proven, produced {put_count} = stored {put_count} + waiting 0 + dropped 0"
        )
        table = open_out(site.aggregator_dir).read(job="table")
        assert table.num_rows == site.put_count("table")
        for name in ("table.csv", "raw.bin"):
            path = site.node_dir / name
            at = path.stat().st_size // 2
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
            ended = verify(site)
            assert ended.returncode == 1
            assert f"REFUTED, first by {path}: byte {at}" in ended.stdout.splitlines()[-1]
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([byte]))


def test_a_lost_file_is_restored_from_the_journal_while_the_rest_goes_on(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as site:
        site.add_table_job(rate_hz=2000.0)
        site.add_raw_job(payload_bytes=2048, rate_hz=500.0)
        site.aggregator.start()
        site.agent.start()
        site.wait_put("table", 2000)
        ended = command(site, "restore", "--config-dir", str(site.aggregator_dir), "csv")
        assert ended.returncode == 78
        assert "already running as process" in ended.stderr
        site.aggregator.stop()
        (site.node_dir / "table.csv").unlink()
        ended = command(site, "restore", "--config-dir", str(site.aggregator_dir), "csv")
        assert ended.returncode == 0, ended.stderr
        site.aggregator.start()
        site.wait_put("table", 2000)
        site.deliver_rest()
        assert site.judge_table().is_clean, site.judge_table()
        assert site.judge_raw().is_clean
        assert site.judge_table().stored_count == site.put_count("table")
        ended = verify(site)
        assert ended.returncode == 0, ended.stdout


def test_a_store_that_hangs_gets_a_gap_when_the_journal_is_full_and_the_others_miss_nothing(
    tmp_path: Path, runtime_dir: Path
):
    with Site(tmp_path, runtime_dir) as site:
        main = site.aggregator_dir / "aggregator.toml"
        main.write_text(main.read_text() + '[journal]\nsegment = "16 MiB"\nlimit = "64 MiB"\nkeep = 0\n')
        site.add_table_job(limit_count=3000)
        site.aggregator.start()
        stopped = site.aggregator.pid_of("csv")
        os.kill(stopped, signal.SIGSTOP)
        try:
            site.agent.start()
            site.wait_put_count("table", 3000)
            site.agent.stop()
            site.remove_jobs()
            site.add_raw_job(payload_bytes=1 << 16, limit_count=2000)
            site.agent.start()
            site.aggregator.wait(
                lambda: "store_left_behind" in site.aggregator.tail(2000), 90.0, "it is told"
            )
            site.wait_put_count("raw", 2000, 90.0)
        finally:
            os.kill(stopped, signal.SIGCONT)
        ledger = site.deliver_rest()
        assert site.judge_raw().is_clean
        (row,) = [row for row in ledger if row.job == "table"]
        assert (row.produced, row.stored, row.dropped) == (3000, 0, 3000)
        marks = open_out(site.aggregator_dir).marks(job="table")
        assert sum(rows or 0 for rows in marks["rows"].to_pylist()) == 3000
        ended = verify(site)
        assert ended.returncode == 0, ended.stdout


def test_a_store_that_was_removed_is_forgotten_beside_a_running_aggregator(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as site:
        site.add_raw_job(payload_bytes=512, rate_hz=500.0)
        site.aggregator.start()
        site.agent.start()
        site.wait_put("raw", 100)
        ended = command(site, "forget", "--config-dir", str(site.aggregator_dir), "csv")
        assert ended.returncode == 78
        assert "remove it first" in ended.stderr
        (site.aggregator_dir / "csv.toml").unlink()
        ended = command(site, "forget", "--config-dir", str(site.aggregator_dir), "csv")
        assert ended.returncode == 1
        assert "the store runs" in ended.stderr
        site.aggregator.stop()
        site.aggregator.start()
        ended = command(site, "forget", "--config-dir", str(site.aggregator_dir), "csv")
        assert ended.returncode == 0, ended.stderr

        def registered() -> set[str]:
            intake = site.aggregator.jobs().get("intake", {})
            journal = ((intake.get("total") or {}).get("extra") or {}).get("journal") or {}
            return set(journal.get("stores", {"csv"}))

        site.aggregator.wait(lambda: registered() == {"raw"}, 10.0, "only raw is registered")
        site.deliver_rest()
        assert site.judge_raw().is_clean
        assert (site.state_dir / "put_away" / "csv.1" / "ledger.txt").exists()
        assert not (site.node_dir / "table.csv").exists()
        assert NODE in verify(site).stdout


def is_told(side: Side, named: str) -> bool:
    lines = [line for line in side.tail(500).splitlines() if "store.missing" in line]
    return any(f"no store for {named}" in line for line in lines)


def is_shown(side: Side, named: str) -> bool:
    return f"no store for {named}" in format_status(side.status())


def test_data_for_a_store_that_is_not_there_is_kept_and_told_on_both_sides(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as site:
        (site.aggregator_dir / "raw.toml").unlink()
        site.add_raw_job(payload_bytes=512, limit_count=200)
        site.aggregator.start()
        site.agent.start()
        site.wait_put_count("raw", 200)
        for side, named in ((site.agent, "raw (of raw)"), (site.aggregator, f"raw (of {NODE}/raw)")):
            side.wait(partial(is_told, side, named), 10.0, "it is told")
            side.wait(partial(is_shown, side, named), 10.0, "it is shown")
        site.agent.stop()
        site.aggregator.stop()
        site.add_store("raw", "DAQJobStoreRaw")
        site.deliver_rest()
        assert site.judge_raw().is_clean
        assert site.judge_raw().stored_count == 200
