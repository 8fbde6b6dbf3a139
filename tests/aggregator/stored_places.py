"""Where each kind of store keeps a feed, and how somebody may change it behind its back."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uproot
from edgedaq_aggregator.reading import Out, open_out
from edgedaq_aggregator.stored import find_stored
from edgedaq_aggregator.stores.mysql import DAQJobStoreMySQLConfig
from edgedaq_aggregator.stores.mysql_server import MySQLServer
from edgedaq_aggregator.stores.redis import DAQJobStoreRedisConfig
from edgedaq_aggregator.stores.redis_server import RedisServer as RedisBackendServer
from edgedaq_aggregator.stores.server_backend import ServerBackend, Suspects
from edgedaq_aggregator.verify import Report, verify

from tests.aggregator.stored_feed import MakeBackend, StoredFeed
from tests.contract.store_feed import NODE, Feed
from tests.servers import MariaDB, RedisServer

__all__ = ["Place", "made_places"]

Found = tuple[str, str]


class Place:
    """A directory with one store."""

    key = ""
    server: Any = None
    servers: Mapping[str, MakeBackend] = {}
    toml = ""
    missing: ClassVar[list[Any]] = [None] * 11
    """What a row comes back as of which everything is missing; of the columns of the test of types."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fed: StoredFeed | None = None

    def config(self, name: str = "data") -> dict[str, Any]:
        """Return the ``store_config`` that has rows go to what is called so."""
        return {self.key: {"file_path": name}}

    def stored(self, feed: Feed) -> Out:
        """Journal and store what is new."""
        if self._fed is None:
            self._fed = StoredFeed(self.root / "out", self.servers)
        self._fed.journal(feed)
        self._fed.store(self.store)
        return open_out(self.path)

    @property
    def store(self) -> str:
        return self.key

    @property
    def path(self) -> Path:
        """What a user gives: the directory of TOML files where that is needed."""
        if not self.toml:
            return self.root / "out"
        directory = self.root / "config"
        if not directory.exists():
            directory.mkdir()
            (directory / "aggregator.toml").write_text(f'out_dir = "{self.root / "out"}"\n')
            (directory / f"store_{self.store}.toml").write_text(self.toml)
        return directory

    def verify(self) -> Report:
        return verify(find_stored(self.path))

    def forget_journal(self) -> None:
        shutil.rmtree(self.root / "out" / ".state" / "journal")

    def change(self, row: int) -> Found:
        """Change the value of a row; return words of where, and of the place."""
        raise NotImplementedError

    def remove(self, row: int) -> Found:
        """Remove a row."""
        raise NotImplementedError


class SqlitePlace(Place):
    key = "sqlite"

    def _run(self, sql: str, row: int) -> Found:
        path = self.root / "out" / NODE / "data"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(sql, (row + 1,))
            connection.commit()
        return str(path), f"row {row + 1}"

    def change(self, row):
        return self._run("UPDATE data SET value = value + 1 WHERE rowid = ?", row)

    def remove(self, row):
        return self._run("DELETE FROM data WHERE rowid = ?", row)


class ParquetPlace(Place):
    key = "parquet"

    def change(self, row):
        for path in sorted((self.root / "out" / NODE / "data").glob("*.parquet")):
            table = pq.ParquetFile(path).read()
            if row < table.num_rows:
                values = table["value"].to_pylist()
                values[row] += 1.0
                pq.write_table(table.set_column(1, "value", [values]), path)
                return str(path), f"row {row}"
            row -= table.num_rows
        raise AssertionError(row)

    def remove(self, row):
        for path in sorted((self.root / "out" / NODE / "data").glob("*.parquet")):
            table = pq.ParquetFile(path).read()
            if row < table.num_rows:
                pq.write_table(pa.concat_tables([table.slice(0, row), table.slice(row + 1)]), path)
                return str(path), f"row {row}"
            row -= table.num_rows
        raise AssertionError(row)


