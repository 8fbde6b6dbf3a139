from __future__ import annotations

import errno
import select
import threading
import time

from edgedaq.committer import Committer
from edgedaq.segments import SegmentLog

from tests.common.log_model import SEGMENT_BYTES, QuickStorage, frames_in, open_of, raw_of, read_all


class _Gate(QuickStorage):
    """An fdatasync that takes as long as the test wants, and fails when it says so."""

    def __init__(self) -> None:
        self.may_flush = threading.Event()
        self.may_flush.set()
        self.is_flushing = threading.Event()
        self.flush_count = 0
        self.failures = 0

    def fdatasync(self, fd: int) -> None:  # noqa: ARG002
        self.is_flushing.set()
        assert self.may_flush.wait(10)
        self.flush_count += 1
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")


def _log(tmp_path, storage) -> SegmentLog:
    return SegmentLog(tmp_path / "log", limit_bytes=1 << 22, segment_bytes=SEGMENT_BYTES, storage=storage)


def _wait_durable(log: SegmentLog, committer: Committer, position: int, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while log.durable < position:
        assert select.select([committer], [], [], end - time.monotonic())[0], "the committer says nothing"
        committer.clear()


def test_what_is_appended_becomes_durable_and_the_descriptor_says_so(tmp_path):
    with _log(tmp_path, QuickStorage()) as log, Committer(log) as committer:
        end = log.append([open_of(1), raw_of(1, 1)])
        committer.wake()
        _wait_durable(log, committer, end)
        committer.clear()
        assert select.select([committer], [], [], 0)[0] == []


def test_what_comes_while_a_flush_runs_goes_into_one_next_commit(tmp_path):
    storage = _Gate()
    with _log(tmp_path, storage) as log, Committer(log) as committer:
        storage.may_flush.clear()
        storage.is_flushing.clear()
        first = log.append([open_of(1)])
        committer.wake()
        assert storage.is_flushing.wait(10)
        for seq in range(1, 50):
            end = log.append([raw_of(1, seq, 10)])
            committer.wake()
        assert log.durable < first
        before = storage.flush_count
        storage.may_flush.set()
        _wait_durable(log, committer, end)
        assert storage.flush_count - before == 2


def test_an_idle_log_is_not_flushed(tmp_path):
    storage = _Gate()
    with _log(tmp_path, storage) as log, Committer(log) as committer:
        end = log.append([open_of(1)])
        committer.wake()
        _wait_durable(log, committer, end)
        count = storage.flush_count
        committer.wake()
        time.sleep(0.05)
        assert storage.flush_count == count


def test_a_disk_that_fails_for_a_while_is_told_and_retried_without_loss(tmp_path):
    storage = _Gate()
    told = threading.Event()
    with _log(tmp_path, storage) as log, Committer(log, on_durable=told.set) as committer:
        storage.failures = 2
        end = log.append([open_of(1), raw_of(1, 1)])
        committer.wake()
        assert told.wait(10)
        _wait_durable(log, committer, end)
        assert committer.failed_count == 2
        assert committer.error is None
        assert [frame.seq for frame in frames_in(read_all(log.directory, log.begin, log.durable))] == [0, 1]


def test_bytes_gather_where_the_disk_wears(tmp_path):
    storage = _Gate()
    with _log(tmp_path, storage) as log, Committer(log, gather_s=0.1) as committer:
        count = storage.flush_count
        log.append([open_of(1)])
        committer.wake()
        for seq in range(1, 20):
            end = log.append([raw_of(1, seq, 10)])
            committer.wake()
        _wait_durable(log, committer, end)
        assert storage.flush_count - count == 1


def test_closing_makes_durable_what_waits(tmp_path):
    with _log(tmp_path, QuickStorage()) as log:
        committer = Committer(log, gather_s=30)
        end = log.append([open_of(1)])
        committer.wake()
        committer.close()
        committer.close()
        assert log.durable == end
