"""A held file beside a plain one: what a library sees, what a commit leaves, and what undoes it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.held_file import HeldFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.faulty_storage import FullStorage

WRITE = st.tuples(st.just("write"), st.integers(0, 300), st.binary(min_size=1, max_size=120))
CUT = st.tuples(st.just("truncate"), st.integers(0, 300), st.just(b""))
COMMIT = st.tuples(st.sampled_from(["commit", "settle", "rewind"]), st.just(0), st.just(b""))


def put_back(path: Path, held: tuple[list[tuple[int, bytes]], int]) -> bytes:
    """Return what the undo of a commit makes of the file."""
    undo, size = held
    content = bytearray(path.read_bytes())
    for offset, data in undo:
        if offset + len(data) > len(content):
            content.extend(bytes(offset + len(data) - len(content)))
        content[offset : offset + len(data)] = data
    return bytes(content[:size]).ljust(size, b"\0")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.binary(max_size=200), steps=st.lists(st.one_of(WRITE, CUT, COMMIT), max_size=25))
def test_it_reads_as_a_plain_file_does_and_each_commit_can_be_undone(tmp_path_factory, start, steps):
    path = tmp_path_factory.mktemp("held") / "file"
    path.write_bytes(start)
    storage = OsStorage()
    fd = storage.open(path, write=True)
    held, plain = HeldFile(storage, fd, len(start)), io.BytesIO(start)
    base = committed = start
    for what, offset, data in steps:
        if what == "write":
            for file in (held, plain):
                file.seek(offset)
                file.write(data)
        elif what == "truncate":
            held.truncate(offset)
            content = plain.getvalue()
            plain = io.BytesIO(content[:offset].ljust(offset, b"\0"))
        elif what == "rewind":
            held.rewind()
            plain = io.BytesIO(base)
        else:
            if what == "settle":
                held.settle()
            staged = held.stage()
            assert path.read_bytes()[: len(committed)] == committed, "nothing committed is written over"
            held.apply(staged)
            assert path.read_bytes() == plain.getvalue()
            undo = [(at, bytes(old)) for at, old in staged.undo]
            assert put_back(path, (undo, len(committed))) == committed
            committed = plain.getvalue()
            base = committed if what == "settle" else base
        held.seek(0)
        assert held.read() == plain.getvalue()
        assert held.size == len(plain.getvalue())
        held.seek(offset // 2)
        plain.seek(offset // 2)
        assert bytes(held.read(50)) == plain.read(50)
    held.close()
    storage.close(fd)


def test_a_disk_that_is_full_is_told_of_at_the_commit_and_never_to_the_library(tmp_path):
    storage = FullStorage(tmp_path)
    fd = storage.open(tmp_path / "file", write=True, create=True)
    held = HeldFile(storage, fd, 0)
    storage.is_full = True
    assert held.write(b"rows") == 4
    held.seek(1)
    assert held.read(2) == b"ow", "HDF5 reads back what it wrote, and would hang"
    storage.is_full = False
    with pytest.raises(OSError, match="No space left"):
        held.stage()
    held.close()
    storage.close(fd)
