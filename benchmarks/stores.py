"""Stores beside the bare libraries: the same narrow rows, durable on both sides at the same commit size.

::

    python -m benchmarks.stores                      all stores
    python -m benchmarks.stores csv sqlite --rows 2000000 --repeats 5 --folder /srv/daq

Rows are int64 and 8 float64, random. A store gets them as frames of 64 KiB through its loop, as it follows
the journal: judging, decoding, writing, watermarks and commit records included. The bare library gets them in
the form it likes best, made before the clock starts, and makes ``commit_rows`` durable at a time. Both are
measured in turns; a ratio of 1 is the speed of the bare library. The last ratio is of processor time, which
says something on a busy machine too.

A store is added to ``CASES`` by its backend and what its library does without us.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from edgedaq.delivery import StreamTable
from edgedaq.frame import Frame, Kind, decode, encode
from edgedaq.memory import keep_large_blocks
from edgedaq.open_info import OpenInfo, encode_open
from edgedaq.schema import Column, Schema
from edgedaq.segment_format import Hole, Record
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.loop import Cadence, StoreLoop
from edgedaq_aggregator.stores.parquet import ParquetBackend
from edgedaq_aggregator.stores.raw import RawFormat
from edgedaq_aggregator.stores.sqlite import SqliteBackend

from benchmarks.bare_disk import settle

SCHEMA = Schema((Column("n", "i8"), *(Column(f"v{index}", "f8") for index in range(8))))
ROW = struct.Struct(SCHEMA.row_format)
DTYPE = np.dtype([("n", "<i8"), *((f"v{index}", "<f8") for index in range(8))])
FRAME_ROWS = (64 << 10) // ROW.size
READ_FRAMES = 16
COMPRESSION: Literal["zstd"] = "zstd"
STREAM = 1


class Rows(NamedTuple):
    """The same rows in the forms that both sides begin with."""

    bodies: list[bytes]
    """Of the frames of a store."""

    total: int


class Taken(NamedTuple):
    """Seconds of the clock, and of all processors for this process."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Taken:
        """Return where both stand."""
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> Taken:
        """Return what passed since."""
        now = Taken.now()
        return Taken(now.wall_s - self.wall_s, now.cpu_s - self.cpu_s)


class Case(NamedTuple):
    """A store and its bare library.

    ``prepare`` makes of the rows what the bare library likes best, ``bare`` writes it to a folder.
    """

    key: str
    told: str
    commit_rows: int
    config: dict[str, Any]
    make_backend: Callable[[Path], Backend]
    prepare: Callable[[Rows, int], list[Any]]
    bare: Callable[[list[Any], Path], None]


def make_rows(count: int) -> Rows:
    """Return random rows."""
    chance = np.random.default_rng(1)
    bodies = []
    for start in range(0, count, FRAME_ROWS):
        rows = np.empty(min(FRAME_ROWS, count - start), DTYPE)
        rows["n"] = np.arange(start, start + len(rows))
        for index in range(8):
            rows[f"v{index}"] = chance.normal(size=len(rows))
        bodies.append(rows.tobytes())
    return Rows(bodies, count)


def info_for(config: dict[str, Any]) -> OpenInfo:
    """Return the OPEN of a stream of these rows."""
    return OpenInfo(
        node="node1",
        job="job1",
        job_type="DAQJobBenchmark",
        life=f"{STREAM:016x}",
        boot="boot",
        topics=("store.Any",),
        form="table",
        schema=SCHEMA,
        store_config=config,
        t_open_ns=1,
    )


