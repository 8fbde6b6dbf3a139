from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from edgedaq.errors import ConfigError, WireError
from edgedaq.frame import Kind, decode
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_reader import SegmentReader, read_table
from edgedaq.segment_recovery import recover
from edgedaq.segments import LogError, LogFull, SegmentLog
from edgedaq.storage import OsStorage

from tests.common.log_model import SEGMENT_BYTES, QuickStorage, close_of, frames_in, open_of, raw_of, read_all


def _log(directory: Path, **options) -> SegmentLog:
    options = {"limit_bytes": 1 << 20, "segment_bytes": SEGMENT_BYTES, "storage": QuickStorage(), **options}
    return SegmentLog(directory, **options)


def _raws(entries) -> list[bytes]:
    return [bytes(frame.raw) for frame in frames_in(entries)]


def _fill(log: SegmentLog, count: int, *, stream: int = 1, body_bytes: int = 1000) -> list[bytes]:
    frames = [open_of(stream), *(raw_of(stream, seq, body_bytes) for seq in range(1, count))]
    for frame in frames:
        log.append([frame])
    log.sync()
    return [bytes(frame.raw) for frame in frames]


def test_what_was_appended_is_read_in_order_across_segments_and_after_a_restart(tmp_path):
    with _log(tmp_path / "log") as log:
        raws = _fill(log, 60)
        assert log.durable == log.end
        assert _raws(read_all(log.directory, log.begin, log.end)) == raws
        assert _raws(read_all(log.directory, log.begin, log.end, 4096)) == raws
        end, table = log.end, log.table.snapshot()
    with _log(tmp_path / "log") as log:
        assert log.recovery.kept_records == 60
        assert log.recovery.holes == []
        assert log.recovery.cut_bytes == 0
        assert log.table.snapshot() == table
        assert log.end >= end
        assert _raws(read_all(log.directory, log.begin, log.end)) == raws


def test_a_reader_goes_on_where_any_record_ended(tmp_path):
    with _log(tmp_path / "log") as log:
        raws = _fill(log, 40)
        for at, entry in enumerate(read_all(log.directory, log.begin, log.end)):
            assert _raws(read_all(log.directory, entry.end, log.end)) == raws[at + 1 :]


def test_a_reader_goes_only_as_far_as_it_is_told(tmp_path):
    with _log(tmp_path / "log") as log:
        raws = _fill(log, 20)
        records = read_all(log.directory, log.begin, log.end)
        with SegmentReader(log.directory, log.begin) as reader:
            found = []
            for entry in records:
                while got := reader.read(entry.end):
                    found += _raws(got)
                assert reader.position == entry.end
        assert found == raws


def test_the_account_at_any_position_is_that_of_the_records_before_it(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1), open_of(2)])
        for seq in range(1, 25):
            log.append([raw_of(1, seq, 900), raw_of(2, seq, 50)])
        log.append([close_of(2, 25)])
        records = read_all(log.directory, log.begin, log.end)
        for at, entry in enumerate(records):
            with SegmentReader(log.directory, entry.end) as reader:
                table = reader.table_at_start()
            fed = frames_in(records[: at + 1])
            assert table.expected(1) == 1 + max(frame.seq for frame in fed if frame.stream == 1)
            if any(frame.kind is Kind.CLOSE for frame in fed):
                assert 2 in table.tombstones
        assert read_table(log.directory).snapshot() == log.table.snapshot()


def test_trimming_gives_back_whole_segments_and_their_files_are_used_again(tmp_path):
    with _log(tmp_path / "log") as log:
        _fill(log, 200)
        disk_bytes = log.disk_bytes
        begin = log.trim(log.end - 3000)
        assert begin == log.begin
        assert log.end - 3000 - SEGMENT_BYTES < begin <= log.end - 3000
        log.sync()
        log.append([raw_of(1, 200)])
        log.sync()
        assert log.disk_bytes < disk_bytes
        inodes = {path.stat().st_ino for path in log.directory.glob("*.free")}
        assert inodes
        for seq in range(201, 240):
            log.append([raw_of(1, seq, 1000)])
            log.sync()
        assert inodes & {path.stat().st_ino for path in log.directory.glob("*.seg")}
        found = frames_in(read_all(log.directory, log.begin, log.end))
        assert found[-1].seq == 239
        assert [frame.seq for frame in found] == list(range(found[0].seq, 240))


def test_only_what_is_durable_is_trimmed(tmp_path):
    with _log(tmp_path / "log") as log:
        for frame in (open_of(1), *(raw_of(1, seq, 2000) for seq in range(1, 30))):
            log.append([frame])
        assert log.trim(log.end) == 0
        log.sync()
        assert log.trim(log.end) > 0


