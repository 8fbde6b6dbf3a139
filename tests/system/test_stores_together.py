"""One job, several stores at once, each killed again and again: all hold the same rows."""

from __future__ import annotations

import csv
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow.dataset
import pytest

from tests.system.harness import Site, kill_seed
from tests.system.payload import COLUMNS

STORES = {"sqlite": "DAQJobStoreSQLite", "parquet": "DAQJobStoreParquet"}
MORE = "".join(f'[store_config.{key}]\nfile_path = "table.{key}"\n' for key in STORES)
BATCH = 50
KILLS = 12

pytestmark = [pytest.mark.kills, pytest.mark.timeout(300)]

Row = tuple[int, int, int, float]


def csv_rows(site: Site) -> list[Row]:
    with (site.node_dir / "table.csv").open(newline="") as file:
        return [(int(a), int(b), int(c), float(d)) for a, b, c, d in list(csv.reader(file))[1:]]


def sqlite_rows(site: Site) -> list[Row]:
    with closing(sqlite3.connect(site.node_dir / "table.sqlite")) as connection:
        return connection.execute("SELECT * FROM data ORDER BY rowid").fetchall()


def parquet_rows(site: Site) -> list[Row]:
    table = pyarrow.dataset.dataset(site.node_dir / "table.parquet").to_table()
    return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def test_csv_sqlite_and_parquet_hold_the_same_rows_whoever_is_killed(tmp_path: Path, runtime_dir: Path):
    source = random.Random(kill_seed())
    with Site(tmp_path, runtime_dir) as site:
        for key, job_type in STORES.items():
            site.add_store(key, job_type, "seal_every = 1\n" if key == "parquet" else "")
        site.add_table_job(rate_hz=5000.0, batch_count=BATCH, more_stores=MORE)
        site.aggregator.start()
        site.agent.start()
        site.wait_put("table", 1000)
        for number in range(KILLS):
            site.wait_put("table", source.randrange(1, 5000))
            if number % 4 == 3:
                site.aggregator.kill_all()
                site.aggregator.start()
            else:
                victim = ("csv", "sqlite", "parquet")[number % 3]
                site.aggregator.wait_replaced(victim, site.aggregator.kill_worker(victim))
        ledger = site.deliver_rest()
        verdict = site.judge_table(batch_count=BATCH)
    assert verdict.is_clean, verdict
    assert all(row.balances and not row.dropped for row in ledger)
    rows = csv_rows(site)
    assert len(rows) == verdict.stored_count
    assert sqlite_rows(site) == rows
    assert parquet_rows(site) == rows
