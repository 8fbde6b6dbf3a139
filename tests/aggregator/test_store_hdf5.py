"""The HDF5 store: the contract of every container, and what is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from edgedaq.columns import Column, Schema
from edgedaq.frame import Kind, pack_map
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.hdf5 import CHUNK_BYTES, Hdf5Format
from edgedaq_aggregator.stores.hdf5_superblock import SUPERBLOCK_BYTES, lookup3, unmarked

from tests.aggregator.container_store import ContainerStoreContract
from tests.contract.store_feed import NODE, T0_NS, Feed

NUMBERS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
FIXED = Schema(
    (
        *(Column(code, code) for code in NUMBERS),
        Column("ok", "bool"),
        Column("t", "timestamp", (), "ns"),
        Column("wave", "u2", (1024,), "mV"),
        Column("m µ/", "i4", (2, 2)),
    )
)
GENERAL = Schema(
    (
        Column("n", "i4"),
        Column("text", "utf8"),
        Column("a/b", "bytes"),
        Column("r", "f8", (-1,)),
        Column("ok", "bool"),
    )
)
READER = """
import sys, time, h5py, numpy as np
path, last = sys.argv[1], int(sys.argv[2])
end_s = time.monotonic() + 60
with h5py.File(path, "r", swmr=True) as file:
    rows, seen = file["data"], []
    print("open", flush=True)
    while not seen or seen[-1] < last:
        assert time.monotonic() < end_s, seen[-5:]
        rows.refresh()
        values = rows["sequence"]
        assert (values == np.arange(len(values))).all(), values
        if not seen or len(values) != seen[-1]:
            seen.append(len(values))
