"""The spool by itself: what it gives back while the disk under it fails, or is full."""

from __future__ import annotations

import errno
import threading

import pytest
from edgedaq.bad_files import BadFiles
from edgedaq.lane_parts import Entry
from edgedaq.storage import OsStorage
from edgedaq_agent.spool import Spool

from tests.agent.hop2 import wait_for
from tests.common.log_model import open_of, raw_of


class FailingStorage(OsStorage):
    """Fails to make anything durable as long as ``fails``, and to give room as long as ``is_full``."""

    def __init__(self) -> None:
        self.fails = self.is_full = False

    def fdatasync(self, fd: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        super().fdatasync(fd)

    def preallocate(self, fd: int, size_bytes: int) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().preallocate(fd, size_bytes)


@pytest.fixture
def storage():
    return FailingStorage()


@pytest.fixture
def make(tmp_path, storage):
    def spool(limit_bytes=64 << 20):
        return Spool(
            tmp_path / "spool",
            limit_bytes=limit_bytes,
            reserve_bytes=0,
            bad=BadFiles(tmp_path / "bad"),
            open_of=lambda *_: bytes(open_of(1).raw),
            storage=storage,
        )

    return spool


def entry(first, last, size=1000):
    return Entry(
        "ring", memoryview(b"".join(raw_of(1, seq, size).raw for seq in range(first, last))), 1, None
    )


def read(spool, position, upto):
    seqs = []
    while position < upto:
        part = spool.read(position, upto, 1 << 16, 1 << 20)
        seqs += [frame.seq for frame in part]
        assert part.upto > position
        position = part.upto
    return seqs


@pytest.mark.parametrize("is_full", [False, True])
def test_what_moves_because_the_disk_failed_is_not_taken_for_lost_and_read_where_it_is_then(
    make, storage, is_full
):
    with make() as spool:
        first = spool.append([entry(1, 20)])
        wait_for(lambda: spool.durable == first)
        assert read(spool, spool.acked, first) == list(range(20))
        storage.fails, storage.is_full = True, is_full
        end = spool.append([entry(20, 40)])
        wait_for(lambda: spool.has_moved)
        assert end > first
        part = spool.read(first, end, 1 << 16, 1 << 20)
        assert (list(part), part.upto) == ([], first)
        if is_full:
            wait_for(lambda: spool.end == first)
            assert not spool.settle()
        storage.fails = storage.is_full = False
        wait_for(lambda: spool.durable == spool.end > end)
        assert spool.read(first, end, 1 << 16, 1 << 20).upto == first
        assert spool.settle()
        assert not spool.has_moved
        assert read(spool, spool.acked, spool.end) == list(range(40))
    assert threading.active_count() == 1
