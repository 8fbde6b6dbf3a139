"""The statistics of all nodes as the rows of two files: adding up, without I/O.

What comes in, and how it is kept from being counted twice::

    NodeReport of a node      sums of one life of its supervisor: a newer report of that life replaces the
                              older one; what an ended life of the supervisor had summed is folded once
    counts of the intake      per node, since the intake started: replaced within its life, folded after
    accounts of streams       of the intake and of each store: what they have grown by is added

So a replayed, repeated or lost report changes no total, and a total goes down for nobody's restart.
``to_map`` and ``from_map`` keep the totals over restarts of the aggregator itself.

A node is alive while something of it arrived within ``SILENT_S``; the jobs of a silent node are not alive,
whatever they were when it spoke last. When the aggregator ends, nothing arrives any more: in the files that
it leaves nobody is alive, and of its own jobs they say how they ended. Rows are never removed.
``docs/statistics.md`` defines every column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec
from edgedaq.clock import iso_utc
from edgedaq.errors import WireError
from edgedaq.names import ALL_NODES
from edgedaq.stats import NodeReport, QuantileSketch
from edgedaq.store_config import STORE_TYPES

from edgedaq_aggregator.accounts import JobAccount, NodeAccount, sketch_of, sum_known
from edgedaq_aggregator.stats_columns import JOB_COLUMNS, NODE_COLUMNS
from edgedaq_aggregator.stream_counts import Arrived, Backlog, Stored, StreamCounts

__all__ = ["NODES_MAX", "SILENT_S", "Merge"]

SILENT_S = 5.0
"""A node of which nothing arrives for so long is not alive."""

NODES_MAX = 4096
"""Nodes that are remembered; reports of further ones are not taken."""

Row = dict[str, Any]

_ALIVE_STATES = frozenset({"RUNNING", "BLOCKED", "STOPPING"})
_RUNNING_STATES = frozenset({"RUNNING", "BLOCKED"})
_MIB = 1 << 20
_SILENT_NS = int(SILENT_S * 1e9)
_QUANTILES = {"latency_p50_ms": 0.5, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99}
_ARRIVED = ("in_bytes", "duplicate_count", "gap_count", "dropped_rows")
_SUMMED = (
    "message_in_count",
    "message_in_megabytes",
    "message_out_count",
    "message_out_megabytes",
    "message_in_mb_per_s",
    "message_out_mb_per_s",
    "stored_count",
    "waiting_count",
    "dropped_count",
    "duplicate_count",
    "gap_count",
    "spool_megabytes",
    "jobs_running",
    "jobs_total",
    "restart_count",
    "cpu_percent",
    "rss_megabytes",
)


class Merge:
    """All nodes that this aggregator has ever heard of.

    Times are passed in: ``now_ns`` is monotonic of this process, ``t_utc_ns`` the wall clock beside it.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, NodeAccount] = {}
        self.arrived = StreamCounts()
        self.stored: dict[str, StreamCounts] = {}
        self.backlog = Backlog()
        self._backlog_ns = 0

    def update(self, report: NodeReport, now_ns: int, t_utc_ns: int) -> bool:
        """Take a node's report; False when it is older than what is held, or there are too many nodes."""
        account = self._account(report.node)
        if account is None or not account.update(report):
            return False
        account.heard_ns = now_ns
        account.last_active_ns = t_utc_ns
        out_bytes = sum_known(
            [total.out_bytes for total in map(JobAccount.total, account.jobs.values()) if total]
        )
        account.out_rate.add(out_bytes or 0, now_ns)
        return True

    def update_intake(
        self, life: str, nodes: Mapping[str, Mapping[str, Any]], streams: Mapping[str, Arrived], now_ns: int
    ) -> None:
        """Take what the intake's current life tells.

        Args:
            nodes: Counts since it started (``in_bytes``, ``duplicate_count``, ``gap_count``,
                ``dropped_rows``), ``last_active_ns`` (UTC), ``latency`` and ``latency_by_job`` (sketches of
                seconds, see ``QuantileSketch.to_list``), ``clock_offset_ms`` and ``clock_error_ms``.
            streams: All that are open, and the newest that have ended.
        """
        for stream, arrived in streams.items():
            if self._account(arrived.node) is not None:
                self.arrived.update(stream, arrived.node, arrived.rows)
        self.backlog.take_arrived(streams)
        self._backlog_ns = now_ns
        for node, told in nodes.items():
            account = self._account(node)
            if account is None:
                continue
            account.arrived.update(
                life, {key: told[key] for key in _ARRIVED if isinstance(told.get(key), int)}
            )
            last_active_ns = told.get("last_active_ns")
            # News by being different, not later: the clock of this machine may have been put back.
            if isinstance(last_active_ns, int) and last_active_ns != account.link.get("last_active_ns"):
                account.last_active_ns = last_active_ns
                account.heard_ns = now_ns
            account.link, account.link_ns = dict(told), now_ns
            account.in_rate.add(account.arrived.total("in_bytes") or 0, now_ns)

    def update_store(self, store: str, key: str, streams: Mapping[str, Stored]) -> None:
        """Take what a store of a kind (``csv``) has committed of its newest streams.

        A stream that the intake has not told of yet is counted once it has.
        """
        counts = self.stored.setdefault(store, StreamCounts())
        for stream, stored in streams.items():
            arrived = self.backlog.arrived.get(stream)
            if arrived is not None:
                counts.update(stream, arrived.node, stored.rows)
        self.backlog.take_stored(store, key, streams)

    def end(self, own_node: str) -> None:
        """Learn that this aggregator ends, and so hears nobody any more; of its own jobs it knows the end."""
        for account in self.nodes.values():
            account.heard_ns = None
            account.has_ended = account.node == own_node

    def job_rows(self, now_ns: int) -> list[Row]:
        """Return the rows of ``stats.csv``: every job of every node, by name."""
        return [
            _job_row(account, job, now_ns, self._queue_of(job, now_ns))
            for _, account in sorted(self.nodes.items())
            for _, job in sorted(account.jobs.items())
        ]

    def node_rows(self, now_ns: int) -> list[Row]:
        """Return the rows of ``stats_remote.csv``: every node by name, then ``ALL``."""
        held = [account for _, account in sorted(self.nodes.items())]
        waiting = self.backlog.waiting_rows() if self._is_backlog_known(now_ns) else {}
        rows = [_node_row(account, now_ns) | self._counts(account.node, waiting) for account in held]
        return [*rows, _all_row(rows, held, now_ns)]

    def to_map(self) -> dict[str, Any]:
        """Return what must outlive this process."""
        return {
            "version": 1,
            "nodes": [account.to_map() for account in self.nodes.values()],
            "arrived": msgspec.to_builtins(self.arrived),
            "stored": msgspec.to_builtins(self.stored),
        }

    @classmethod
    def from_map(cls, value: object) -> Self:
        """Return the merge that ``to_map`` described.

        Raises:
            WireError: It is not that.
        """
        if (
            not isinstance(value, dict)
            or value.get("version") != 1
            or not isinstance(value.get("nodes"), list)
        ):
            message = "kept statistics must be a map of version 1 with a list of nodes"
            raise WireError(message)
        merge = cls()
        for kept in value["nodes"]:
            account = NodeAccount.from_map(kept)
            merge.nodes[account.node] = account
        try:
            merge.arrived = msgspec.convert(value.get("arrived", {}), StreamCounts)
            merge.stored = msgspec.convert(value.get("stored", {}), dict[str, StreamCounts])
        except msgspec.ValidationError as e:
            message = f"kept statistics are not valid: {e}"
            raise WireError(message) from e
        return merge

    def _counts(self, node: str, waiting: Mapping[str, int]) -> Row:
        """Return what is counted by streams."""
        return {
            "message_in_count": self.arrived.totals.get(node),
            "stored_count": sum_known([counts.totals.get(node) for counts in self.stored.values()]),
            "waiting_count": waiting.get(node),
        }

    def _queue_of(self, job: JobAccount, now_ns: int) -> int | None:
        """Return what waits for a store; only stores of this aggregator have their types."""
        is_store = job.report.job_type in STORE_TYPES.values() and self._is_backlog_known(now_ns)
        return self.backlog.waiting_for(job.report.job) if is_store else None

    def _is_backlog_known(self, now_ns: int) -> bool:
        return self._backlog_ns > 0 and now_ns - self._backlog_ns <= _SILENT_NS

    def _account(self, node: str) -> NodeAccount | None:
        account = self.nodes.get(node)
        if account is None and len(self.nodes) < NODES_MAX:
            account = self.nodes[node] = NodeAccount(node)
        return account


