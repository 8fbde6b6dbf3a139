"""ROOT and HDF5 stores beside their bare libraries: the same rows, durable at the same commits.

    .venv/bin/python benchmarks/stores_hep.py [--rows 4000000] [--rounds 5] [--directory DIR]

*narrow* is int64 and 8 float64, *wide* a time and 1024 uint16. Store and library take turns; printed is the
best of the rounds, and the ratio. The store is fed frames in memory, as the journal gives them, and commits
as its loop does, one commit being made durable while the next rows are taken. The library is given numpy
rows, and its file is fdatasynced after each commit's rows: neither undo nor watermark, nothing is checked.

The last table is what a slow feed (commits of 100 rows) makes of a ROOT file, beside all rows at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import uproot
from edgedaq.frame import Frame, Kind, decode, encode
from edgedaq.memory import keep_large_blocks
from edgedaq.open_info import OpenInfo, encode_open
from edgedaq.schema import Column, Schema
from edgedaq.segment_format import Record
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend, FileFormat
from edgedaq_aggregator.stores.hdf5 import CHUNK_BYTES, Hdf5Format
from edgedaq_aggregator.stores.root import EXTEND_ROWS_MAX, RootFormat

COMMIT_BYTES = 16 << 20
FRAME_BYTES = 1 << 20
SLOW_ROWS = 100
NARROW = Schema((Column("n", "i8"), *(Column(f"c{i}", "f8") for i in range(8))))
WIDE = Schema((Column("t", "i8"), Column("adc", "u2", (1024,))))
FORMATS: dict[str, Callable[[], FileFormat]] = {"root": RootFormat, "hdf5": Hdf5Format}
Array = np.ndarray[Any, Any]


def make_rows(schema: Schema, count: int) -> Array:
    """Return rows that look measured: they compress a little."""
    rng = np.random.default_rng(1)
    rows = np.empty(count, [(c.name, f"<{c.dtype}", c.shape) for c in schema.columns])
    for column in schema.columns:
        if column.dtype == "i8":
            rows[column.name] = np.arange(count)
        elif column.dtype == "f8":
            rows[column.name] = np.round(rng.normal(20, 1, count), 3)
        else:
            rows[column.name] = rng.integers(8000, 8200, (count, *column.shape))
    return rows


def frames_of(schema: Schema, rows: Array, key: str, per_frame: int) -> list[Record]:
    """Return the frames of one stream, as a journal has them."""
    info = OpenInfo(
        node="node1",
        job="job1",
        job_type="Benchmark",
        life=f"{1:016x}",
        boot="1",
        topics=("store.Any",),
        form="table",
        schema=schema,
        store_config={key: {"file_path": "rows.dat"}},
    )
    found = [decode(memoryview(encode_open(1, info)))]
    for seq, at in enumerate(range(0, len(rows), per_frame), 1):
        part = rows[at : at + per_frame]
        raw = encode(Kind.PACKED, 1, seq, part.tobytes(), rows=len(part), row0=at, t_first_ns=1)
        found.append(decode(memoryview(raw)))
    return list(_records(found))


def _records(frames: list[Frame]) -> Iterator[Record]:
    position = 0
    for frame in frames:
        yield Record(position, position + len(frame.raw), frame)
        position += len(frame.raw)


def by_store(key: str, records: list[Record], base: Path, *, commit_bytes: int = COMMIT_BYTES) -> float:
    """Store records; return the seconds it took until everything was durable."""
    backend = FileBackend(FORMATS[key](), base / "state", base / "out", OsStorage())
    with ThreadPoolExecutor(1) as pool:
        begun_s = time.perf_counter()
        engine = StoreEngine(key, backend, lambda _: None)
        under_way = None
        for record in records:
            engine.take([record])
            if engine.uncommitted_bytes >= commit_bytes:
                if under_way is not None:
                    under_way.result()
                    engine.committed_now()
                under_way = pool.submit(engine.commit())
        if under_way is not None:
            under_way.result()
            engine.committed_now()
        pool.submit(engine.commit(is_clean=True)).result()
        engine.committed_now()
        took_s = time.perf_counter() - begun_s
        backend.close()
    if engine.stored_rows != sum(record.frame.rows for record in records):
        message = f"{engine.stored_rows} rows were stored"
        raise RuntimeError(message)
    return took_s


def by_uproot(rows: Array, path: Path, per_commit: int) -> float:
    """Write rows as anybody would."""
    begun_s = time.perf_counter()
    with uproot.recreate(path, compression=uproot.LZ4(1)) as file:
        tree = file.mktree("tree", {name: rows.dtype[name] for name in rows.dtype.names or ()})
        fd = os.open(path, os.O_RDWR)
        for at in range(0, len(rows), per_commit):
            for begin in range(at, min(at + per_commit, len(rows)), EXTEND_ROWS_MAX):
                part = rows[begin : min(begin + EXTEND_ROWS_MAX, at + per_commit)]
                tree.extend({name: part[name] for name in rows.dtype.names or ()})
            os.fdatasync(fd)
        os.close(fd)
    return time.perf_counter() - begun_s


def by_h5py(rows: Array, path: Path, per_commit: int) -> float:
    """Write rows as anybody would who wants them to be read meanwhile."""
    begun_s = time.perf_counter()
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        chunks = (max(CHUNK_BYTES // rows.dtype.itemsize, 1),)
        data = file.create_dataset("data", (0,), rows.dtype, maxshape=(None,), chunks=chunks)
        file.swmr_mode = True
        fd = os.open(path, os.O_RDONLY)
        for at in range(0, len(rows), per_commit):
            part = rows[at : at + per_commit]
            data.resize((at + len(part),))
            data[at:] = part
            file.flush()
            os.fdatasync(fd)
        os.close(fd)
    return time.perf_counter() - begun_s


BARE = {"root": by_uproot, "hdf5": by_h5py}


def compare(key: str, schema: Schema, count: int, rounds: int, directory: Path) -> tuple[float, float]:
    """Return the best seconds of store and library."""
    rows = make_rows(schema, count)
    records = frames_of(schema, rows, key, max(FRAME_BYTES // schema.row_bytes, 1))
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for which in (0, 1):
            with tempfile.TemporaryDirectory(dir=directory) as base:
                if which == 0:
                    took_s = by_store(key, records, Path(base))
                else:
                    took_s = BARE[key](rows, Path(base) / "bare", COMMIT_BYTES // schema.row_bytes)
            best[which] = min(best[which], took_s)
    return best[0], best[1]


def slow_feed(count: int, directory: Path) -> tuple[int, int]:
    """Return the bytes of a ROOT file fed slowly, and of one that got all rows at once."""
    rows = make_rows(NARROW, count)
    sizes = []
    for per_frame, commit_bytes in ((SLOW_ROWS, 1), (10 * SLOW_ROWS, 1 << 40)):
        records = frames_of(NARROW, rows, "root", per_frame)
        base = Path(tempfile.mkdtemp(dir=directory))
        by_store("root", records, base, commit_bytes=commit_bytes)
        sizes.append((base / "out" / "node1" / "rows.dat").stat().st_size)
        shutil.rmtree(base)
    return sizes[0], sizes[1]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000, help="narrow rows; wide ones are 1/30 of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk that is measured")
    options = parser.parse_args()
    keep_large_blocks()  # as every store does; for the bare library too
    print(f"{'':16}{'store':>14}{'bare':>14}{'ratio':>8}")
    for key in FORMATS:
        for name, schema, count in (("narrow", NARROW, options.rows), ("wide", WIDE, options.rows // 30)):
            store_s, bare_s = compare(key, schema, count, options.rounds, options.directory)
            mega = count / 1e6
            figures = f"{mega / store_s:8.2f} M/s  {mega / bare_s:8.2f} M/s  {bare_s / store_s:6.2f}"
            print(f"{key} {name}".ljust(16) + figures)
    slow, bulk = slow_feed(300_000, options.directory)
    print(f"\nROOT, {SLOW_ROWS} rows a commit: {slow} bytes, {slow / bulk:.2f} of {bulk} at once")


if __name__ == "__main__":
    main()
