"""What the pages of ``docs/stores`` say about reading data back is run as it stands."""

from __future__ import annotations

import csv
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import pyarrow.csv
import pytest
from edgedaq.columns import Column, Schema
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.csv import CsvFormat
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend, FileFormat
from edgedaq_aggregator.stores.marks import MARKS_HEADER
from edgedaq_aggregator.stores.parquet import ParquetBackend
from edgedaq_aggregator.stores.raw import RawFormat
from edgedaq_aggregator.stores.sqlite import SqliteBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.store_feed import NODE, Feed

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "stores.md").read_text(encoding="utf-8")
TEXTS = Schema((Column("a", "utf8"), Column("b", "utf8")))


def store(base: Path, feed: Feed, file_format: FileFormat) -> Path:
    backend = FileBackend(file_format, base / "state" / file_format.key, base / "out", OsStorage())
    return stored_by(backend, file_format.key, feed, base)


def stored_by(backend: Backend, key: str, feed: Feed, base: Path) -> Path:
    try:
        engine = StoreEngine(key, backend, lambda _: None)
        engine.begin(engine.position or 0, feed.table_at(engine.position or 0))
        engine.take(feed.since(0))
        engine.commit(is_clean=True)()
        engine.committed_now()
    finally:
        backend.close()
    return base / "out" / NODE


def run(key: str, number: int) -> dict[str, Any]:
    page = (DOCS / "stores" / f"{key}.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # what a reader types closes no file
        exec(code, found)  # noqa: S102 -- our own page
    return found


def test_csv_is_read_back_as_the_page_says(tmp_path, monkeypatch):
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "events.csv"}})
    feed.pairs(1, 0, 100)
    monkeypatch.chdir(store(tmp_path, feed, CsvFormat()))
    assert [int(row["sequence"]) for row in run("csv", 0)["rows"]] == list(range(100))
    assert run("csv", 1)["table"].to_pydict() == {
        "sequence": list(range(100)),
        "value": [n / 4 for n in range(100)],
    }


def test_compressed_csv_is_read_back_as_the_page_says(tmp_path):
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "events.csv", "use_zstd": True}})
    for part in range(5):
        feed.pairs(1, 10 * part, 10)
        directory = store(tmp_path, feed, CsvFormat())
    assert pyarrow.csv.read_csv(directory / "events.csv.zst")["sequence"].to_pylist() == list(range(50))


def test_raw_is_read_back_as_the_page_says(tmp_path, monkeypatch):
    feed = Feed()
    feed.open(1, {"raw": {"file_path": "waveforms.bin"}}, form="raw", schema=None)
    feed.messages(1, [struct.pack("<Qq512h", n, n, *range(512)) for n in range(9)])
    feed.open(2, {"raw": {"file_path": "messages.bin", "length_prefix": True}}, form="raw", schema=None)
    feed.messages(2, [b"a", b"", b"long one"])
    monkeypatch.chdir(store(tmp_path, feed, RawFormat()))
    waveforms = run("raw", 0)["waveforms"]
    assert waveforms["event"].tolist() == list(range(9))
    assert waveforms["adc"][8].tolist() == list(range(512))
    assert run("raw", 1)["messages"] == [b"a", b"", b"long one"]


@pytest.mark.parametrize("key", ["sqlite", "parquet"])
def test_tables_are_read_back_as_their_pages_say(tmp_path, monkeypatch, key):
    feed = Feed()
    feed.open(1, {key: {"file_path": f"data.{key}"}})
    expected = feed.pairs(1, 0, 100)
    made = tmp_path / "state", tmp_path / "out", OsStorage()
    backend = SqliteBackend(*made) if key == "sqlite" else ParquetBackend(*made)
    monkeypatch.chdir(stored_by(backend, key, feed, tmp_path))
    found = run(key, 0)
    if key == "sqlite":
        found["connection"].close()
        assert found["rows"] == expected
    else:
        assert found["table"].to_pydict() == {
            "sequence": list(range(100)),
            "value": [n / 4 for n in range(100)],
        }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=8)] * 2), min_size=1)
)
def test_any_text_is_read_back_by_the_csv_module(tmp_path_factory, rows):
    feed = Feed()
    feed.open(1, {"csv": {"file_path": "texts.csv"}}, schema=TEXTS)
    feed.rows(1, rows)
    directory = store(tmp_path_factory.mktemp("texts"), feed, CsvFormat())
    with (directory / "texts.csv").open(newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == [("a", "b"), *rows]


@pytest.mark.parametrize("column", MARKS_HEADER.decode().strip().split(","))
def test_the_page_names_every_column_of_marks(column):
    assert f"`{column}`" in PAGE.split("## Marks")[1]
