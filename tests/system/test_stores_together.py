"""One job, several stores at once, each killed again and again: all hold the same rows."""

from __future__ import annotations

import csv
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import h5py
import pyarrow.dataset
import pytest
import uproot

from tests.system.harness import Site, kill_seed
from tests.system.payload import COLUMNS

STORES = {
    "sqlite": "DAQJobStoreSQLite",
    "parquet": "DAQJobStoreParquet",
    "root": "DAQJobStoreROOT",
    "hdf5": "DAQJobStoreHDF5",
}
MORE = "".join(f'[store_config.{key}]\nfile_path = "table.{key}"\n' for key in STORES)
BATCH = 50
KILLS = 18

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


def root_rows(site: Site) -> list[Row]:
    with uproot.open(site.node_dir / "table.root", handler=uproot.source.file.MemmapSource) as file:
        columns = file["tree"].arrays(library="np")
        return list(zip(*(columns[name].tolist() for name in COLUMNS), strict=True))


def hdf5_rows(site: Site) -> list[Row]:
    with h5py.File(site.node_dir / "table.hdf5") as file:
        return [tuple(row) for row in file["data"][:][list(COLUMNS)].tolist()]


def test_all_stores_of_files_hold_the_same_rows_whoever_is_killed(tmp_path: Path, runtime_dir: Path):
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
            if number % 6 == 5:
                site.aggregator.kill_all()
                site.aggregator.start()
            else:
                victim = ("csv", *STORES)[number % 6]
                site.aggregator.wait_replaced(victim, site.aggregator.kill_worker(victim))
        ledger = site.deliver_rest()
        verdict = site.judge_table(batch_count=BATCH)
    assert verdict.is_clean, verdict
    assert all(row.balances and not row.dropped for row in ledger)
    rows = csv_rows(site)
    assert len(rows) == verdict.stored_count
    assert sqlite_rows(site) == rows
    assert parquet_rows(site) == rows
    assert root_rows(site) == rows
    assert hdf5_rows(site) == rows