def test_a_reader_whose_segments_are_trimmed_says_so_and_goes_on_at_the_begin(tmp_path):
    with _log(tmp_path / "log") as log:
        _fill(log, 100)
        with SegmentReader(log.directory, log.begin) as reader:
            assert reader.read(log.end, 2000)
            stopped = reader.position
            log.trim(log.end)
            log.sync()
            for seq in range(100, 200):
                log.append([raw_of(1, seq, 1000)])
                log.sync()
                log.trim(log.end)
            entries = []
            while got := reader.read(log.end):
                entries += got
        holes = [entry for entry in entries if isinstance(entry, Hole)]
        assert [hole.reason for hole in holes] == ["trimmed"]
        assert holes[0].first >= stopped
        assert holes[0].table is not None
        seqs = [frame.seq for frame in frames_in(entries)]
        behind = [frame.seq for frame in frames_in(entries[entries.index(holes[0]) :])]
        assert behind[0] == holes[0].table.expected(1)
        assert behind == list(range(behind[0], 200))
        assert seqs == sorted(set(seqs))


def test_a_second_writer_is_refused_in_words(tmp_path):
    with _log(tmp_path / "log"), pytest.raises(LogError, match="another process"):
        _log(tmp_path / "log")


def test_limits_that_contradict_each_other_are_refused(tmp_path):
    for options in ({"segment_bytes": 5000}, {"segment_bytes": 1024}, {"limit_bytes": SEGMENT_BYTES}):
        with pytest.raises(ConfigError, match="got"):
            _log(tmp_path / "log", **options)


def test_a_full_log_says_how_many_frames_it_took_and_takes_more_after_trimming(tmp_path):
    with _log(tmp_path / "log", limit_bytes=4 * SEGMENT_BYTES) as log:
        frames = [open_of(1), *(raw_of(1, seq, 1000) for seq in range(1, 200))]
        assert log.would_fit(1000)
        with pytest.raises(LogFull, match="limit") as caught:
            log.append(frames)
        kept = caught.value.kept
        assert 0 < kept < 200
        assert not log.would_fit(20_000)
        assert log.table.expected(1) == frames[kept].seq
        log.sync()
        assert _raws(read_all(log.directory, log.begin, log.end)) == [bytes(one.raw) for one in frames[:kept]]
        log.trim(log.end)
        assert log.would_fit(10_000)
        log.append(frames[kept : kept + 10])
        assert log.table.expected(1) == frames[kept + 10].seq


def test_a_frame_larger_than_a_segment_gets_one_that_is_large_enough(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1), raw_of(1, 1, 100_000), raw_of(1, 2)])
        log.sync()
        assert [frame.seq for frame in frames_in(read_all(log.directory, log.begin, log.end))] == [0, 1, 2]


def test_many_small_frames_go_in_one_append(tmp_path):
    with _log(tmp_path / "log", limit_bytes=8 << 20, segment_bytes=1 << 20) as log:
        frames = [open_of(1), *(raw_of(1, seq, 16) for seq in range(1, 5000))]
        log.append(frames)
        assert _raws(read_all(log.directory, log.begin, log.end)) == [bytes(frame.raw) for frame in frames]


def test_the_cursor_is_found_again(tmp_path):
    with _log(tmp_path / "log") as log:
        _fill(log, 3)
        log.save_cursor({"at": 1})
        log.save_cursor({"at": 2})
    for _ in range(2):
        with _log(tmp_path / "log") as log:
            assert log.cursor == {"at": 2}


def test_a_new_log_begins_where_it_is_told_and_an_old_one_where_it_was(tmp_path):
    with _log(tmp_path / "log", first_position=1 << 40) as log:
        assert log.begin == log.end == log.durable == 1 << 40
        raws = _fill(log, 3)
    with _log(tmp_path / "log", first_position=1 << 50) as log:
        assert log.begin == 1 << 40
        assert _raws(read_all(log.directory, 0, log.end)) == raws


def test_a_frame_that_is_not_what_its_kind_says_is_told_and_does_not_harm_the_log(tmp_path):
    with _log(tmp_path / "log") as log:
        log.append([open_of(1)])
        with pytest.raises(WireError, match="never opened"):
            log.append([raw_of(2, 1), raw_of(1, 1)])
        assert log.table.expected(1) == 2
        log.append([raw_of(1, 2)])