print(len(seen))
"""


@pytest.mark.timeout(300)
class TestStoreHDF5(ContainerStoreContract):
    key = "hdf5"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(Hdf5Format(), base / "state", base / "out", storage)

    def read_file(self, path: Path) -> list[tuple[Any, ...]]:
        with h5py.File(path) as file:
            return [tuple(row) for row in file["data"][:].tolist()]

    def read_values(self, path: Path) -> dict[str, list[Any]]:
        with h5py.File(path) as file:
            data, kinds = file["data"][:], json.loads(file["data"].attrs["kinds"])
            found = {name: data[name].tolist() for name in data.dtype.names}
            for name, values in found.items():
                if f"data.{name}" in file:
                    parts = np.split(file[f"data.{name}"][:], values[:-1])
                    is_text = kinds[name] == "utf8"
                    found[name] = [part.tobytes().decode() if is_text else part.tolist() for part in parts]
        return found

    def path(self, base: Path, name: str = "data.dat") -> Path:
        return base / "out" / NODE / name

    def test_rows_of_fixed_width_are_one_compound_dataset(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(), schema=FIXED)
        rows = []
        for life in range(2):
            for n in range(200 * life, 200 * life + 200):
                numbers = [
                    -(n % 100),
                    n % 200,
                    -300,
                    60000,
                    -70000,
                    2**32 - 1,
                    -(2**62),
                    2**64 - 1 - n,
                    n / 4,
                    0.1,
                ]
                rows.append([*numbers, n % 3 == 0, T0_NS + n, list(range(n, n + 1024)), [[n, 2], [3, -4]]])
            feed.rows(1, rows[-200:])
            self.feed_all(tmp_path, feed)
        with h5py.File(self.path(tmp_path)) as file:
            data = file["data"]
            assert data.chunks == (CHUNK_BYTES // data.dtype.itemsize,)
            assert json.loads(data.attrs["units"]) == {"t": "ns", "wave": "mV"}
            assert json.loads(data.attrs["kinds"]) == {"ok": "bool", "t": "timestamp"}
            for column, values in zip(FIXED.names, zip(*rows, strict=True), strict=True):
                assert data[column].tolist() == [int(v) if v is True or v is False else v for v in values]

    def test_text_bytes_and_lists_are_back_to_back_with_their_ends_in_the_rows(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config(dataset_name="run/events"), schema=GENERAL)
        feed.open(2, self.config(dataset_name="run/events"), schema=GENERAL)
        rows: list[list[Any]] = []
        for life in range(3):
            for stream in (1, 2):
                more = [
                    [n, f"µ{n}" * (n % 4), bytes(n % 3), [n / 4] * (n % 5), n % 2 == 0] for n in range(50)
                ]
                more.append([None, None, None, None, None])
                feed.rows(stream, more)
                rows += more
            assert self.feed_all(tmp_path, feed) == [], life
        with h5py.File(self.path(tmp_path)) as file:
            data = file["run/events"][:]
            texts = np.split(file["run/events.text"][:], data["text"][:-1].astype(int))
            assert [text.tobytes().decode() for text in texts] == [row[1] or "" for row in rows]
            parts = np.split(file["run/events.a_b"][:], data["a/b"][:-1].astype(int))
            assert [part.tobytes() for part in parts] == [row[2] or b"" for row in rows]
            lists = np.split(file["run/events.r"][:], data["r"][:-1].astype(int))
            assert [values.tolist() for values in lists] == [row[3] or [] for row in rows]
            assert data["n"].tolist() == [-(2**31) if row[0] is None else row[0] for row in rows]
            assert data["ok"].tolist() == [255 if row[4] is None else int(row[4]) for row in rows]

    def test_raw_messages_and_events_are_rows(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("raw.dat"), form="raw", schema=None)
        feed.messages(1, [b"one", b"", b"three"])
        feed.pieces(1, [b"in ", b"two"])
        feed.open(2, self.config("event.dat"), form="event", schema=None)
        metadata = pack_map({"id": 7})
        feed.put(
            Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"load", rows=1, t_first_ns=T0_NS
        )
        assert self.feed_all(tmp_path, feed) == []
        with h5py.File(self.path(tmp_path, "raw.dat")) as file:
            assert file["data.message"][:].tobytes() == b"onethreein two"
            assert file["data"]["message"].tolist() == [3, 3, 8, 14]
        with h5py.File(self.path(tmp_path, "event.dat")) as file:
            assert file["data.metadata"][:].tobytes() == b'{"id":7}'
            assert file["data.payload"][:].tobytes() == b"load"

    @pytest.mark.parametrize("name", ["", "a/../b", "a//b", "."])
    def test_a_dataset_name_that_is_none_is_told_of_and_nothing_is_lost(self, tmp_path, name):
        feed = Feed()
        feed.open(1, self.config(dataset_name=name))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"_refused/{1:016x}.hdf5") == expected

    def test_rows_that_no_file_can_hold_are_set_aside_and_hold_nothing_up(self, tmp_path):
        schema = Schema(tuple(Column(f"a column with quite a long name {n}", "i1") for n in range(4000)))
        feed = Feed()
        feed.open(1, self.config("many.dat"), schema=schema)
        feed.open(2, self.config())
        for _ in range(3):
            feed.rows(1, [[1] * 4000] * 2)
        expected = feed.pairs(2, 0, 5)
        refused = self.feed_all(tmp_path, feed)
        assert [refusal.frame.stream for refusal in refused] == [1, 1, 1]
        assert "no file can have these 4000 columns" in refused[0].reason
        assert self.read_pairs(tmp_path, "data.dat") == expected
        assert [mark["rows"] for mark in self.read_marks(tmp_path)] == ["2", "2", "2"]
        names = {path.name for path in self.path(tmp_path).parent.iterdir()}
        assert names == {"_marks.hdf5.csv", "data.dat", "many.dat"}

    def test_a_reader_that_has_it_open_sees_rows_in_order_as_they_are_committed(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        backend = self.make_backend(tmp_path, OsStorage())
        reader = None
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            begun, row, end_s = 0, 0, time.monotonic() + 60
            last = 400_000
            while row < last and time.monotonic() < end_s:
                feed.pairs(1, row, 1000)
                row += 1000
                engine.take(feed.since(begun))
                begun = feed.position
                engine.commit()()
                engine.committed_now()
                if reader is None:
                    command = [sys.executable, "-c", READER, str(self.path(tmp_path)), str(last)]
                    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                    assert reader.stdout is not None
                    assert reader.stdout.readline() == "open\n"
            assert reader is not None
            told, _ = reader.communicate(timeout=60)
            assert reader.returncode == 0
            assert int(told) > 3, "it saw the file grow"
        finally:
            if reader is not None and reader.poll() is None:
                reader.kill()
                reader.wait()
            backend.close()

    def test_nobody_is_kept_out_while_it_is_written_and_no_reader_holds_it_up(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config())
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        for number, options in enumerate(({}, {"swmr": True}), 1):
            with h5py.File(self.path(tmp_path), **options) as file:
                expected += feed.pairs(1, 5 * number, 5)
                self.feed_all(tmp_path, feed)
                assert len(file["data"]) >= 5 * number
            assert self.read_pairs(tmp_path, "data.dat") == expected
        assert [path.name for path in self.path(tmp_path).parent.iterdir()] == ["data.dat"]


def test_a_superblock_loses_its_marks_and_keeps_a_checksum_that_the_library_accepts(tmp_path):
    path = tmp_path / "marked.h5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.create_dataset("x", data=[1, 2])
        file.swmr_mode = True
        file.flush()
        marked = path.read_bytes()
    other = tmp_path / "killed.h5"
    other.write_bytes(marked)
    with pytest.raises(OSError, match="already open"):
        h5py.File(other)
    other.write_bytes(unmarked(marked[:SUPERBLOCK_BYTES]) + marked[SUPERBLOCK_BYTES:])
    with h5py.File(other) as file:
        assert file["x"][:].tolist() == [1, 2]


@pytest.mark.parametrize("at", [0, 8, 11, 20, 40, 47])
def test_a_damaged_superblock_is_refused(tmp_path, at):
    with h5py.File(tmp_path / "x.h5", "w", libver=("v110", "v110")):
        pass
    damaged = bytearray((tmp_path / "x.h5").read_bytes()[:SUPERBLOCK_BYTES])
    damaged[at] ^= 2
    with pytest.raises(ValueError, match="HDF5 superblock"):
        unmarked(bytes(damaged))


def test_lookup3_gives_the_values_that_its_author_gives():
    assert lookup3(b"Four score and seven years ago") == 0x17770551
