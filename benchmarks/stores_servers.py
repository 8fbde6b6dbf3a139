"""MySQL and Redis stores beside the bare libraries: same rows, commits of one size, durable on both sides.

::

    python -m benchmarks.stores_servers --rows 400000 --repeats 5 --directory /var/tmp

Rows are narrow (int64 and 8 float64), commits have 10 000 of them. *bare* for MySQL is LOAD DATA LOCAL of
lines that are ready before the clock starts, into a table of the same columns without a key, one COMMIT
each; for Redis it is redis-py's pipeline of XADD. *ours* begins with frames as they lie in the journal and
ends when the commit is on the server's disk: decoding, judging, encoding, rows, watermark. Both servers are
private ones, durable at each commit.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import redis
from edgedaq.frame import Kind
from edgedaq.schema import Column, Schema
from edgedaq.segment_format import Hole, Record
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.mysql_server import MySQLServer
from edgedaq_aggregator.stores.mysql_session import DAQJobStoreMySQLConfig, Session
from edgedaq_aggregator.stores.redis_server import RedisServer as RedisStoreServer
from edgedaq_aggregator.stores.redis_session import DAQJobStoreRedisConfig
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects

from tests.contract.store_feed import Feed
from tests.servers import MariaDB, RedisServer

COMMIT_ROWS = 10_000
FRAME_ROWS = 1_000
NAMES = ("sequence", *(f"c{index}" for index in range(8)))
SCHEMA = Schema((Column("sequence", "i8"), *(Column(name, "f8") for name in NAMES[1:])))
DTYPE = np.dtype([("sequence", "<i8"), *((name, "<f8") for name in NAMES[1:])])


def main() -> None:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on a disk (%(default)s)")  # noqa: S108
    options = parser.parse_args()
    values = np.zeros(options.rows // COMMIT_ROWS * COMMIT_ROWS, DTYPE)
    values["sequence"] = np.arange(len(values))
    noise = np.random.default_rng(1)
    for name in NAMES[1:]:
        values[name] = noise.normal(size=len(values))
    measures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as base:
        for repeat in range(options.repeats):
            for name, seconds in [
                *mysql(values, Path(base) / f"m{repeat}"),
                *redis_streams(values, Path(base) / f"r{repeat}"),
            ]:
                measures.setdefault(name, []).append(len(values) / seconds)
    medians = {name: statistics.median(rates) for name, rates in measures.items()}
    print(f"{'':24} {'rows/s':>10}  beside bare (the goal)")
    for name, rate in medians.items():
        store, _, kind = name.partition(" ")
        goal = {"MySQL ours": ">= 0.95", "Redis ours": ">= 0.90"}.get(name, "")
        ratio = "" if kind == "bare" else f"{rate / medians[f'{store} bare']:.2f}"
        print(f"{name:24} {rate:10,.0f}  {ratio} {goal}")


def mysql(values: np.ndarray[Any, Any], base: Path) -> list[tuple[str, float]]:
    """Return how long MySQL took, bare and ours."""
    base.mkdir()
    server = MariaDB("--local-infile=1", "--innodb-log-file-size=256M", parent=base)
    try:
        server.start()
        server.rows("CREATE DATABASE bench")
        config = DAQJobStoreMySQLConfig(
            daq_job_type="DAQJobStoreMySQL", unix_socket=str(server.socket), user="root", database="bench"
        )
        columns = ", ".join(f"{name} {'BIGINT' if name == 'sequence' else 'DOUBLE'}" for name in NAMES)
        server.rows(f"CREATE TABLE bare ({columns}) ENGINE=InnoDB", database="bench")
        lines = [
            lines_of(values[start : start + COMMIT_ROWS]) for start in range(0, len(values), COMMIT_ROWS)
        ]
        session = Session(config)
        statement = f"LOAD DATA LOCAL INFILE 'x' INTO TABLE bare ({', '.join(NAMES)})"

        def bare() -> None:
            for data in lines:
                session.load(statement, [data], COMMIT_ROWS)
                session.commit()

        found = [("MySQL bare", timed(bare))]
        session.close()
        backend = ServerBackend(MySQLServer(config), base / "state", Suspects())
        found.append(("MySQL ours", timed_store("mysql", backend, values, {"table_name": "ours"})))
        assert server.rows("SELECT COUNT(*) FROM ours", database="bench") == [(len(values),)]  # noqa: S101
        return found
    finally:
        server.close()


def redis_streams(values: np.ndarray[Any, Any], base: Path) -> list[tuple[str, float]]:
    """Return how long Redis took, bare and ours."""
    base.mkdir()
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always", parent=base)
    try:
        server.start()
        config = DAQJobStoreRedisConfig(daq_job_type="DAQJobStoreRedis", unix_socket=str(server.socket))
        rows: list[dict[Any, Any]] = [dict(zip(NAMES, row, strict=True)) for row in values.tolist()]

        def bare() -> None:
            with server.client() as client:
                for start in range(0, len(rows), COMMIT_ROWS):
                    pipeline: redis.client.Pipeline = client.pipeline(transaction=False)
                    for row in rows[start : start + COMMIT_ROWS]:
                        pipeline.xadd("bare", row)
                    pipeline.execute()

        found = [("Redis bare", timed(bare))]
        for name, options in (
            ("Redis ours", {"key": "ours"}),
            ("Redis packed", {"key": "packed", "packed": True}),
        ):
            backend = ServerBackend(RedisStoreServer(config), base / name, Suspects())
            found.append((name, timed_store("redis", backend, values, options)))
        with server.client() as client:
            assert client.xlen("node1:ours") == len(values)  # noqa: S101
        return found
    finally:
        server.close()


def timed_store(key: str, backend: Backend, values: np.ndarray[Any, Any], options: dict[str, Any]) -> float:
    """Return how long a store takes, which encodes while a commit becomes durable, as the loop does."""
    feed = Feed()
    feed.open(1, {key: options}, schema=SCHEMA)
    for start in range(0, len(values), FRAME_ROWS):
        body = values[start : start + FRAME_ROWS].tobytes()
        feed.put(Kind.PACKED, 1, body, rows=FRAME_ROWS, t_first_ns=1)
    entries: Sequence[Record | Hole] = feed.records
    engine = StoreEngine(key, backend, lambda refusal: print("refused", refusal.reason))
    engine.begin(0, feed.table_at(0))
    step = COMMIT_ROWS // FRAME_ROWS

    def store() -> None:
        with ThreadPoolExecutor(1) as pool:
            under_way = None
            for start in range(0, len(entries), step):
                engine.take(entries[start : start + step])
                if under_way is not None:
                    under_way.result()
                    engine.committed_now()
                under_way = pool.submit(engine.commit())
            if under_way is not None:
                under_way.result()

    try:
        return timed(store)
    finally:
        backend.close()


def timed(work: Callable[[], None]) -> float:
    """Return how many seconds it takes."""
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s


def lines_of(values: np.ndarray[Any, Any]) -> bytes:
    """Return rows as LOAD DATA takes them by default."""
    table = pa.table({name: pa.array(np.ascontiguousarray(values[name])) for name in NAMES})
    sink = io.BytesIO()
    pyarrow.csv.write_csv(table, sink, pyarrow.csv.WriteOptions(include_header=False, delimiter="\t"))
    return sink.getvalue()


if __name__ == "__main__":
    main()
