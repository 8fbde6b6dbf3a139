"""One job, every store at once, real servers; whoever is killed, all of them hold identical rows.

The kills take ``ALL_STORES_SECONDS`` (60); ``make chaos-stores MINUTES=10`` sets it. The seed is printed, and
``KILL_SEED`` gives one back.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from edgedaq_aggregator.ledger import LedgerRow
from edgedaq_aggregator.reading import Out, open_out
from edgedaq_aggregator.stored import find_stored
from edgedaq_aggregator.verify import format_report, verify

from tests.servers import MariaDB, RedisServer
from tests.system.harness import Site, kill_seed
from tests.system.payload import COLUMNS

SECONDS = float(os.environ.get("ALL_STORES_SECONDS") or 60)
BATCH = 10
STORES = {
    "csv": "DAQJobStoreCSV",
    "raw": "DAQJobStoreRaw",
    "root": "DAQJobStoreROOT",
    "hdf5": "DAQJobStoreHDF5",
    "mysql": "DAQJobStoreMySQL",
    "redis": "DAQJobStoreRedis",
    "parquet": "DAQJobStoreParquet",
    "sqlite": "DAQJobStoreSQLite",
}
FILES = {
    "raw": "table.bin",
    "root": "table.root",
    "hdf5": "table.h5",
    "parquet": "table.parquet",
    "sqlite": "table.db",
}
SERVED = '[store_config.mysql]\ntable_name = "t"\n[store_config.redis]\nkey = "t"\n'

pytestmark = [pytest.mark.kills, pytest.mark.timeout(SECONDS + 600)]


class Chaos:
    """Kills at random what is there, and gives servers back after a while."""

    def __init__(self, site: Site, servers: list[MariaDB | RedisServer], chance: random.Random) -> None:
        self.site = site
        self.servers = servers
        self.chance = chance
        self.kills: dict[str, int] = {}
        self._back_s: dict[int, float] = {}

    def run(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            threading.Event().wait(self.chance.uniform(0.05, 1.0))
            for at, back_s in list(self._back_s.items()):
                if time.monotonic() >= back_s:
                    del self._back_s[at]
                    self.servers[at].start()
            self._kill(self.chance.choice([*STORES, *STORES, "server", "server", "intake", "table", "all"]))
        for at in self._back_s:
            self.servers[at].start()
        self._back_s.clear()

    def _kill(self, victim: str) -> None:
        site = self.site
        if victim == "server":
            at = self.chance.randrange(len(self.servers))
            if at in self._back_s:
                return
            self.servers[at].kill()
            self._back_s[at] = time.monotonic() + self.chance.uniform(0, 3)
        elif victim == "all":
            site.aggregator.kill_all()
            site.aggregator.start(is_awaited=False)
        else:
            side = site.agent if victim == "table" else site.aggregator
            pid = side.pid_of(victim)
            if not pid:
                return  # it is dead already
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                return
        self.kills[victim] = self.kills.get(victim, 0) + 1


def test_all_stores_hold_identical_rows_whoever_is_killed(tmp_path: Path, runtime_dir: Path):
    chance = random.Random(kill_seed())
    mariadb = MariaDB("--local-infile=1")
    redis_server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    servers: list[MariaDB | RedisServer] = [mariadb, redis_server]
    try:
        for server in servers:
            server.start()
        mariadb.rows("CREATE DATABASE daq")
        with Site(tmp_path, runtime_dir) as site:
            add_stores(site, mariadb, redis_server)
            site.aggregator.start(is_awaited=False)
            site.aggregator.wait_running(120.0)
            site.agent.start()
            site.wait_put("table", 500)
            chaos = Chaos(site, servers, chance)
            chaos.run(SECONDS / 2)
            check_not_refuted(site)  # beside stores that run, or were killed just now
            chaos.run(SECONDS / 2)
            print(f"killed: {chaos.kills}")
            site.aggregator.wait_running(120.0)
            check_not_refuted(site)
            site.wait_put("table", 500, 120.0)
            ledger = site.deliver_rest(300.0)
            verdict = site.judge_table(batch_count=BATCH)
            assert verdict.is_clean, verdict
            assert verdict.stored_count >= site.put_count("table") - BATCH
            check_ledger(ledger, verdict.stored_count)
            check_rows(open_out(site.aggregator_dir), verdict.stored_count)
            report = verify(find_stored(site.aggregator_dir))
            assert report.is_proven, format_report(report)
    finally:
        for server in servers:
            server.close()


def add_stores(site: Site, mariadb: MariaDB, redis_server: RedisServer) -> None:
    """Add all stores, and a job whose rows go to each of them."""
    settings = {
        "parquet": "seal_every = 1\n",
        "mysql": f'unix_socket = "{mariadb.socket}"\ndatabase = "daq"\nuser = "root"\n',
        "redis": f'unix_socket = "{redis_server.socket}"\n',
    }
    for key, job_type in STORES.items():
        site.add_store(key, job_type, settings.get(key, ""))
    files = "".join(f'[store_config.{key}]\nfile_path = "{name}"\n' for key, name in FILES.items())
    site.add_table_job(rate_hz=1000.0, batch_count=BATCH, more_stores=files + SERVED)


def check_not_refuted(site: Site) -> None:
    """What is stored at any moment is what is committed, or cannot be asked for a while."""
    report = verify(find_stored(site.aggregator_dir))
    assert not report.problems, format_report(report)


def check_ledger(ledger: list[LedgerRow], rows: int) -> None:
    """Every store has stored every row of every stream, and dropped none."""
    for store in STORES:
        held = [row for row in ledger if row.store == store]
        assert sum(row.stored for row in held) == rows, store
        assert all(row.balances and row.closed and not row.waiting and not row.dropped for row in held)


def check_rows(out: Out, count: int) -> None:
    """What each store gives back is the same table, the rows of each life in the order of putting."""
    assert (set(out.stores), out.silent) == (set(STORES), {})
    expected = in_order(out.read(store="csv", job="table"))
    assert expected.num_rows == count
    assert tuple(expected.column_names) == COLUMNS
    for store in STORES:
        table = out.read(store=store, job="table")
        assert in_order(table).equals(expected), store
        sequences: dict[int, int] = {}
        pairs: list[Any] = [table[name].to_pylist() for name in ("life", "sequence")]
        for life, sequence in zip(*pairs, strict=True):
            assert sequences.get(life, -1) < sequence, store
            sequences[life] = sequence


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([("life", "ascending"), ("sequence", "ascending")]).combine_chunks()