class _FailingDisk(QuickStorage):
    """Fails where it is told to."""

    def __init__(self) -> None:
        self.flush_failures = 0
        self.write_limit: int | None = None
        self.can_create = True

    def fdatasync(self, fd: int) -> None:  # noqa: ARG002
        if self.flush_failures:
            self.flush_failures -= 1
            raise OSError(errno.EIO, "Input/output error")

    def pwritev(self, fd, buffers, offset):
        if self.write_limit is None:
            return super().pwritev(fd, buffers, offset)
        data = b"".join(buffers)[: self.write_limit]
        self.write_limit -= len(data)
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, [data], offset)

    def preallocate(self, fd, size_bytes):
        if not self.can_create:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().preallocate(fd, size_bytes)


def test_a_failed_fdatasync_is_final_for_its_file_and_nothing_is_lost(tmp_path):
    disk = _FailingDisk()
    with _log(tmp_path / "log", storage=disk) as log:
        raws = _fill(log, 5)
        before = {path.name for path in log.directory.glob("*.seg")}
        durable = log.durable
        frames = [raw_of(1, seq, 3000) for seq in range(5, 15)]  # over several segments
        promised = [log.append([frame]) for frame in frames]
        disk.flush_failures = 1
        with pytest.raises(LogError, match="fdatasync failed"):
            log.sync()
        assert log.durable == durable
        last = raw_of(1, 15)
        log.append([last])
        assert log.sync() > max(promised)
        after = {path.name for path in log.directory.glob("*.seg")}
        assert len(after - before) >= 1
        raws += [bytes(frame.raw) for frame in (*frames, last)]
        entries = read_all(log.directory, log.begin, log.end)
        assert _raws(entries) == raws
        assert not [entry for entry in entries if isinstance(entry, Hole)]
        table = log.table.snapshot()
    with _log(tmp_path / "log") as log:
        assert log.table.snapshot() == table
        assert _raws(read_all(log.directory, log.begin, log.end)) == raws


def test_a_disk_that_keeps_failing_takes_nothing_new_and_promises_nothing(tmp_path):
    disk = _FailingDisk()
    with _log(tmp_path / "log", storage=disk) as log:
        raws = _fill(log, 3)
        durable = log.durable
        log.append([raw_of(1, 3)])
        disk.flush_failures = 1
        disk.can_create = False
        disk.write_limit = 0
        for _ in range(3):
            with pytest.raises(LogError):
                log.sync()
            with pytest.raises(LogError, match="waits for a disk"):
                log.append([raw_of(1, 4)])
            assert not log.would_fit(1)
            assert log.durable == durable
        disk.can_create = True
        disk.write_limit = None
        log.sync()
        log.append([raw_of(1, 4)])
        log.sync()
        raws += [bytes(raw_of(1, seq).raw) for seq in (3, 4)]
        assert _raws(read_all(log.directory, log.begin, log.durable)) == raws


@pytest.mark.parametrize("taken", [0, 1, 23, 24, 100, 500, 1187, 1188, 3000])
def test_a_write_cut_off_by_a_full_disk_leaves_no_trace_and_is_overwritten(tmp_path, taken):
    disk = _FailingDisk()
    with _log(tmp_path / "log", storage=disk, limit_bytes=1 << 22, segment_bytes=1 << 20) as log:
        raws = _fill(log, 3)
        end = log.end
        disk.write_limit = taken
        with pytest.raises(LogFull) as caught:
            log.append([raw_of(1, seq, 1100) for seq in range(3, 8)])
        disk.write_limit = None
        assert caught.value.kept == 0
        assert log.end == end
        assert log.table.expected(1) == 3
        other = raw_of(1, 3, 50)
        log.append([other])
        log.sync()
        raws.append(bytes(other.raw))
        assert _raws(read_all(log.directory, log.begin, log.end)) == raws
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in log.directory.glob("*.seg"):
            (copy / path.name).write_bytes(path.read_bytes())
    with _log(copy, limit_bytes=1 << 22, segment_bytes=1 << 20) as log:
        assert _raws(read_all(copy, log.begin, log.end)) == raws
        assert log.table.expected(1) == 4


def test_a_log_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="cannot be opened"):
        _log(tmp_path / "file" / "log")


