"""The ROOT store: the contract of every container, and what is its own."""

from __future__ import annotations

import itertools
import random
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import uproot
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.columns import Column, Schema
from edgedaq.frame import Kind, pack_map
from edgedaq.storage import OsStorage, Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.root import TAIL_PARTS_MAX, RootFormat

from tests.aggregator.container_store import ContainerStoreContract
from tests.contract.faulty_storage import EndedHere, KilledStorage, PowerCutStorage, end_storage
from tests.contract.store_feed import NODE, T0_NS, Feed, flat

EVERYTHING = Schema(
    (
        *(Column(code, code) for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")),
        Column("ok", "bool"),
        Column("t", "timestamp"),
        Column("s", "utf8"),
        Column("y", "bytes"),
        Column("wave", "u2", (4,)),
        Column("m", "i4", (2, 2)),
        Column("r", "f8", (-1,)),
        Column("ny", "i2"),
        Column("a-b", "i2"),
        Column("a b", "i2"),
    )
)


def read(path: Path, tree_name: str = "tree") -> dict[str, list[Any]]:
    with uproot.open(path, handler=uproot.source.file.MemmapSource) as file:
        arrays = file[tree_name].arrays()
        return {name: arrays[name].to_list() for name in arrays.fields}


@pytest.mark.timeout(300)
class TestStoreROOT(ContainerStoreContract):
    key = "root"
    tail_parts = TAIL_PARTS_MAX

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(RootFormat(self.tail_parts), base / "state", base / "out", storage)

    def read_file(self, path: Path) -> list[tuple[Any, ...]]:
        return list(zip(*read(path).values(), strict=True))

    def read_values(self, path: Path) -> dict[str, list[Any]]:
        found = read(path)
        lists = [
            name for name, values in found.items() if f"n{name}" in found and isinstance(values[0], list)
        ]
        return {name: values for name, values in found.items() if name[1:] not in lists or name[0] != "n"}

    def stored_name(self, name: str) -> str:
        return re.sub(r"\W", "_", name)

    def store(self, base: Path, feed: Feed, name: str = "data.dat", *, per_commit: int = 3) -> dict[str, Any]:
        assert self.feed_all(base, feed, per_commit=per_commit) == []
        return read(base / "out" / NODE / name)

    @pytest.mark.parametrize("lives", [1, 3])
    def test_every_dtype_has_its_branch_and_goes_on_in_the_next_life(self, tmp_path, lives):
        feed = Feed()
        feed.open(1, self.config(), schema=EVERYTHING)
        rows: list[list[Any]] = []
        for life in range(lives):
            for n in range(3):
                text = "µ" * 300 * n + f'a "b"\n{life}'
                numbers = [-n, n, -300, 60000, -70000, 2**32 - 1, -(2**62) + n, 2**64 - 1 - n, n / 4, 0.1]
                wave, square = [n, 1, 2, 65535], [[n, 2], [3, -4]]
                rows.append(
                    [*numbers, n == 1, T0_NS + n, text, bytes(range(n)), wave, square, [0.5] * n, 5, 6, 7]
                )
            feed.rows(1, rows[-3:])
            found = self.store(tmp_path, feed)
        plain = [[*row[:10], int(row[10]), row[11], row[12], list(row[13]), *row[14:]] for row in rows]
        names = [*EVERYTHING.names[:-3], "ny_2", "a_b", "a_b_2"]
        assert {name: found[name] for name in names} == dict(
            zip(names, map(list, zip(*plain, strict=True)), strict=True)
        )
        assert found["ny"] == [len(row[13]) for row in rows]

    def test_arrow_batches_of_any_type_are_stored(self, tmp_path):
        batch = pa.record_batch(
            {
                "date": pa.array([0, 1, None], pa.date32()),
                "seconds": pa.array([1, None, 3], pa.timestamp("s")),
                "struct": pa.array([{"x": 1}, None, {"x": 3}]),
                "lists": pa.array([[1, 2], None, []], pa.list_(pa.int32())),
                "texts": pa.array([["p"], [], None]),
                "nothing": pa.nulls(3),
                "half": pa.array(np.array([1, 2, 3], "f2")),
            }
        )
        feed = Feed()
        schema_bytes = arrow_schema_bytes(batch.schema)
        feed.open(1, self.config(), schema=None, arrow_schema=schema_bytes)
        for part in (batch, batch.slice(1), batch.slice(0, 1)):
            feed.put(Kind.ARROW, 1, bytes(memoryview(arrow_body(part))), rows=len(part), t_first_ns=T0_NS)
        found = self.store(tmp_path, feed)
        rows = [0, 1, 2, 1, 2, 0]
        day, least = 86_400 * 10**9, -(2**63)
        assert found["date"] == [[0, day, least][row] for row in rows]
        assert found["seconds"] == [[10**9, least, 3 * 10**9][row] for row in rows]
        assert found["struct"] == [['{"x":1}', "", '{"x":3}'][row] for row in rows]
        assert found["lists"] == [[[1, 2], [], []][row] for row in rows]
        assert found["texts"] == [['["p"]', "[]", ""][row] for row in rows]
        assert found["half"] == [row + 1 for row in rows]

    def test_raw_messages_and_events_are_rows(self, tmp_path):
        feed = Feed()
        feed.open(1, self.config("raw.dat"), form="raw", schema=None)
        feed.messages(1, [b"one", b"", b"three"])
        feed.pieces(1, [b"in ", b"two"])
        feed.open(2, self.config("event.dat"), form="event", schema=None)
        metadata = pack_map({"id": 7, "raw": b"\xff"})
        feed.put(
            Kind.EVENT, 2, len(metadata).to_bytes(4, "little") + metadata + b"load", rows=1, t_first_ns=T0_NS
        )
        raw = self.store(tmp_path, feed, "raw.dat")
        assert [bytes(message) for message in raw["message"]] == [b"one", b"", b"three", b"in two"]
        event = read(tmp_path / "out" / NODE / "event.dat")
        assert (event["metadata"], event["payload"]) == (['{"id":7,"raw":"ff"}'], [list(b"load")])

    @pytest.mark.parametrize(("kind", "level"), [("LZ4", 1), ("ZSTD", 3), ("LZ4", 0)])
    def test_tree_name_and_compression_are_those_asked_for_in_each_life(self, tmp_path, kind, level):
        feed = Feed()
        options = {"tree_name": "a tree/1", "compression_type": kind, "compression_level": level}
        feed.open(1, self.config(**options))
        expected = []
        for life in range(2):
            expected += feed.pairs(1, life * 5000, 5000)
            assert self.feed_all(tmp_path, feed) == []
        path = tmp_path / "out" / NODE / "data.dat"
        assert list(zip(*read(path, "a_tree_1").values(), strict=True)) == expected
        with uproot.open(path, handler=uproot.source.file.MemmapSource) as file:
            ratio = file["a_tree_1"]["sequence"].compression_ratio
        assert ratio > 1.5 if level else ratio < 1.1

    @pytest.mark.parametrize(
        ("options", "told"),
        [({"compression_type": "RAR"}, "RAR"), ({"compression_level": 22}, "LZ4 must be 0 to 12, got 22")],
    )
    def test_a_compression_that_is_none_is_told_of_and_nothing_is_lost(self, tmp_path, options, told):
        feed = Feed()
        feed.open(1, self.config(**options))
        expected = feed.pairs(1, 0, 5)
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, f"_refused/{1:016x}.root") == expected
        (mark,) = self.read_marks(tmp_path)
        assert told in mark["reason"]

    def test_a_slow_feed_makes_a_file_hardly_larger_than_all_rows_at_once(self, tmp_path):
        schema = Schema((Column("n", "i8"), *(Column(f"c{i}", "f8") for i in range(8))))
        chance = random.Random(1)
        rows = [[n, *(round(chance.gauss(20, 1), 3) for _ in range(8))] for n in range(30_000)]
        sizes = {}
        for per_frame in (100, 10_000):
            feed = Feed()
            feed.open(1, self.config(f"{per_frame}.dat"), schema=schema)
            for at in range(0, len(rows), per_frame):
                feed.rows(1, rows[at : at + per_frame])
            self.feed_all(tmp_path / str(per_frame), feed, per_commit=1 if per_frame == 100 else 100)
            path = tmp_path / str(per_frame) / "out" / NODE / f"{per_frame}.dat"
            assert self.read_file(path) == [tuple(row) for row in rows]
            sizes[per_frame] = path.stat().st_size
        assert sizes[100] < 1.2 * sizes[10_000]

    def test_it_leaves_no_thread(self, tmp_path):
        before = set(threading.enumerate())
        feed = Feed()
        feed.open(1, self.config())
        for _ in range(3):
            feed.pairs(1, 0, 5)
            self.feed_all(tmp_path, feed)
        assert set(threading.enumerate()) == before

    def test_a_file_that_grows_and_shrinks_is_never_written_by_its_tail_alone(self, tmp_path):
        """A tail that is joined makes the file shorter; rows of the next commit still go to it."""
        feed = Feed()
        feed.open(1, self.config())
        backend = self.make_backend(tmp_path, OsStorage())
        expected: list[tuple[int, float]] = []
        sizes = []
        try:
            engine = StoreEngine(self.key, backend, lambda _: None)
            engine.begin(0, feed.table_at(0))
            begun = 0
            for part in range(100):
                expected += feed.pairs(1, part, 1)
                engine.take(feed.since(begun))
                begun = feed.position
                engine.commit()()
                engine.committed_now()
                sizes.append((tmp_path / "out" / NODE / "data.dat").stat().st_size)
        finally:
            backend.close()
        assert self.read_pairs(tmp_path, "data.dat") == expected
        assert any(later < size for size, later in itertools.pairwise(sizes))

    @pytest.mark.parametrize("kind", [KilledStorage, PowerCutStorage])
    def test_a_tail_that_is_joined_in_each_commit_survives_an_end_at_any_operation(self, tmp_path, kind):
        self.tail_parts = 1
        feed = Feed()
        feed.open(1, self.config())
        expected = flat(feed.pairs(1, 4 * part, 4) for part in range(4))

        def make(base: Path, at: int) -> KilledStorage:
            return PowerCutStorage([base], at) if kind is PowerCutStorage else KilledStorage(at)

        (tmp_path / "whole").mkdir()
        whole = make(tmp_path / "whole", -1)
        self.feed_all(tmp_path / "whole", feed, whole, per_commit=1)
        end_storage(whole)
        every = range(whole.count // 2, whole.count)
        for at in random.sample(every, min(len(every), 40)):
            base = tmp_path / str(at)
            base.mkdir()
            storage = make(base, at)
            with pytest.raises(EndedHere):
                self.feed_all(base, feed, storage, per_commit=1)
            end_storage(storage, is_cut=True)
            self.feed_all(base, feed)
            assert self.read_pairs(base, "data.dat") == expected, f"operation {at}"

    def test_a_tail_that_is_joined_survives_any_loss_of_unsynced_writes(self, tmp_path):
        self.tail_parts = 1
        self.test_any_loss_of_unsynced_writes_of_a_commit_is_undone(tmp_path)
