"""``stats.csv`` and ``stats_remote.csv``: rewritten every second, whole at every moment.

Each file is written beside itself and renamed over itself, so a reader sees the older or the newer one,
never half of one. The totals behind them are kept in ``<state_dir>/statistics.json``, written the same way
every few seconds and at the end, so that no count goes back when the aggregator starts again; a kept file
that is damaged is set aside (``.bad``), and counting starts anew.

A disk that takes nothing stops neither the aggregator nor the counting: it is told once, and tried again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import WireError
from edgedaq.logsetup import get_logger
from edgedaq.stats import NodeReport, Snapshot
from edgedaq.store_config import STORE_TYPES

from edgedaq_aggregator.merge import Merge
from edgedaq_aggregator.stats_columns import JOB_COLUMNS, NODE_COLUMNS
from edgedaq_aggregator.stream_counts import arrived_of, stored_of

__all__ = ["JOBS_FILE", "KEPT_FILE", "NODES_FILE", "Statistics", "csv_text", "replace_file"]

JOBS_FILE = "stats.csv"
NODES_FILE = "stats_remote.csv"
KEPT_FILE = "statistics.json"

_STORE_KEYS = {job_type: key for key, job_type in STORE_TYPES.items()}
_WRITE_NS = 1_000_000_000
_KEEP_NS = 3_000_000_000

log = get_logger()


class Statistics:
    """The aggregator's statistics: takes reports, writes the files. Used from one thread.

    Args:
        out_dir: Where the two files are written; made if it is not there.
        state_dir: Where the totals are kept.
    """

    def __init__(self, out_dir: Path, state_dir: Path) -> None:
        self._out_dir = out_dir
        self._kept_path = state_dir / KEPT_FILE
        self._write_due_ns = 0
        self._keep_due_ns = 0
        self._is_failing = False
        self._own_node = ""
        self.merge = _load(self._kept_path)

    def take(self, report: object) -> None:
        """Take the report of a node as it came from the intake.

        Raises:
            WireError: It is not a report, or bears this aggregator's own name.
        """
        taken = NodeReport.from_map(report)
        if taken.node == self._own_node:
            message = f"a node must not be called {taken.node!r}, which is the aggregator's own supervisor_id"
            raise WireError(message)
        self.merge.update(taken, mono_ns(), utc_ns())

    def take_own(self, report: NodeReport) -> None:
        """Take this aggregator's own report, and from it what its intake and its stores count per node."""
        now_ns = mono_ns()
        self._own_node = report.node
        self.merge.update(report, now_ns, utc_ns())
        # The intake first: it knows whose a stream is that a store tells about.
        for job in sorted(report.jobs, key=lambda job: job.job_type in _STORE_KEYS):
            if job.current is not None:
                self._take_extra(job.current, now_ns)

    def service(self) -> int:
        """Write what is due; return when it is due again (monotonic ns)."""
        now_ns = mono_ns()
        if now_ns >= self._write_due_ns:
            self._write_due_ns = now_ns + _WRITE_NS
            self._try(self._write)
        if now_ns >= self._keep_due_ns:
            self._keep_due_ns = now_ns + _KEEP_NS
            self._try(self._keep)
        return min(self._write_due_ns, self._keep_due_ns)

    def status(self) -> dict[str, Any]:
        """Return the rows of both files, for ``status``."""
        now_ns = mono_ns()
        return {"jobs": self.merge.job_rows(now_ns), "nodes": self.merge.node_rows(now_ns)}

    def close(self) -> None:
        """Write everything a last time; nobody is alive in it, because nobody looks any more."""
        self.merge.end(self._own_node)
        self._try(self._write)
        self._try(self._keep)

    def _take_extra(self, snapshot: Snapshot, now_ns: int) -> None:
        extra = snapshot.extra
        key = _STORE_KEYS.get(snapshot.job_type)
        if key is not None:
            self.merge.update_store(snapshot.job, key, stored_of(extra.get("streams")))
        elif isinstance(extra.get("nodes"), dict):
            streams = arrived_of(extra.get("streams"))
            self.merge.update_intake(snapshot.life, extra["nodes"], streams, now_ns)

    def _write(self) -> None:
        now_ns = mono_ns()
        self._out_dir.mkdir(parents=True, exist_ok=True)
        replace_file(self._out_dir / JOBS_FILE, csv_text(JOB_COLUMNS, self.merge.job_rows(now_ns)).encode())
        replace_file(
            self._out_dir / NODES_FILE, csv_text(NODE_COLUMNS, self.merge.node_rows(now_ns)).encode()
        )

    def _keep(self) -> None:
        self._kept_path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._kept_path, json.dumps(self.merge.to_map()).encode(), is_durable=True)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as e:
            if not self._is_failing:
                self._is_failing = True
                log.warning("statistics.failed", path=e.filename or str(self._out_dir), reason=e.strerror)
        else:
            if self._is_failing:
                self._is_failing = False
                log.info("statistics.resumed")


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as CSV with a header; what is unknown is empty, a claim is ``true`` or ``false``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    return text.getvalue()


def replace_file(path: Path, content: bytes, *, is_durable: bool = False) -> None:
    """Write a file beside ``path`` and rename it over: whoever opens ``path`` sees the old or the new one.

    Args:
        is_durable: Sync before the rename, so that it is one of the two after a power cut as well.

    Raises:
        OSError: The disk does not take it; ``path`` is what it was.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else value


def _load(path: Path) -> Merge:
    try:
        return Merge.from_map(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Merge()
    except (OSError, ValueError, RecursionError, WireError) as e:
        log.warning("statistics.damaged", path=str(path), reason=str(e))
        with contextlib.suppress(OSError):
            path.replace(path.with_suffix(".bad"))
        return Merge()