def test_append_and_sync_work_at_the_same_time_over_many_segments(tmp_path):
    with _log(tmp_path / "log", limit_bytes=16 << 20, storage=OsStorage()) as log:
        stop = threading.Event()
        seen: list[int] = []

        def keep_syncing():
            while not stop.is_set():
                seen.append(log.sync())

        thread = threading.Thread(target=keep_syncing)
        thread.start()
        try:
            log.append([open_of(1)])
            for seq in range(1, 3000, 5):
                log.append([raw_of(1, seq + more, 500) for more in range(5)])
                if seq % 50 == 1:
                    log.trim(log.durable - 100_000)
        finally:
            stop.set()
            thread.join()
        assert seen == sorted(seen)
        log.sync()
        seqs = [frame.seq for frame in frames_in(read_all(log.directory, log.begin, log.durable))]
        assert seqs == list(range(seqs[0], 3001))


_WRITER = """
import sys
from pathlib import Path
from edgedaq.segments import SegmentLog
from tests.common.log_model import SEGMENT_BYTES, open_of, raw_of
log = SegmentLog(Path(sys.argv[1]), limit_bytes=1 << 26, segment_bytes=SEGMENT_BYTES)
seq = log.table.expected(1)
while True:
    log.append([open_of(1)] if seq == 0 else [raw_of(1, seq, 700)])
    seq += 1
    if seq % 7 == 0:
        log.sync()
    print(seq, flush=True)
"""


def test_a_writer_that_is_killed_again_and_again_loses_nothing_that_append_returned_for(tmp_path):
    directory = tmp_path / "log"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'common'}:{root}"}
    told = 0
    for _ in range(4):
        command = [sys.executable, "-c", _WRITER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            assert writer.stdout is not None
            for _ in range(60):
                told = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            told = max([told, *(int(line) for line in writer.stdout.read().split("\n") if line.strip())])
        assert writer.returncode == -signal.SIGKILL
    with _log(directory, limit_bytes=1 << 26) as log:
        frames = frames_in(read_all(directory, log.begin, log.end))
        seqs = [frame.seq for frame in frames]
        assert seqs == list(range(len(seqs)))
        assert len(seqs) >= told
        assert all(bytes(frame.raw) == bytes(raw_of(1, frame.seq, 700).raw) for frame in frames[1:])
        assert log.table.expected(1) == len(seqs)


def test_a_log_can_be_moved_and_read_by_another_process_while_it_is_written(tmp_path):
    with _log(tmp_path / "log") as log:
        raws = _fill(log, 30)
        table = read_table(log.directory)
        assert table.snapshot() == log.table.snapshot()
        assert decode(memoryview(table.streams[1].open_raw)).kind is Kind.OPEN
        records = read_all(log.directory, log.begin, log.durable)
        assert all(isinstance(entry, Record) for entry in records)
        assert _raws(records) == raws


def test_a_log_of_more_segments_than_a_process_may_open_files_is_recovered_whole(tmp_path):
    with _log(tmp_path / "log", limit_bytes=1 << 24) as log:
        raws = _fill(log, 500, body_bytes=3000)
        count = len(list(log.directory.glob("*.seg")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    assert count > 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        with _log(tmp_path / "log", limit_bytes=1 << 24, resends=True) as log:
            assert log.recovery.problems == []
            assert log.recovery.holes == []
            assert log.recovery.kept_records == 500
            assert _raws(read_all(log.directory, log.begin, log.end)) == raws
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _OutOfFiles(QuickStorage):
    """Cannot open segments for a moment, for a reason that is not damage."""

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        if path.suffix == ".seg":
            raise OSError(errno.EMFILE, "Too many open files")
        return super().open(path, write=write, create=create)


def test_a_segment_that_cannot_be_opened_stops_the_start_and_costs_nothing(tmp_path):
    with _log(tmp_path / "log") as log:
        raws = _fill(log, 60)
    with pytest.raises(LogError, match="Too many open files"):
        _log(tmp_path / "log", storage=_OutOfFiles(), resends=True)
    with _log(tmp_path / "log", resends=True) as log:
        assert _raws(read_all(log.directory, log.begin, log.end)) == raws


def test_a_log_too_large_to_verify_in_full_starts_from_a_later_checkpoint_with_the_same_account(tmp_path):
    with _log(tmp_path / "log", limit_bytes=1 << 24) as log:
        raws = _fill(log, 300, body_bytes=3000)
        table = log.table.snapshot()
        end = log.end
    found = recover(
        QuickStorage(),
        tmp_path / "log",
        resends=True,
        segment_bytes=SEGMENT_BYTES,
        scan_bytes=4 * SEGMENT_BYTES,
    )
    assert 0 < found.report.kept_records < 50
    assert found.report.holes == []
    assert found.table.snapshot() == table
    assert found.may_continue
    assert _raws(read_all(tmp_path / "log", found.segments[0].first, end)) == raws
    assert [one.end for one in found.segments[:-1]] == [one.first for one in found.segments[1:]]
