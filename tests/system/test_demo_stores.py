"""``demo --stores all``: every store there is, with servers of its own, as who types that sees it."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import psutil
import pyarrow.dataset
import pymysql
import pytest
import redis
import uproot
from edgedaq_aggregator.demo_configs import NODE, chosen_stores
from edgedaq_aggregator.demo_servers import DemoServer
from edgedaq_aggregator.ledger import LedgerRow, read_ledger
from edgedaq_aggregator.reading import open_out

from tests.servers import require
from tests.system.harness import environment

pytestmark = pytest.mark.timeout(240)

LIMIT_S = 120.0
TABLE_JOBS = {"test", "pc_metrics", "detector", "thermometer"}


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a directory whose path leaves room for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="edq-demo-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def _servers() -> None:
    require("mariadbd")
    require("redis-server", "valkey-server")


class Demo:
    """The command, and all that it has said."""

    def __init__(self, out: Path, seconds: float, stores: str, path: str = "") -> None:
        self._log = out.with_suffix(".txt")
        arguments = ["demo", "--seconds", str(seconds), "--out", str(out), "--stores", stores]
        variables = environment()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgedaq_aggregator.cli", *arguments],
                env={**variables, "PATH": f"{path}{os.pathsep}{variables['PATH']}"} if path else variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_said(self, text: str) -> None:
        end = time.monotonic() + LIMIT_S
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def finish(self) -> str:
        try:
            status = self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            self.process.wait()
        assert status == 0, self.said
        return self.said

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # who inherits it may take a while to reap it
    except psutil.NoSuchProcess:
        return False


def numbers(out: Path) -> list[int]:
    found = []
    for path in sorted((out / NODE).glob("*_test.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            found += [int(row["sequence"]) for row in csv.DictReader(file)]
    return found


def served(out: Path) -> dict[str, list[int]]:
    """Return the numbers of the test job that the demo's servers keep, each started once more."""
    found = {}
    with (out / ".demo" / "lock").open("ab") as lock:
        with (
            DemoServer("mysql", out / ".demo" / "mysql", lock.fileno(), lambda: False) as server,
            pymysql.connect(unix_socket=str(server.socket), user="root", database="demo") as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT sequence FROM test ORDER BY edgedaq_id")
            found["mysql"] = [row[0] for row in cursor.fetchall()]
        with (
            DemoServer("redis", out / ".demo" / "redis", lock.fileno(), lambda: False) as server,
            redis.Redis(unix_socket_path=str(server.socket)) as client,
        ):
            entries = client.xrange(f"{NODE}:test")
            found["redis"] = [int(fields[b"sequence"]) for _, fields in entries]
    return found


def filed(out: Path) -> dict[str, list[int]]:
    """Return the numbers of the test job in the files of other stores, as their own libraries read them."""
    found: dict[str, list[int]] = {}
    for path in sorted((out / NODE).iterdir()):
        if path.name.endswith("_demo.sqlite"):
            with contextlib.closing(sqlite3.connect(path)) as connection:
                rows = connection.execute("SELECT sequence FROM test ORDER BY rowid").fetchall()
            found.setdefault("sqlite", []).extend(row[0] for row in rows)
        elif path.name.endswith("_test.parquet"):
            table = pyarrow.dataset.dataset(path).to_table(columns=["sequence"])
            found.setdefault("parquet", []).extend(table.column("sequence").to_numpy().tolist())
        elif path.name.endswith("_test.h5"):
            with h5py.File(path) as file:
                found.setdefault("hdf5", []).extend(file["data"]["sequence"].tolist())
        elif path.name.endswith("_test.root"):
            with path.open("rb") as opened, uproot.open(opened) as file:
                found.setdefault("root", []).extend(file["tree"]["sequence"].array(library="np").tolist())
    return found


def check_ledger(out: Path, stores: set[str], runs: int) -> list[LedgerRow]:
    """Check that each table is whole in each of the stores, once per run."""
    rows = read_ledger(out / ".state")
    assert all(row.balances and row.closed and not row.waiting and not row.dropped for row in rows), rows
    tables: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if not row.tag:
            tables.setdefault((row.job, row.stream), set()).add(row.store.removeprefix("store_"))
    assert sorted(job for job, _ in tables) == sorted([*TABLE_JOBS] * runs)
    assert all(held == stores for held in tables.values()), tables
    for _, stream in tables:
        assert len({row.stored for row in rows if row.stream == stream}) == 1
    return rows


@pytest.mark.usefixtures("_servers")
def test_every_store_holds_every_row_and_a_second_demo_continues_each_of_them(home: Path):
    out, stores = home / "out", set(chosen_stores("all"))
    for runs in (1, 2):
        said = Demo(out, 4, "all").finish()
        assert "left out" not in said
        assert "balanced" in said
        rows = check_ledger(out, stores - {"raw"}, runs)
        assert {row.store for row in rows if row.tag == "waveforms"} == {"store_raw"}
        written = numbers(out)
        assert written.count(0) == runs
        assert served(out) == {"mysql": written, "redis": written}
        assert filed(out) == dict.fromkeys(stores - {"csv", "raw", "mysql", "redis"}, written)
    stored = open_out(out)
    for store in set(stored.stores.values()) - {"raw"}:
        assert stored.read(store=store, job="test").column("sequence").to_pylist() == written


@pytest.mark.usefixtures("_servers")
def test_a_demo_that_is_killed_takes_its_servers_along_and_the_next_one_has_every_row(home: Path):
    out = home / "out"
    demo = Demo(out, 0, "csv,mysql,redis")
    demo.wait_said(" stored")
    end = time.monotonic() + LIMIT_S
    while len(numbers(out) if (out / NODE).exists() else ()) < 100:
        assert time.monotonic() < end, demo.said
        time.sleep(0.05)
    family, end = demo.family(), time.monotonic() + LIMIT_S
    assert {"mariadbd", "redis-server"} <= {process.name() for process in family}
    second = Demo(out, 2, "csv,mysql,redis")
    second.wait_said("writing to")
    demo.process.kill()
    demo.process.wait()
    while True:
        has_begun = "gets a server" in second.said
        left = [process for process in family if lives(process)]
        assert not (has_begun and left)
        assert second.process.poll() is None, (second.said, left)
        assert time.monotonic() < end, (second.said, left)
        if has_begun:
            break
        time.sleep(0.02)
    second.finish()
    check_ledger(out, {"csv", "mysql", "redis"}, 2)
    written = numbers(out)
    assert written.count(0) == 2
    assert served(out) == {"mysql": written, "redis": written}


@pytest.mark.usefixtures("_servers")
def test_a_demo_that_ends_while_its_servers_are_made_leaves_nothing_half_made(home: Path):
    out = home / "out"
    for number in (signal.SIGINT, signal.SIGKILL):
        demo = Demo(out, 0, "all")
        demo.wait_said("mysql gets a server")
        demo.process.send_signal(number)
        assert demo.process.wait(LIMIT_S) in (0, -signal.SIGKILL)
        assert "left out" not in demo.said
    Demo(out, 1, "mysql").finish()
    check_ledger(out, {"mysql"}, 1)


def test_a_server_that_does_not_start_is_left_out_with_its_words_and_the_other_stores_have_all(home: Path):
    require("setpriv")
    program = home / "redis-server"
    program.write_text("#!/bin/sh\necho no memory for me\nexit 3\n")
    program.chmod(0o755)
    said = Demo(home / "out", 2, "csv,redis", path=str(home)).finish()
    assert "redis is left out" in said
    assert "no memory for me" in said
    check_ledger(home / "out", {"csv"}, 1)


def test_a_second_demo_in_a_directory_waits_for_the_first_and_touches_nothing_meanwhile(home: Path):
    out = home / "out"
    (out / ".demo").mkdir(parents=True)
    with (out / ".demo" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        demo = Demo(out, 1, "csv")
        demo.wait_said("writing to")
        with pytest.raises(subprocess.TimeoutExpired):
            demo.process.wait(1.0)
        assert [path.name for path in out.rglob("*")] == [".demo", "lock"]
    demo.finish()
    check_ledger(out, {"csv"}, 1)