class ContainerPlace(Place):
    missing: ClassVar[list[Any]] = [
        -(2**63), 2**64 - 1, math.nan, math.nan, None, None, "", b"",
        [65535, 65535], [[-(2**31)] * 2] * 2, [],
    ]  # fmt: skip

    def rewrite(self, columns: dict[str, Any]) -> None:
        """Make the file anew, of these columns."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        table = open_out(self.path).read()
        return {name: table[name].to_numpy().copy() for name in table.column_names}

    @property
    def file(self) -> Path:
        return self.root / "out" / NODE / "data"

    def change(self, row):
        columns = self.columns()
        columns["value"][row] += 1
        self.rewrite(columns)
        return str(self.file), f"row {row}"

    def remove(self, row):
        columns = {name: np.delete(values, row) for name, values in self.columns().items()}
        self.rewrite(columns)
        left = len(columns["value"])
        return str(self.file), f"row {min(row, left - 1)}"


class RootPlace(ContainerPlace):
    key = "root"

    def rewrite(self, columns):
        with uproot.recreate(self.file) as file:
            tree = file.mktree("tree", {name: values.dtype for name, values in columns.items()})
            tree.extend(columns)


class Hdf5Place(ContainerPlace):
    key = "hdf5"

    def rewrite(self, columns):
        rows = np.empty(len(columns["value"]), [(name, values.dtype) for name, values in columns.items()])
        for name, values in columns.items():
            rows[name] = values
        with h5py.File(self.file, "w") as file:
            file["data"] = rows


class MySQLPlace(Place):
    key = "mysql"

    def __init__(self, root: Path, server: MariaDB) -> None:
        super().__init__(root)
        self.server = server
        server.rows("CREATE DATABASE daq")
        told: dict[str, Any] = {"unix_socket": str(server.socket), "user": "root", "database": "daq"}
        config = DAQJobStoreMySQLConfig(daq_job_type="DAQJobStoreMySQL", **told)
        self.servers = {"mysql": lambda own, *_: ServerBackend(MySQLServer(config), own, Suspects())}
        lines = [f'{key} = "{value}"' for key, value in told.items()]
        self.toml = "\n".join(['daq_job_type = "DAQJobStoreMySQL"', *lines])

    def config(self, name="data"):
        return {"mysql": {"table_name": name}}

    def _run(self, sql: str, row: int) -> Found:
        ids = [
            found[0] for found in self.server.rows("SELECT edgedaq_id FROM data ORDER BY 1", database="daq")
        ]
        after = ids[row + 1] if row + 1 < len(ids) else ids[row - 1]
        self.server.rows(sql, ids[row], database="daq")
        return "table data", str(ids[row] if sql.startswith("UPDATE") else after)

    def change(self, row):
        return self._run("UPDATE data SET value = value + 1 WHERE edgedaq_id = %s", row)

    def remove(self, row):
        return self._run("DELETE FROM data WHERE edgedaq_id = %s", row)


class RedisPlace(Place):
    key = "redis"
    options: Mapping[str, Any] = {}

    def __init__(self, root: Path, server: RedisServer) -> None:
        super().__init__(root)
        self.server = server
        told: dict[str, Any] = {"unix_socket": str(server.socket)}
        config = DAQJobStoreRedisConfig(daq_job_type="DAQJobStoreRedis", **told)
        self.servers = {"redis": lambda own, *_: ServerBackend(RedisBackendServer(config), own, Suspects())}
        self.toml = f'daq_job_type = "DAQJobStoreRedis"\nunix_socket = "{server.socket}"\n'

    def config(self, name="data"):
        return {"redis": {"key": name, **self.options}}

    def change(self, row):
        """An entry cannot be changed: all are written again, one of them otherwise."""
        key = f"{NODE}:data"
        with self.server.client() as client:
            entries = client.xrange(key)
            client.delete(key)
            for at, (number, fields) in enumerate(entries):
                if at == row:
                    fields[b"value"] = b"-1"
                client.xadd(key, fields, id=number)
        return key, entries[row][0].decode()

    def remove(self, row):
        key = f"{NODE}:data"
        with self.server.client() as client:
            entries = client.xrange(key)
            client.xdel(key, entries[row][0])
        after = row + 1 if row + 1 < len(entries) else row - 1
        return key, entries[after][0].decode()


class PackedPlace(RedisPlace):
    options = {"packed": True}  # noqa: RUF012

    def change(self, row):
        key = f"{NODE}:data"
        with self.server.client() as client:
            entries = client.xrange(key)
            client.delete(key)
            for number, fields in entries:
                count = int(fields[b"rows"])
                if 0 <= row < count:
                    table = pa.ipc.open_stream(fields[b"arrow"]).read_all()
                    values = table["value"].to_pylist()
                    values[row] += 1.0
                    sink = pa.BufferOutputStream()
                    changed = table.set_column(1, "value", [values])
                    with pa.ipc.new_stream(sink, changed.schema) as writer:
                        writer.write_table(changed)
                    fields[b"arrow"] = sink.getvalue().to_pybytes()
                    place = f"{number.decode()}, row {row}"
                client.xadd(key, fields, id=number)
                row -= count
        return key, place

    def remove(self, row):
        """The entry that has it."""
        key = f"{NODE}:data"
        with self.server.client() as client:
            entries = client.xrange(key)
            at = 0
            while row >= int(entries[at][1][b"rows"]):
                row -= int(entries[at][1][b"rows"])
                at += 1
            client.xdel(key, entries[at][0])
        return key, entries[at + 1 if at + 1 < len(entries) else at - 1][0].decode()


@contextmanager
def made_places(kind: str, root: Path) -> Iterator[Place]:
    """Make a place of a kind, with a server of its own where it needs one."""
    files = {"sqlite": SqlitePlace, "parquet": ParquetPlace, "root": RootPlace, "hdf5": Hdf5Place}
    if kind in files:
        yield files[kind](root)
        return
    options = ("--appendonly", "yes", "--appendfsync", "always")
    server: MariaDB | RedisServer = MariaDB("--local-infile=1") if kind == "mysql" else RedisServer(*options)
    try:
        server.start()
        if isinstance(server, MariaDB):
            yield MySQLPlace(root, server)
        else:
            yield {"redis": RedisPlace, "packed": PackedPlace}[kind](root, server)
    finally:
        server.close()
