from __future__ import annotations

import os

import pytest
from edgedaq.storage import OsStorage, write_all


class _Drips(OsStorage):
    """Takes at most seven bytes at once."""

    def pwritev(self, fd, buffers, offset):
        return super().pwritev(fd, [b"".join(buffers)[:7]], offset)


class _Stops(OsStorage):
    def pwritev(self, fd, buffers, offset):  # noqa: ARG002
        return 0


@pytest.fixture
def fd(tmp_path):
    storage = OsStorage()
    fd = storage.open(tmp_path / "file", write=True, create=True)
    yield fd
    storage.close(fd)


@pytest.mark.parametrize("storage", [OsStorage(), _Drips()])
def test_all_buffers_are_written_also_in_small_steps(tmp_path, fd, storage):
    write_all(storage, fd, [b"0123456789", bytearray(b"abc"), memoryview(b"defghijklmnop")], 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789abcdefghijklmnop"


def test_a_device_that_takes_nothing_is_an_error_not_a_loop(fd):
    with pytest.raises(OSError, match="took 0 of 4"):
        write_all(_Stops(), fd, [b"1234"], 0)


def test_a_lock_is_held_until_it_is_closed_and_against_this_process_too(tmp_path):
    storage = OsStorage()
    held = storage.lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        storage.lock(tmp_path / "lock")
    storage.close(held)
    storage.close(storage.lock(tmp_path / "lock"))


def test_an_open_file_is_told_from_another_one_of_its_name(tmp_path, fd):
    storage = OsStorage()
    assert storage.is_at(fd, tmp_path / "file")
    storage.rename(tmp_path / "file", tmp_path / "other")
    assert not storage.is_at(fd, tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    assert not storage.is_at(fd, tmp_path / "file")


def test_preallocated_blocks_are_zeros_and_counted(tmp_path, fd):
    storage = OsStorage()
    storage.preallocate(fd, 65536)
    storage.fdatasync(fd)
    storage.sync_directory(tmp_path)
    assert storage.size(fd) == 65536
    assert (tmp_path / "file").stat().st_blocks * 512 >= 65536
    assert storage.pread(fd, 100, 65500) == bytes(36)
    storage.truncate(fd, 10)
    assert storage.size(fd) == 10
    assert storage.names(tmp_path) == ["file"]
    assert storage.free_bytes(tmp_path) <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