def _job_row(account: NodeAccount, job: JobAccount, now_ns: int, queue: int | None) -> Row:
    """Return a job's row; its gauges only while it lives: nobody knows those of a silent node.

    Args:
        queue: What waits for it, where its own process cannot tell.
    """
    is_alive = account.is_alive(now_ns, _SILENT_NS)
    is_known = (is_alive or account.has_ended) and job.is_listed
    lives = is_alive and job.is_listed and job.report.state in _ALIVE_STATES
    total = job.total()
    by_job = account.link_at(now_ns, _SILENT_NS).get("latency_by_job")
    row: Row = {
        "supervisor": account.node,
        "daq_job": job.report.job_type,
        "is_alive": lives,
        "last_restart_date": iso_utc(job.report.last_restart_ns),
        "restart_count": job.restart_count,
        "unique_id": job.report.job,
        "state": job.report.state if is_known else None,
        **_latency(sketch_of(by_job.get(job.report.job)) if isinstance(by_job, dict) else None),
    }
    if total is not None:
        row |= {
            "last_message_in_date": iso_utc(total.last_in_ns),
            "message_in_count": total.in_count,
            "last_message_out_date": iso_utc(total.last_out_ns),
            "message_out_count": total.out_count,
            "message_in_megabytes": _mebibytes(total.in_bytes),
            "message_out_megabytes": _mebibytes(total.out_bytes),
            "dropped_count": total.dropped_count,
            "put_blocked_s": round(total.put_blocked_s, 3),
        }
    if total is not None and lives:
        row |= {
            "message_in_queue_size": queue if total.in_queue is None else total.in_queue,
            "message_out_queue_size": total.out_queue,
            "cpu_percent": _rounded(total.cpu_percent, 1),
            "rss_megabytes": _mebibytes(total.rss_bytes),
        }
    return {column: row.get(column) for column in JOB_COLUMNS}


