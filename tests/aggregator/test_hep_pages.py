"""What ``docs/stores/root.md`` and ``hdf5.md`` say about reading data back is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import uproot
from edgedaq.columns import Column, Schema
from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.engine import StoreEngine
from edgedaq_aggregator.stores.file_backend import FileBackend, FileFormat
from edgedaq_aggregator.stores.hdf5 import Hdf5Format
from edgedaq_aggregator.stores.root import RootFormat

from tests.contract.store_feed import NODE, Feed

PAGES = Path(__file__).parents[2] / "docs" / "stores"
NOTES = Schema((Column("n", "i8"), Column("note", "utf8")))


def stored(base: Path, feed: Feed, file_format: FileFormat) -> Path:
    backend = FileBackend(file_format, base / "state", base / "out", OsStorage())
    try:
        engine = StoreEngine(file_format.key, backend, lambda _: None)
        engine.begin(0, feed.table_at(0))
        engine.take(feed.since(0))
        engine.commit(is_clean=True)()
        engine.committed_now()
    finally:
        backend.close()
    return base / "out" / NODE


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(code, found)  # noqa: S102 -- our own page
    return found


def test_root_is_read_back_as_the_page_says(tmp_path, monkeypatch):
    feed = Feed()
    feed.open(1, {"root": {"file_path": "events.root"}})
    rows = feed.pairs(1, 0, 100)
    monkeypatch.chdir(stored(tmp_path, feed, RootFormat()))
    (code,) = blocks("root.md")
    opened = uproot.open

    def without_threads(path: str) -> Any:
        return opened(path, handler=uproot.source.file.MemmapSource)

    monkeypatch.setattr(uproot, "open", without_threads)
    events = run(code)["events"]
    assert list(zip(events["sequence"].to_list(), events["value"].to_list(), strict=True)) == rows


def test_hdf5_is_read_back_as_the_page_says(tmp_path, monkeypatch):
    feed = Feed()
    feed.open(1, {"hdf5": {"file_path": "events.h5"}})
    rows = feed.pairs(1, 0, 200)
    feed.open(2, {"hdf5": {"file_path": "notes.h5"}}, schema=NOTES)
    notes = ["µ", "", "a note", "", "the last"]
    feed.rows(2, list(enumerate(notes)))
    monkeypatch.chdir(stored(tmp_path, feed, Hdf5Format()))
    whole, newest, texts = blocks("hdf5.md")
    assert run(whole)["rows"].tolist() == rows
    assert run(newest)["newest"].tolist() == rows[100:]
    assert run(texts)["notes"] == notes


@pytest.mark.parametrize("page", ["root.md", "hdf5.md"])
def test_each_page_says_what_the_sample_says(page):
    sample = PAGES.parents[1] / "configs" / "examples" / f"store_{page[:-3]}.toml"
    text = (PAGES / page).read_text(encoding="utf-8")
    daq_job_type = re.findall(r'^daq_job_type = "(\w+)"', sample.read_text(), re.MULTILINE)[0]
    assert f'daq_job_type = "{daq_job_type}"' in text
    assert f"[{sample.name}]" in text
