from __future__ import annotations

import csv
from pathlib import Path

from edgedaq.frame import Kind
from edgedaq.storage import Storage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.file_backend import FileBackend

from tests.contract.store_contract import FileStoreContract
from tests.contract.store_feed import NODE, Feed


class TestStoreCSV(FileStoreContract):
    key = "csv"

    def make_backend(self, base: Path, storage: Storage) -> Backend:
        return FileBackend(CsvFormat(), base / "state", base / "out", storage)

    def read_pairs(self, base, file_path):
        with (base / "out" / NODE / file_path).open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["sequence", "value"]
        return [(int(sequence), float(value)) for sequence, value in rows[1:]]

    def read_marks(self, base):
        path = base / "out" / NODE / "_marks.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def put_bad_frame(self, feed: Feed, stream: int) -> int:
        return feed.put(Kind.PACKED, stream, b"not ten rows", rows=10).seq