def _node_row(account: NodeAccount, now_ns: int) -> Row:
    """Return a node's row."""
    is_alive = account.is_alive(now_ns, _SILENT_NS)
    link = account.link_at(now_ns, _SILENT_NS)
    totals = [total for total in map(JobAccount.total, account.jobs.values()) if total is not None]
    arrived = account.arrived
    row: Row = {
        "supervisor": account.node,
        "is_alive": is_alive,
        "last_active": iso_utc(account.last_active_ns),
        "message_in_megabytes": _mebibytes(arrived.total("in_bytes")),
        "message_out_count": sum_known([total.out_count for total in totals]),
        "message_out_megabytes": _mebibytes(sum_known([total.out_bytes for total in totals])),
        "dropped_count": arrived.total("dropped_rows"),
        "duplicate_count": arrived.total("duplicate_count"),
        "gap_count": arrived.total("gap_count"),
        "jobs_total": sum(job.is_listed for job in account.jobs.values()),
        "restart_count": sum(job.restart_count for job in account.jobs.values()),
        "version": account.version or None,
        "clock_offset_ms": _rounded(link.get("clock_offset_ms"), 3),
        "clock_error_ms": _rounded(link.get("clock_error_ms"), 3),
        **_latency(sketch_of(link.get("latency"))),
    }
    if is_alive:
        row |= _node_gauges(account)
    return {column: row.get(column) for column in NODE_COLUMNS}


def _node_gauges(account: NodeAccount) -> Row:
    """Return what is known only while the node speaks."""
    running = [
        job.report.current
        for job in account.jobs.values()
        if job.is_listed and job.report.state in _RUNNING_STATES
    ]
    uplink = next((held.extra for held in running if held is not None and "spool_bytes" in held.extra), {})
    processes = [held for held in running if held is not None]
    return {
        "message_in_mb_per_s": _mebibytes(account.in_rate.per_s()),
        "message_out_mb_per_s": _mebibytes(account.out_rate.per_s()),
        "spool_megabytes": _mebibytes(uplink.get("spool_bytes")),
        "oldest_unacknowledged_s": _rounded(uplink.get("oldest_unacknowledged_s"), 3),
        "jobs_running": len(running),
        "cpu_percent": _rounded(sum_known([held.cpu_percent for held in processes]), 1),
        "rss_megabytes": _mebibytes(sum_known([held.rss_bytes for held in processes])),
    }


def _all_row(rows: list[Row], held: list[NodeAccount], now_ns: int) -> Row:
    """Return the row ``ALL``: sums of what is known, latencies of everything together, the oldest wait."""
    whole = QuantileSketch()
    for account in held:
        part = sketch_of(account.link_at(now_ns, _SILENT_NS).get("latency"))
        if part is not None:
            whole.merge(part)
    waits = [row["oldest_unacknowledged_s"] for row in rows if row["oldest_unacknowledged_s"] is not None]
    versions = {row["version"] for row in rows}
    row: Row = {
        "supervisor": ALL_NODES,
        "is_alive": bool(rows) and all(row["is_alive"] for row in rows),
        "last_active": max((row["last_active"] for row in rows), default=""),
        "oldest_unacknowledged_s": max(waits, default=None),
        "version": versions.pop() if len(versions) == 1 else None,
        **{column: _rounded(sum_known([row[column] for row in rows]), 6) for column in _SUMMED},
        **_latency(whole),
    }
    return {column: row.get(column) for column in NODE_COLUMNS}


def _latency(sketch: QuantileSketch | None) -> Row:
    """Return the quantiles of a sketch of seconds, in ms."""
    found = {column: None if sketch is None else sketch.quantile(q) for column, q in _QUANTILES.items()}
    return {column: _rounded(None if value is None else value * 1000, 3) for column, value in found.items()}


def _mebibytes(count: float | None) -> float | None:
    return None if count is None else round(count / _MIB, 6)


def _rounded(value: Any, digits: int) -> Any:
    return round(value, digits) if isinstance(value, float) else value
