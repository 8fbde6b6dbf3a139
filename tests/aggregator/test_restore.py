from __future__ import annotations

import csv
from pathlib import Path

import pytest
from edgedaq.runtime_dir import InstanceLock
from edgedaq.segments import SegmentLog
from edgedaq.storage import OsStorage
from edgedaq_aggregator.cli import main
from edgedaq_aggregator.journal_registry import StoreRegistry
from edgedaq_aggregator.ledger import read_ledger
from edgedaq_aggregator.stored import find_stored
from edgedaq_aggregator.stores.raw import DAQJobStoreRaw
from edgedaq_aggregator.stores.reader import StorePlace
from edgedaq_aggregator.verify import format_report, verify

from tests.aggregator.stored_feed import StoredFeed
from tests.contract.store_feed import NODE, Feed

BOTH = {"csv": {"file_path": "a.csv"}, "raw": {"file_path": "a.bin"}}


@pytest.fixture
def made(tmp_path: Path, runtime_dir: Path) -> StoredFeed:
    """An aggregator that has run: two streams in two stores, both registered."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "aggregator.toml").write_text(
        f'out_dir = "{tmp_path / "out"}"\nruntime_dir = "{runtime_dir / "c"}"\n'
    )
    (config / "store_csv.toml").write_text('daq_job_type = "DAQJobStoreCSV"\n')
    (config / "store_raw.toml").write_text('daq_job_type = "DAQJobStoreRaw"\n')
    feed = Feed()
    feed.open(1, BOTH)
    feed.pairs(1, 0, 10)
    feed.gap(1, 1, 5, "dropped by policy")
    feed.open(2, BOTH, job="job2")
    feed.pairs(2, 100, 10)
    feed.pairs(1, 15, 10)
    made = StoredFeed(tmp_path / "out")
    made.journal(feed)
    made.store("csv")
    made.store("raw")
    registry = StoreRegistry(made.state_dir / "journal")
    for store in ("store_csv", "store_raw"):
        registry.add(store, 1 << 40)
    registry.save()
    return made


def config_of(made: StoredFeed) -> str:
    return str(made.out_dir.parent / "config")


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_restored_store_has_each_retained_row_once_and_the_old_files_are_kept(made, capsys):
    data = made.out_dir / NODE / "a.csv"
    before = rows(data)
    old = data.read_bytes()
    assert main(["restore", "--config-dir", config_of(made), "store_csv"]) == 0
    assert "as soon as the aggregator runs" in capsys.readouterr().out
    assert data.with_name("a.csv.1.old").read_bytes() == old
    assert not data.exists()
    assert StoreRegistry(made.state_dir / "journal").positions["store_csv"] < 1 << 40
    made.store("csv")
    assert sorted(rows(data)) == sorted(before)
    assert [row[6:10] for row in rows(data.with_name("_marks.csv"))[1:]] == [["gap", "2", "2", "5"]]
    report = verify(find_stored(made.out_dir))
    assert report.is_proven
    assert report.notes == []


def test_files_that_were_lost_are_stored_again(made):
    data = made.out_dir / NODE / "a.bin"
    whole = data.read_bytes()
    data.unlink()
    assert main(["restore", "--config-dir", config_of(made), "store_raw"]) == 0
    made.store("raw")
    assert sorted(whole[at : at + 16] for at in range(0, len(whole), 16)) == sorted(
        data.read_bytes()[at : at + 16] for at in range(0, len(whole), 16)
    )
    assert verify(find_stored(made.out_dir)).is_proven


def test_what_is_older_than_the_journal_becomes_a_mark_also_of_streams_that_have_ended(made):
    feed = Feed()
    for stream in (11, 12, 13):
        feed.open(stream, {"raw": {"file_path": "b.bin"}}, job=f"job{stream}")
    for part in range(5):
        feed.pairs(11, part * 20_000, 20_000)
        feed.pairs(12, part * 20_000, 20_000)
    feed.close(11)
    for part in range(5):
        feed.pairs(13, part * 20_000, 20_000)
    made = StoredFeed(made.out_dir.parent / "more")
    made.journal(feed)
    made.store("raw")
    with SegmentLog(made.state_dir / "journal", segment_bytes=1 << 20, limit_bytes=64 << 20) as log:
        log.trim(log.end)
        assert len(log.sizes()) < 3
    place = StorePlace("store_raw", made.state_dir / "stores" / "store_raw", made.out_dir)
    DAQJobStoreRaw.put_away(place)
    made.store("raw")
    report = verify(find_stored(made.out_dir))
    assert report.is_proven, format_report(report)
    by_job = {row.job: row for row in report.rows}
    assert (by_job["job11"].stored, by_job["job11"].dropped, by_job["job11"].closed) == (0, 100_000, True)
    assert by_job["job12"].dropped == 100_000
    assert 0 < by_job["job13"].stored < 100_000
    assert by_job["job13"].stored + by_job["job13"].dropped == 100_000


def test_a_second_restore_puts_the_first_away_too(made):
    for number in (1, 2):
        assert main(["restore", "--config-dir", config_of(made), "store_csv"]) == 0
        assert (made.out_dir / NODE / f"a.csv.{number}.old").exists()
        made.store("csv")
    assert verify(find_stored(made.out_dir)).is_proven


def test_a_restore_is_refused_while_the_aggregator_runs(made, runtime_dir, capsys):
    with InstanceLock(runtime_dir / "c"):
        assert main(["restore", "--config-dir", config_of(made), "store_csv"]) == 78
    assert "already running as process" in capsys.readouterr().err
    assert (made.out_dir / NODE / "a.csv").exists()


def test_a_store_that_is_not_configured_is_not_restored(made, capsys):
    assert main(["restore", "--config-dir", config_of(made), "store_cvs"]) == 78
    assert "did you mean 'store_csv'" in capsys.readouterr().err


def test_a_forgotten_store_is_in_no_ledger_and_its_last_account_is_kept(made, capsys):
    (made.out_dir.parent / "config" / "store_raw.toml").unlink()
    assert main(["forget", "--config-dir", config_of(made), "store_raw"]) == 0
    assert "it has stored 30 rows of 2 streams" in capsys.readouterr().out
    assert set(StoreRegistry(made.state_dir / "journal").positions) == {"store_csv"}
    assert {row.store for row in read_ledger(made.state_dir)} == {"store_csv", "raw (none)"}
    (kept,) = (made.state_dir / "put_away").iterdir()
    assert "store_raw" in (kept / "ledger.txt").read_text()
    assert (made.out_dir / NODE / "a.bin").exists()
    assert main(["forget", "--config-dir", config_of(made), "store_raw"]) == 78
    assert "no store 'store_raw' is known" in capsys.readouterr().err


def test_a_store_that_is_configured_or_runs_is_not_forgotten(made, capsys):
    assert main(["forget", "--config-dir", config_of(made), "store_raw"]) == 78
    assert "remove it first" in capsys.readouterr().err
    (made.out_dir.parent / "config" / "store_raw.toml").unlink()
    lock = OsStorage().lock(made.state_dir / "stores" / "store_raw" / "lock")
    try:
        assert main(["forget", "--config-dir", config_of(made), "store_raw"]) == 1
    finally:
        OsStorage().close(lock)
    assert "the store runs" in capsys.readouterr().err
    assert "store_raw" in StoreRegistry(made.state_dir / "journal").positions
