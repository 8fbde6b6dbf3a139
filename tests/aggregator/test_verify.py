from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from edgedaq.schema import pack_rows
from edgedaq.storage import OsStorage
from edgedaq_aggregator.cli import main
from edgedaq_aggregator.reading import open_out
from edgedaq_aggregator.stored import find_stored
from edgedaq_aggregator.stores.commits import Change, CommitLog
from edgedaq_aggregator.stores.ranges import RANGES_NAME
from edgedaq_aggregator.verify import Report, format_report, verify

from tests.aggregator.stored_feed import StoredFeed
from tests.contract.store_feed import DAY_NS, NODE, PAIR, T0_NS, Feed

BOTH = {"csv": {"file_path": "a.csv"}, "raw": {"file_path": "a.bin"}}


def check(out_dir: Path) -> Report:
    return verify(find_stored(out_dir))


@pytest.fixture
def made(tmp_path: Path) -> StoredFeed:
    """Two streams that take turns in a file, a third one behind them, a gap, two lives of each store."""
    feed = Feed()
    made = StoredFeed(tmp_path / "out")
    feed.open(1, BOTH)
    feed.open(2, BOTH, job="job2")
    for part in range(6):
        feed.pairs(1, part * 10, 10)
        feed.pairs(2, 1000 + part * 10, 10)
    feed.gap(1, 2, 5, "dropped by policy")
    feed.pairs(1, 65, 10)
    made.journal(feed)
    made.store("csv")
    made.store("raw")
    feed.close(1)
    feed.open(3, BOTH)
    feed.pairs(3, 0, 10)
    made.journal(feed)
    made.store("csv")
    made.store("raw")
    return made