class Journal:
    """A journal in memory, as a store follows it."""

    def __init__(self, rows: Rows, config: dict[str, Any]) -> None:
        self.position: int | None = 0
        self.tail = 0
        self.reported = threading.Event()
        self._index = 0
        self._records: list[Record | Hole] = []
        self._append(decode(memoryview(encode_open(STREAM, info_for(config)))))
        row0 = 0
        for seq, body in enumerate(rows.bodies, 1):
            count = len(body) // ROW.size
            raw = encode(Kind.PACKED, STREAM, seq, body, rows=count, row0=row0, t_first_ns=1)
            self._append(decode(memoryview(raw)))
            row0 += count

    def _append(self, frame: Frame) -> None:
        end = self.tail + len(frame.raw)
        self._records.append(Record(self.tail, end, frame))
        self.tail = end

    def table_at_start(self) -> StreamTable:
        """Return the account at the begin: none."""
        return StreamTable()

    def read(self, timeout_ms: int) -> list[Record | Hole]:
        """Return what comes next."""
        found = self._records[self._index : self._index + READ_FRAMES]
        self._index += len(found)
        if found:
            last = found[-1]
            self.position = last.end if isinstance(last, Record) else last.last
        elif timeout_ms:
            self.reported.wait(timeout_ms / 1000)
        return found

    def report(self, position: int) -> None:
        """Take note of what is durable."""
        if position >= self.tail:
            self.reported.set()

    def close(self) -> None:
        """Nothing is open."""


def store_s(case: Case, rows: Rows, folder: Path) -> Taken:
    """Return what a store takes until everything is durable."""
    journal = Journal(rows, case.config)
    stop = threading.Event()
    loop = StoreLoop(
        case.key,
        make_backend=lambda: case.make_backend(folder),
        follow=lambda _position, _wants: journal,
        bad_dir=folder / "bad",
        stop=stop,
        cadence=Cadence(case.commit_rows * ROW.size, 1.0),
    )
    thread = threading.Thread(target=loop.run)
    begun = Taken.now()
    thread.start()
    while not journal.reported.wait(1.0):
        if not thread.is_alive() or loop.report()["error"]:
            stop.set()
            break
    taken = begun.until_now()
    stop.set()
    thread.join()
    report = loop.report()
    if report["error"] or report["stored_rows"] != rows.total:
        message = f"{case.key} stored {report.get('stored_rows')} of {rows.total} rows: {report['error']}"
        raise RuntimeError(message)
    return taken


def bare_s(case: Case, prepared: list[Any], folder: Path) -> Taken:
    """Return what the bare library takes until everything is durable."""
    begun = Taken.now()
    case.bare(prepared, folder)
    return begun.until_now()


def as_bytes(rows: Rows, commit_rows: int) -> list[bytes]:
    """Return the packed rows of each commit."""
    whole = b"".join(rows.bodies)
    step = commit_rows * ROW.size
    return [whole[at : at + step] for at in range(0, len(whole), step)]


def as_arrow(rows: Rows, commit_rows: int) -> list[pa.Table]:
    """Return an Arrow table for each commit."""
    found = []
    for part in as_bytes(rows, commit_rows):
        held = np.frombuffer(part, DTYPE)
        found.append(pa.table({name: np.ascontiguousarray(held[name]) for name in SCHEMA.names}))
    return found


def as_tuples(rows: Rows, commit_rows: int) -> list[list[tuple[Any, ...]]]:
    """Return a list of tuples for each commit."""
    return [list(ROW.iter_unpack(part)) for part in as_bytes(rows, commit_rows)]


def bare_raw(parts: list[Any], folder: Path) -> None:
    """Write bytes and fdatasync."""
    with (folder / "bare.bin").open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[file.write(view) :]
            os.fdatasync(file.fileno())


def bare_csv(tables: list[Any], folder: Path) -> None:
    """Write with pyarrow's CSV writer and fdatasync."""
    with (
        (folder / "bare.csv").open("wb") as file,
        pyarrow.csv.CSVWriter(file, tables[0].schema) as writer,
    ):
        for table in tables:
            writer.write_table(table)
            file.flush()
            os.fdatasync(file.fileno())


