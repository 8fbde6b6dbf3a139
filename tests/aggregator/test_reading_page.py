"""What ``docs/reading.md`` says is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
from edgedaq.schema import Column, Schema

from tests.aggregator.stored_feed import StoredFeed
from tests.contract.store_feed import T0_NS, Feed

PAGE = (Path(__file__).parents[2] / "docs" / "reading.md").read_text(encoding="utf-8")


def test_the_lines_of_the_page_read_back_what_was_stored(tmp_path, monkeypatch):
    feed = Feed()
    feed.open(
        1, {"csv": {"file_path": "a.csv"}}, schema=Schema((Column("t", "timestamp"), Column("n", "i8")))
    )
    feed.rows(1, [[T0_NS, 1], [T0_NS + 86_400_000_000_000 * 3 // 2, 2]])
    feed.gap(1, 1, 5, "dropped by policy")
    made = StoredFeed(tmp_path / "out")
    made.journal(feed)
    made.store("csv")
    monkeypatch.chdir(tmp_path)
    names: dict[str, pa.Table] = {}
    lines = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    exec(compile(lines, "reading.md", "exec"), names)  # noqa: S102  # the page is what is tested
    assert names["table"]["n"].to_pylist() == [1, 2]
    assert names["day"]["n"].to_pylist() == [1]
    assert names["gaps"]["rows"].to_pylist() == [5]