def test_a_clean_run_is_proven(made, capsys):
    report = check(made.out_dir)
    assert report.is_proven
    assert (report.problems, report.notes) == ([], [])
    assert main(["verify", str(made.out_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "verify: proven, produced 290 = stored 280 + waiting 0 + dropped 10"
    )


def test_what_waits_is_counted_in_the_journal(made):
    feed = Feed()
    feed.open(7, BOTH)
    feed.pairs(7, 0, 10)
    feed.pairs(7, 10, 10)
    feed.gap(7, 1, 3, "dropped by policy")
    fresh = StoredFeed(made.out_dir.parent / "fresh")
    fresh.journal(feed)
    fresh.store("csv", until=2)
    report = check(fresh.out_dir)
    assert report.is_proven
    (csv_row, raw_row) = report.rows
    assert (csv_row.produced, csv_row.stored, csv_row.waiting, csv_row.dropped) == (23, 10, 13, 0)
    assert (raw_row.store, raw_row.waiting) == ("raw (none)", 23)


@pytest.mark.parametrize("name", ["a.csv", "a.bin", "_marks.csv"])
def test_a_changed_byte_anywhere_is_named_with_its_file_and_place(made, name):
    path = made.out_dir / NODE / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        report = check(made.out_dir)
        assert report.problems, at
        where, place, _ = report.problems[0]
        assert where == str(path)
        if name == "_marks.csv":
            assert place == f"bytes 0 to {len(whole)}"
        else:
            line = whole.count(b"\n", 0, at) + 1
            assert place == (f"byte {at}, line {line}" if name == "a.csv" else f"byte {at}")
    path.write_bytes(whole)
    assert check(made.out_dir).is_proven


def test_a_removed_row_is_named_with_its_file_line_stream_and_number(made):
    path = made.out_dir / NODE / "a.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        where, place, what = check(made.out_dir).problems[0]
        sequence = int(lines[number].split(b",")[0])
        after = lines[number + 1] if number + 1 < len(lines) else b""
        same = next(
            (at for at, (a, b) in enumerate(zip(lines[number], after, strict=False)) if a != b), len(after)
        )
        begin = sum(map(len, lines[:number]))
        assert where == str(path)
        assert place == f"byte {begin + same}, line {number + 1}"
        stream = 2 if sequence >= 1000 else 3 if number > 130 else 1
        assert f"stream {stream:016x}" in what, (number, what)
        assert f"row {sequence % 1000} of" in what


def test_a_message_removed_from_a_raw_file_is_named(made):
    path = made.out_dir / NODE / "a.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:480] + whole[496:])
    where, place, what = check(made.out_dir).problems[0]
    assert where == str(path)
    assert place == "byte 480"
    assert f"row 10 of stream {2:016x}" in what


def test_a_file_cut_at_its_end_is_named(made):
    path = made.out_dir / NODE / "a.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert check(made.out_dir).problems[0][:2] == (str(path), f"byte {len(whole) - 1}")


def test_a_damaged_place_older_than_the_journal_is_named_with_its_block(made):
    path = made.out_dir / NODE / "a.csv"
    whole = path.read_bytes()
    shutil.rmtree(made.state_dir / "journal")
    assert check(made.out_dir).is_proven
    path.write_bytes(whole.replace(b"1005,", b"1006,"))
    (problem,) = check(made.out_dir).problems
    assert problem.where == str(path)
    assert problem.place.startswith("bytes 0 to ")


def test_a_file_that_is_not_there_is_told_and_refutes_only_on_request(made, capsys):
    (made.out_dir / NODE / "a.csv").unlink()
    report = check(made.out_dir)
    assert not report.problems
    assert report.away_rows == 140
    assert main(["verify", str(made.out_dir)]) == 1
    assert "140 rows are in files that are not here" in capsys.readouterr().out
    assert main(["verify", str(made.out_dir), "--moved-ok"]) == 0


def test_rows_that_nothing_speaks_of_are_refuted_though_every_file_is_whole(made):
    own = made.state_dir / "stores" / "store_csv"
    log = CommitLog(own, "csv", OsStorage())
    account = log.state.table.streams[2]
    account.rows += 1
    account.next_row += 1
    log.append(Change(log.state.position, accounts=[account], clean=True))
    log.close()
    text = format_report(check(made.out_dir))
    assert "61 rows were committed, 60 are recorded" in text
    assert text.splitlines()[-1].startswith("verify: REFUTED, first by store_csv: stream")


def test_a_mark_that_was_never_written_is_refuted(made):
    own = made.state_dir / "stores" / "store_csv"
    log = CommitLog(own, "csv", OsStorage())
    account = log.state.table.streams[2]
    account.gap_rows += 4
    account.next_row += 4
    log.append(Change(log.state.position, accounts=[account], clean=True))
    log.close()
    problems = check(made.out_dir).problems
    assert any("4 rows were dropped, its marks say 0" in problem.what for problem in problems)


def test_a_flip_in_the_journal_before_what_waits_is_named_with_its_segment(tmp_path):
    feed = Feed()
    feed.open(1, BOTH)
    for part in range(8):
        feed.pairs(1, part * 10, 10)
    made = StoredFeed(tmp_path / "out")
    made.journal(feed)
    made.store("csv", until=3)
    (segment,) = (made.state_dir / "journal").glob("*.seg")
    image = bytearray(segment.read_bytes())
    body = pack_rows(PAIR, [(40 + n, (40 + n) / 4) for n in range(10)])
    at = bytes(image).index(body)
    image[at + 3] ^= 4
    segment.write_bytes(image)
    report = check(made.out_dir)
    assert report.problems[0].where == str(segment)
    first, _, last = report.problems[0].place.removeprefix("bytes ").partition(" to ")
    assert int(first) <= at + 3 < int(last)


def test_a_damaged_log_of_blocks_never_refutes_files_that_are_whole(made):
    path = made.state_dir / "stores" / "store_csv" / RANGES_NAME
    whole = path.read_bytes()
    for at in range(0, len(whole), 11):
        image = bytearray(whole)
        image[at] ^= 0x20
        path.write_bytes(image)
        report = check(made.out_dir)
        assert not report.problems, (at, report.problems)
    for cut in range(0, len(whole), 13):
        path.write_bytes(whole[:cut])
        assert not check(made.out_dir).problems


def test_dates_compression_overwriting_and_many_streams_are_proven_too(tmp_path):
    made = StoredFeed(tmp_path / "out")
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "d.csv", "add_date": True}})
    feed.open(2, {"csv": {"file_path": "z.csv", "use_zstd": True}})
    feed.open(3, {"csv": {"file_path": "o.csv", "overwrite": True}})
    for part in range(4):
        for stream in (1, 2, 3):
            feed.pairs(stream, part * 10, 10, T0_NS + part * DAY_NS // 2)
    feed.open(4, {"csv": {"file_path": "o.csv", "overwrite": True}})
    feed.pairs(4, 0, 10)
    for stream in range(100, 300):
        feed.open(stream, {"csv": {"file_path": "many.csv"}})
        feed.pairs(stream, stream, 1)
    made.journal(feed)
    made.store("csv", per_commit=7)
    assert check(made.out_dir).problems == []
    path = made.out_dir / NODE / "2026-05-02_d.csv"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    assert check(made.out_dir).problems[0][:2] == (
        str(path),
        f"byte {len(whole) - 3}, line {whole.count(10)}",
    )


def test_a_file_moved_away_while_the_store_runs_is_told_and_the_rest_is_proven(tmp_path):
    made = StoredFeed(tmp_path / "out")
    feed = Feed()
    feed.open(1, BOTH)
    feed.pairs(1, 0, 10)
    made.journal(feed)
    made.store("csv")
    data = made.out_dir / NODE / "a.csv"
    data.rename(data.with_name("archived.csv"))
    feed.pairs(1, 10, 10)
    made.journal(feed)
    made.store("csv")
    report = check(made.out_dir)
    assert report.problems == []
    assert report.away_rows == 10
    data.unlink()
    data.with_name("archived.csv").rename(data)
    report = check(made.out_dir)
    assert report.problems


def test_a_directory_that_is_none_is_refused_with_words(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 78
    assert "neither a directory of TOML files nor an out_dir" in capsys.readouterr().err


def test_files_that_rotate_by_size_are_proven_and_a_byte_in_the_second_is_named(tmp_path):
    made = StoredFeed(tmp_path / "out")
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "r.csv", "rotate_size": 1 << 20}})
    for part in range(12):
        feed.pairs(1, part * 20_000, 20_000)
    made.journal(feed)
    made.store("csv", per_commit=1)
    report = check(made.out_dir)
    assert report.is_proven, format_report(report)
    assert pairs_of(made.out_dir) == list(range(240_000))
    path = made.out_dir / NODE / "r.2.csv"
    whole = bytearray(path.read_bytes())
    at = len(whole) // 2
    whole[at] ^= 1
    path.write_bytes(whole)
    where, place, _ = check(made.out_dir).problems[0]
    assert (where, place.partition(",")[0]) == (str(path), f"byte {at}")


def pairs_of(out_dir: Path) -> list[int | None]:
    return open_out(out_dir).read()["sequence"].to_pylist()
