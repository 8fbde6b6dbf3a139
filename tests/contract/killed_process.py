"""A store in a process of its own, which tells its commits on its output until it is killed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedaq.storage import OsStorage
from edgedaq_aggregator.stores.engine import StoreEngine

from tests.contract.store_feed import Feed, flat

COMMITS = 60
ROWS_PER_COMMIT = 50


def long_feed(store_config: dict[str, Any]) -> tuple[Feed, list[tuple[int, float]]]:
    """Return a feed of so many commits, and its rows."""
    feed = Feed()
    feed.open(1, store_config)
    return feed, flat(feed.pairs(1, part * ROWS_PER_COMMIT, ROWS_PER_COMMIT) for part in range(COMMITS))


@contextmanager
def started(contract: type, base: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a contract's store on the long feed; the process has ended when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.killed_process", contract.__module__, contract.__name__, base],
        env={**os.environ, "PYTHONPATH": "common:aggregator:.", **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _run(module: str, name: str, base: str) -> None:
    store = getattr(importlib.import_module(module), name)()
    feed, _ = long_feed(store.config())
    backend = store.make_backend(Path(base), OsStorage())
    engine = StoreEngine(store.key, backend, lambda _: None)
    position = engine.position or 0
    engine.begin(position, feed.table_at(position))
    for entry in feed.since(position):
        engine.take([entry])
        engine.commit()()
        engine.committed_now()
        print(engine.commit_count, flush=True)
    engine.commit(is_clean=True)()
    engine.committed_now()
    backend.close()


if __name__ == "__main__":
    _run(*sys.argv[1:])