def bare_sqlite(parts: list[Any], folder: Path) -> None:
    """Insert with executemany, one transaction per commit; WAL and synchronous=FULL as the store."""
    with closing(sqlite3.connect(folder / "bare.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"CREATE TABLE data ({', '.join(SCHEMA.names)})")
        insert = f"INSERT INTO data VALUES ({','.join('?' * len(SCHEMA.names))})"  # noqa: S608 -- no input
        for part in parts:
            connection.execute("BEGIN")
            connection.executemany(insert, part)
            connection.execute("COMMIT")


def bare_parquet(tables: list[Any], folder: Path) -> None:
    """Write a complete file per commit, and fdatasync it."""
    for number, table in enumerate(tables):
        with (folder / f"{number}.parquet").open("wb") as file:
            pq.write_table(table, file, compression=COMPRESSION)
            file.flush()
            os.fdatasync(file.fileno())


def files(folder: Path) -> tuple[Path, Path]:
    """Return where a store has its state, and where its data."""
    return folder / "state", folder / "out"


CASES = {
    "raw": Case(
        "raw",
        "write + fdatasync",
        233_000,
        {"raw": {"file_path": "rows.bin"}},
        lambda folder: FileBackend(RawFormat(), *files(folder), OsStorage()),
        as_bytes,
        bare_raw,
    ),
    "csv": Case(
        "csv",
        "pyarrow.csv",
        233_000,
        {"csv": {"file_path": "rows.csv"}},
        lambda folder: FileBackend(CsvFormat(), *files(folder), OsStorage()),
        as_arrow,
        bare_csv,
    ),
    "sqlite": Case(
        "sqlite",
        "sqlite3.executemany",
        100_000,
        {"sqlite": {"file_path": "rows.sqlite"}},
        lambda folder: SqliteBackend(*files(folder), OsStorage()),
        as_tuples,
        bare_sqlite,
    ),
    "parquet": Case(
        "parquet",
        "pyarrow.parquet",
        1_000_000,
        {"parquet": {"file_path": "rows.parquet", "compression": COMPRESSION}},
        lambda folder: ParquetBackend(*files(folder), OsStorage()),
        as_arrow,
        bare_parquet,
    ),
}


def measure(case: Case, rows: Rows, repeats: int, parent: Path, pause_s: float) -> None:
    """Print one line: the medians of both sides, and their ratio."""
    prepared = case.prepare(rows, case.commit_rows)
    taken: dict[str, list[Taken]] = {"store": [], "bare": []}
    for repeat in range(repeats + 1):
        for side in ("store", "bare") if repeat % 2 else ("bare", "store"):
            folder = Path(tempfile.mkdtemp(dir=parent))
            try:
                settle(pause_s)
                took = store_s(case, rows, folder) if side == "store" else bare_s(case, prepared, folder)
            finally:
                shutil.rmtree(folder)
            if repeat:  # the first touches memory and loads libraries
                taken[side].append(took)
    store, bare = (statistics.median(t.wall_s for t in taken[side]) for side in ("store", "bare"))
    store_cpu, bare_cpu = (statistics.median(t.cpu_s for t in taken[side]) for side in ("store", "bare"))
    speeds = f"{rows.total / store / 1e6:8.3f} {rows.total / bare / 1e6:8.3f}"
    line = f"{case.key:<8} {speeds} {bare / store:6.2f} {bare_cpu / store_cpu:6.2f}"
    print(f"{line}   {case.commit_rows:>9,} rows per commit, beside {case.told}", flush=True)


def main() -> None:
    """Measure the stores that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("stores", nargs="*", metavar="STORE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds of rest before each measurement")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is measured")
    options = parser.parse_args()
    for name in options.stores:
        if name not in CASES:
            parser.error(f"a store must be one of {', '.join(CASES)}, got {name!r}")
    keep_large_blocks()
    rows = make_rows(options.rows)
    print(f"{options.rows:,} rows of {ROW.size} bytes, median of {options.repeats}")
    print(f"{'store':<8} {'M rows/s':>8} {'bare':>8} {'ratio':>6} {'cpu':>6}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="edgedaq-bench-") as parent:
        for name in options.stores or CASES:
            measure(CASES[name], rows, options.repeats, Path(parent), options.pause)


if __name__ == "__main__":
    main()
