from __future__ import annotations

from pathlib import Path

import pytest
from edgedaq.delivery import StreamTable
from edgedaq.segment_format import Record
from edgedaq.segments import SegmentLog
from edgedaq.storage import OsStorage
from edgedaq_aggregator.ledger import LedgerRow, format_ledger, read_ledger
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.raw import RawFormat

from tests.contract.store_feed import Feed

BOTH = {"csv": {"file_path": "a.csv"}, "raw": {"file_path": "a.bin"}}


@pytest.fixture
def feed() -> Feed:
    feed = Feed()
    feed.open(1, BOTH, tag="left")
    feed.pairs(1, 0, 10)
    feed.gap(1, 2, 5, "dropped by policy")
    feed.pairs(1, 15, 3)
    feed.close(1)
    feed.open(2, {"csv": {"file_path": "b.csv"}}, job="job2")
    feed.pairs(2, 0, 4)
    return feed


def journal(state_dir: Path, feed: Feed) -> None:
    with SegmentLog(
        state_dir / "journal", segment_bytes=1 << 20, limit_bytes=16 << 20, reserve_bytes=0
    ) as log:
        log.append([entry.frame for entry in feed.records if isinstance(entry, Record)])
        log.sync()


def store(state_dir: Path, feed: Feed, file_format: CsvFormat | RawFormat, until: int | None = None) -> None:
    own = state_dir / "stores" / f"store_{file_format.key}"
    backend = FileBackend(file_format, own, state_dir / "out", OsStorage())
    engine = StoreEngine(file_format.key, backend, lambda _: None)
    engine.begin(0, StreamTable())
    engine.take(feed.since(0)[:until])
    engine.commit()()
    backend.close()


def by_stream(rows: list[LedgerRow]) -> dict[tuple[str, str], tuple[int, int, int, int, bool, bool]]:
    return {(row.stream[-1], row.store): tuple(row[6:]) for row in rows}  # type: ignore[misc]


def test_an_aggregator_that_never_ran_has_an_empty_ledger(tmp_path):
    assert read_ledger(tmp_path) == []
    assert format_ledger([]) == "ledger: 0 streams, balanced"


def test_what_is_stored_waiting_and_dropped_adds_up_to_what_was_produced(tmp_path, feed):
    journal(tmp_path, feed)
    store(tmp_path, feed, CsvFormat())
    store(tmp_path, feed, RawFormat(), until=2)
    rows = read_ledger(tmp_path)
    assert by_stream(rows) == {
        ("1", "store_csv"): (18, 13, 0, 5, True, True),
        ("1", "store_raw"): (18, 10, 8, 0, False, True),
        ("2", "store_csv"): (4, 4, 0, 0, False, True),
    }
    assert (rows[0].node, rows[0].job, rows[0].tag, rows[0].life) == ("node1", "job1", "left", f"{1:016x}")
    lines = format_ledger(rows).splitlines()
    assert lines[-1] == "ledger: 2 streams, balanced, 8 rows wait to be stored"
    assert len({line.index("store_csv") for line in lines if "store_csv" in line}) == 1


def test_what_names_a_store_that_is_not_there_waits(tmp_path, feed):
    journal(tmp_path, feed)
    assert by_stream(read_ledger(tmp_path))["2", "csv (none)"] == (4, 0, 4, 0, False, True)


def test_a_loss_that_nothing_speaks_of_does_not_balance(tmp_path, feed):
    journal(tmp_path, feed)
    backend = FileBackend(CsvFormat(), tmp_path / "stores" / "store_csv", tmp_path / "out", OsStorage())
    engine = StoreEngine("csv", backend, lambda _: None)
    engine.begin(0, StreamTable())
    engine.take(feed.since(0))
    engine.table.streams[2].rows -= 1
    engine.commit()()
    backend.close()
    rows = read_ledger(tmp_path)
    assert [row.stream[-1] for row in rows if not row.balances] == ["2"]
    assert "1 do not balance: node1/job2 0000000000000002 in store_csv is off by 1" in format_ledger(rows)


def test_streams_that_the_journal_has_forgotten_stay_in_the_account_of_their_store(tmp_path, feed):
    store(tmp_path, feed, CsvFormat())
    assert by_stream(read_ledger(tmp_path)) == {
        ("1", "store_csv"): (18, 13, 0, 5, True, True),
        ("2", "store_csv"): (4, 4, 0, 0, False, True),
    }


def test_a_long_ledger_sums_up_what_is_complete_and_shows_what_is_not():
    rows = [
        LedgerRow("n", "j", "0" * 16, f"{index:016x}", "", "s", 10, 10, 0, 0, closed=True, balances=True)
        for index in range(1000)
    ]
    rows[3] = rows[3]._replace(waiting=4, stored=6)
    text = format_ledger(rows)
    assert len(text.splitlines()) < 50
    assert f"{3:016x}" in text
    assert "older ones that are complete" in text
    assert text.splitlines()[-1] == "ledger: 1000 streams, balanced, 4 rows wait to be stored"
