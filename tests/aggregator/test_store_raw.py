from __future__ import annotations

import csv
import struct
from pathlib import Path

from edgedaq.frame import Kind
from edgedaq.storage import Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.file_backend import FileBackend
from edgedaq_aggregator.stores.raw import RawFormat

from tests.contract.store_contract import FileStoreContract
from tests.contract.store_feed import NODE, Feed

PAIR = struct.Struct("<qd")


class TestStoreRaw(FileStoreContract):
    key = "raw"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(RawFormat(), base / "state", base / "out", storage)

    def read_pairs(self, base, file_path):
        return list(PAIR.iter_unpack((base / "out" / NODE / file_path).read_bytes()))

    def read_marks(self, base):
        path = base / "out" / NODE / "_marks.raw.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def put_bad_frame(self, feed: Feed, stream: int) -> int:
        return feed.put(Kind.RAW, stream, b"\xff\xff\xff\xff", rows=10).seq
