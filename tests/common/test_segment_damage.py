"""Damage of every kind to the files of a log: cut, flipped, zeroed, stale, repeated, missing."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

from edgedaq.delivery import StreamTable, Verdict
from edgedaq.frame import Kind, decode, encode, pack_map
from edgedaq.segment_format import Hole, file_name
from edgedaq.segment_gaps import bridge
from edgedaq.segment_reader import SegmentReader
from edgedaq.segments import SegmentLog

from tests.common.log_model import (
    SEGMENT_BYTES,
    QuickStorage,
    close_of,
    frames_in,
    open_of,
    raw_of,
    read_all,
    records_in,
)


def _log(directory: Path, **options) -> SegmentLog:
    options = {"limit_bytes": 1 << 22, "segment_bytes": SEGMENT_BYTES, "storage": QuickStorage(), **options}
    return SegmentLog(directory, **options)


def _make(directory: Path, count: int = 12, body_bytes: int = 60) -> dict[int, bytes]:
    """Return what was written: by position, frames of two streams; closed in order, so that all is proven."""
    with _log(directory) as log:
        log.append([open_of(1), open_of(2)])
        log.sync()
        for seq in range(1, count):
            log.append([raw_of(1, seq, body_bytes)])
            log.append([raw_of(2, seq, body_bytes // 2)])
            log.sync()
        return {one.position: bytes(one.frame.raw) for one in records_in(read_all(directory, 0, log.end))}


def _copy(directory: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in directory.glob("*.seg"):
        shutil.copyfile(path, target / path.name)
    return target


def _check(directory: Path, written: dict[int, bytes], touched: set[int], *, resends: bool = False) -> None:
    """Open a damaged log: what was not touched is there, nothing is invented, absence is explained."""
    with _log(directory, resends=resends) as log:
        entries = read_all(directory, log.begin, log.end)
        with SegmentReader(directory, log.begin) as reader:
            table = reader.table_at_start()
        for frame in frames_in(entries):
            verdict = table.judge(frame)
            if verdict is Verdict.ACCEPT:
                table.apply(frame)
            if bytes(frame.raw) not in set(written.values()):
                assert frame.kind in {Kind.GAP, Kind.CLOSE}
                assert verdict is Verdict.ACCEPT
            else:
                assert verdict is not Verdict.AHEAD
        assert table.snapshot() == log.table.snapshot()
        have = {bytes(frame.raw) for frame in frames_in(entries)}
        lost = [position for position, raw in written.items() if raw not in have]
        assert set(lost) <= touched
        end = log.end
        log.append([open_of(77), raw_of(77, 1)])
        log.sync()
        assert [frame.stream for frame in frames_in(read_all(directory, end, log.end))] == [77, 77]


def _record_at(written: dict[int, bytes], position: int) -> set[int]:
    return {start for start, raw in written.items() if start <= position < start + 24 + len(raw)}


def test_a_segment_cut_at_any_byte_keeps_what_lies_before(tmp_path):
    written = _make(tmp_path / "log", 5)
    only = next((tmp_path / "log").glob("*.seg")).name
    end = max(start + 24 + len(raw) for start, raw in written.items()) + 64
    for size in (*range(0, 4096, 59), *range(4096, end)):
        copy = _copy(tmp_path / "log", tmp_path / "copy")
        os.truncate(copy / only, size)
        _check(copy, written, {start for start, raw in written.items() if start + 24 + len(raw) > size})


def test_any_flipped_bit_costs_at_most_its_own_record(tmp_path):
    written = _make(tmp_path / "log", 8)
    only = next((tmp_path / "log").glob("*.seg")).name
    data = (tmp_path / "log" / only).read_bytes()
    end = max(start + 24 + len(raw) for start, raw in written.items()) + 64
    rng = random.Random(5)
    bits = [*range(8 * 64), *rng.sample(range(8 * 4096, 8 * end), 1200)]
    for bit in bits:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        (tmp_path / "copy").mkdir()
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "copy" / only).write_bytes(damaged)
        _check(tmp_path / "copy", written, _record_at(written, bit // 8), resends=bool(bit & 1))


def test_damage_anywhere_in_a_log_of_many_segments_costs_only_what_it_touched(tmp_path):
    written = _make(tmp_path / "log", 60, 600)
    rng = random.Random(6)
    paths = sorted((tmp_path / "log").glob("*.seg"))
    for _ in range(60):
        copy = _copy(tmp_path / "log", tmp_path / "copy")
        touched = set()
        for _ in range(rng.randint(1, 4)):
            path = copy / rng.choice(paths).name
            data = bytearray(path.read_bytes())
            start = rng.randrange(0 if rng.random() < 0.3 else 4096, SEGMENT_BYTES)
            size = min(rng.choice([1, 8, 200, 3000, 9000]), len(data) - start)
            data[start : start + size] = rng.choice([bytes(size), rng.randbytes(size), data[:size]])
            path.write_bytes(data)
            first = int(path.name[:16], 16)
            touched |= {
                at
                for at, raw in written.items()
                if at < first + start + size and first + start < at + 24 + len(raw)
            }
        _check(copy, written, touched)


def test_a_hole_is_quarantined_reported_and_explained_by_exact_gaps(tmp_path):
    written = _make(tmp_path / "log", 12)
    starts = sorted(written)
    path = next((tmp_path / "log").glob("*.seg"))
    data = bytearray(path.read_bytes())
    lost = starts[6:9]
    for start in lost:
        data[start + 30] ^= 1
    path.write_bytes(data)
    with _log(tmp_path / "log") as log:
        holes = log.recovery.holes
        assert {hole.reason for hole in holes} == {"damaged"}
        assert holes[0].first == lost[0]
        assert len(log.recovery.bad_files) == len(holes)
        bad = log.recovery.bad_files[0]
        assert bad.name == f"{path.name}.{lost[0]:016x}.bad"
        assert bad.read_bytes() == bytes(data[holes[0].first : holes[0].last])
        entries = read_all(log.directory, 0, log.end)
        gaps = [frame for frame in frames_in(entries) if frame.kind is Kind.GAP]
        lost_frames = [decode(memoryview(written[start])) for start in lost]
        gone = {(frame.stream, frame.seq) for frame in lost_frames}
        table = StreamTable()
        told = set()
        for frame in frames_in(entries):
            assert table.judge(frame) is Verdict.ACCEPT
            before = table.expected(frame.stream)
            state = table.apply(frame)
            if frame.kind is Kind.GAP:
                told |= {(frame.stream, seq) for seq in range(before, state.next_seq)}
        assert told == gone
        assert sum(state.gap_rows for state in table.streams.values()) == sum(one.rows for one in lost_frames)
        assert gaps
    with _log(tmp_path / "log") as log:
        assert log.recovery.holes == holes
        assert log.recovery.bad_files == []


def test_frames_and_opens_and_closes_lost_without_a_successor_are_told_at_the_next_segment(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1), raw_of(1, 1)])
        log.append([open_of(2), raw_of(2, 1), raw_of(1, 2), close_of(1, 3)])
        log.append([open_of(3)])
        log.sync()
        seq = 1
        while len(list(log.directory.glob("*.seg"))) < 2:
            log.append([raw_of(3, seq, 1000)])
            seq += 1
        log.sync()
        kept = records_in(read_all(log.directory, 0, log.end))
        end, table = log.end, log.table.snapshot()
    path = tmp_path / "log" / file_name(0)
    data = bytearray(path.read_bytes())
    data[kept[2].position : kept[6].position] = bytes(kept[6].position - kept[2].position)
    path.write_bytes(data)
    found = frames_in(read_all(tmp_path / "log", 0, end))
    assert [(frame.kind, frame.seq) for frame in found if frame.stream == 2] == [
        (Kind.OPEN, 0),
        (Kind.GAP, 1),
    ]
    tail = [(frame.kind, frame.seq) for frame in found if frame.stream == 1]
    assert tail == [(Kind.OPEN, 0), (Kind.RAW, 1), (Kind.GAP, 2), (Kind.CLOSE, 3)]
    with _log(tmp_path / "log") as log:
        assert {row[0]: row[2] for row in log.table.snapshot()} == {row[0]: row[2] for row in table}
        assert set(log.table.tombstones) == {1}


def test_a_lost_segment_is_a_hole_that_says_missing(tmp_path):
    written = _make(tmp_path / "log", 60, 600)
    paths = sorted((tmp_path / "log").glob("*.seg"))
    gone = int(paths[2].name[:16], 16)
    behind = int(paths[3].name[:16], 16)
    paths[2].unlink()
    touched = {position for position in written if gone <= position < behind}
    with _log(tmp_path / "log") as log:
        assert [hole.reason for hole in log.recovery.holes] == ["missing"]
        entries = read_all(log.directory, 0, log.end)
        assert [entry.reason for entry in entries if isinstance(entry, Hole)] == ["missing"]
    _check(tmp_path / "log", written, touched)


def test_a_damaged_header_costs_no_record(tmp_path):
    written = _make(tmp_path / "log", 60, 600)
    for path in sorted((tmp_path / "log").glob("*.seg")):
        copy = _copy(tmp_path / "log", tmp_path / "copy")
        with (copy / path.name).open("r+b") as file:
            file.write(bytes(4096))
        _check(copy, written, set())
        copy = _copy(tmp_path / "log", tmp_path / "copy")
        with (copy / path.name).open("r+b") as file:
            file.write(bytes(4096 + 24))
        _check(copy, written, set())


def test_the_log_of_an_earlier_life_of_the_file_is_not_read(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1)])
        used: dict[str, int] = {}
        for seq in range(1, 400):
            log.append([raw_of(1, seq, 700)])
            log.sync()
            log.trim(log.end - 2 * SEGMENT_BYTES)
            used |= {path.name: path.stat().st_ino for path in log.directory.glob("*.seg")}
        begin, end = log.begin, log.end
        assert len(set(used.values())) < len(used) // 3, "files are used again"
        seqs = [frame.seq for frame in frames_in(read_all(log.directory, begin, end))]
        table = log.table.snapshot()
    assert seqs == list(range(seqs[0], 400))
    with _log(tmp_path / "log") as log:
        assert log.recovery.holes == []
        assert log.table.snapshot() == table
        assert [frame.seq for frame in frames_in(read_all(log.directory, log.begin, log.end))] == seqs


def test_a_segment_copied_to_another_name_is_not_read_twice(tmp_path):
    written = _make(tmp_path / "log", 60, 600)
    paths = sorted((tmp_path / "log").glob("*.seg"))
    shutil.copyfile(paths[1], tmp_path / "log" / file_name(int(paths[-1].name[:16], 16) + (1 << 20)))
    _check(tmp_path / "log", written, set())


def test_what_follows_the_last_valid_record_is_cut_and_its_positions_are_never_used_again(tmp_path):
    written = _make(tmp_path / "log", 6)
    path = next((tmp_path / "log").glob("*.seg"))
    last = max(written)
    data = bytearray(path.read_bytes())
    data[last + 40] ^= 1
    data[last + 24 + len(written[last]) :] = bytes(len(data) - last - 24 - len(written[last]))
    path.write_bytes(data)
    with _log(tmp_path / "log") as log:
        assert log.end == last
        assert log.recovery.holes == []
        assert log.recovery.cut_bytes > 0
        assert path.stat().st_size == last
        old = log.end
        log.append([raw_of(2, log.table.expected(2))])
        log.sync()
        record = records_in(read_all(log.directory, old, log.end))[0]
        assert record.position >= SEGMENT_BYTES
        assert read_all(log.directory, last + 100, log.end)[0].position == record.position


def test_a_journal_is_cut_at_a_hole_that_was_never_reported_durable_and_a_spool_is_not(tmp_path):
    with _log(tmp_path / "log", storage=_Unsynced()) as log:
        log.append([open_of(1), raw_of(1, 1)])
        log.sync()
        log.append([raw_of(1, seq) for seq in range(2, 6)])
        records = records_in(read_all(log.directory, 0, log.end))
        for name in ("spool", "journal"):
            _copy(log.directory, tmp_path / name)
            with (tmp_path / name / file_name(0)).open("r+b") as file:
                file.seek(records[3].position)
                file.write(bytes(24))
    with _log(tmp_path / "spool") as log:
        assert [hole.first for hole in log.recovery.holes] == [records[3].position]
        kinds = [(frame.kind, frame.seq) for frame in frames_in(read_all(log.directory, 0, log.end))]
        assert kinds[2:] == [(Kind.RAW, 2), (Kind.GAP, 3), (Kind.RAW, 4), (Kind.RAW, 5)]
    with _log(tmp_path / "journal", resends=True) as log:
        assert log.recovery.holes == []
        assert log.recovery.cut_records == 2
        assert log.table.expected(1) == 3
        log.append([raw_of(1, seq) for seq in range(3, 6)])
        log.sync()
        seqs = [frame.seq for frame in frames_in(read_all(log.directory, 0, log.end))]
        assert seqs == [0, 1, 2, 3, 4, 5]


def test_a_page_that_cannot_be_read_is_a_hole_and_not_an_end(tmp_path):
    written = _make(tmp_path / "log", 40, 300)
    disk = _BadPages({2, 3})
    with _log(tmp_path / "log", storage=disk) as log:
        assert [hole.reason for hole in log.recovery.holes] == ["damaged"]
        with SegmentReader(log.directory, 0, storage=disk) as reader:
            entries = []
            while got := reader.read(log.end):
                entries += got
        have = {bytes(frame.raw) for frame in frames_in(entries)}
    touched = {at for at, raw in written.items() if at < 4 * 4096 and at + 24 + len(raw) > 2 * 4096}
    assert {at for at, raw in written.items() if raw not in have} <= touched | {
        at for at in written if at >= SEGMENT_BYTES
    }


def test_damage_that_happens_while_the_log_is_read_is_a_hole_for_that_reader(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1), *(raw_of(1, seq, 500) for seq in range(1, 60))])
        log.sync()
        records = records_in(read_all(log.directory, 0, log.end))
        with (log.directory / file_name(0)).open("r+b") as file:
            file.seek(records[9].position + 200)
            file.write(b"damage")
        entries = read_all(log.directory, 0, log.end, 3000)
        seqs = [(frame.kind.name, frame.seq) for frame in frames_in(entries)]
        assert ("GAP", 9) in seqs
        assert [seq for kind, seq in seqs] == list(range(60))
        assert [entry.position for entry in entries if isinstance(entry, Hole)] == [records[9].position]


def test_bridge_brings_a_receiver_to_what_is_known():
    known, mine = StreamTable(), StreamTable()
    for frame in (
        open_of(1),
        raw_of(1, 1),
        raw_of(1, 2),
        open_of(2),
        raw_of(2, 1),
        close_of(2, 2),
        open_of(3),
    ):
        known.apply(frame)
    for frame in (open_of(1), raw_of(1, 1)):
        mine.apply(frame)

    def held(stream):
        state = mine.streams.get(stream)
        return None if state is None else (state.next_seq, state.next_row)

    for frame in bridge(held, known, "trimmed"):
        assert mine.judge(frame) is Verdict.ACCEPT
        mine.apply(frame)
    assert {key: state.next_seq for key, state in mine.streams.items()} == {1: 3, 3: 1}
    assert mine.tombstones[2].next_seq == 3
    assert mine.streams[1].gap_rows == 1
    assert list(bridge(lambda _: (99, 99), known, "trimmed")) == []


def test_a_gap_written_by_a_sender_after_a_hole_is_not_told_twice(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1), raw_of(1, 1), raw_of(1, 2)])
        log.sync()
        records = records_in(read_all(log.directory, 0, log.end))
    with (tmp_path / "log" / file_name(0)).open("r+b") as file:
        file.seek(records[2].position + 8)
        file.write(bytes(40))
    with _log(tmp_path / "log") as log:
        assert log.table.expected(1) == 2
        body = pack_map({"last": 2, "rows": 1, "reason": "the sender no longer has it"})
        log.append([decode(memoryview(encode(Kind.GAP, 1, 2, body, row0=1))), raw_of(1, 3)])
        log.sync()
        kinds = [(frame.kind.name, frame.seq) for frame in frames_in(read_all(log.directory, 0, log.end))]
        assert kinds == [("OPEN", 0), ("RAW", 1), ("GAP", 2), ("RAW", 3)]


class _Unsynced(QuickStorage):
    """Says that it flushed; the copy of its files stands for what a power cut left."""


class _BadPages(QuickStorage):
    """Pages of the first segment that the disk does not read any more."""

    def __init__(self, pages: set[int]) -> None:
        self._pages = pages
        self._bad: set[int] = set()

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        fd = super().open(path, write=write, create=create)
        self._bad.discard(fd)
        if path.name == file_name(0):
            self._bad.add(fd)
        return fd

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        pages = range(offset // 4096, -(-(offset + size_bytes) // 4096))
        if fd in self._bad and not self._pages.isdisjoint(pages):
            raise OSError(errno.EIO, "Input/output error")
        return super().pread(fd, size_bytes, offset)
