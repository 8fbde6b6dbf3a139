"""What the intake counts of each node since it started, and how long its data took to become durable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgedaq.session_messages import Ping
from edgedaq.stats import WindowedSketch

from edgedaq_aggregator.judging import Judged

__all__ = ["JOBS_MAX", "NODES_MAX", "NodeCounts"]

NODES_MAX = 4096
"""Nodes that are counted; further ones are not let in."""

JOBS_MAX = 256
"""Jobs of a node of which a latency is kept."""


class NodeCounts:
    """The counts of one node."""

    def __init__(self) -> None:
        self.is_connected = False
        self.last_active_ns = 0
        self.in_rows = 0
        self.in_bytes = 0
        self.duplicate_count = 0
        self.gap_count = 0
        self.dropped_rows = 0
        self.refused_count = 0
        self.resend_count = 0
        self.cloned_ns = 0
        """When two processes were last seen to displace each other under its name, UTC."""
        self.offset_ns: int | None = None
        self.error_ns: int | None = None
        self.since_boot_ns: int | None = None
        """UTC of this machine minus the node's monotonic clock: no step of the node's clock moves it."""
        self._latency = WindowedSketch()
        self._latency_by_job: dict[str, WindowedSketch] = {}

    @property
    def is_idle(self) -> bool:
        """It is not connected, and nothing that counts ever came from it."""
        return not (self.is_connected or self.in_rows or self.duplicate_count or self.gap_count)

    def take_clock(self, ping: Ping) -> None:
        """Take what the node found of its clocks."""
        self.offset_ns, self.error_ns = ping.offset_ns, ping.error_ns
        if ping.offset_ns is None:
            self.since_boot_ns = None
        else:
            self.since_boot_ns = ping.t_utc_ns - ping.t_mono_ns + ping.offset_ns

    def add(self, judged: Judged) -> None:
        """Count what became of a part."""
        self.in_rows += judged.rows
        self.in_bytes += judged.body_bytes
        self.duplicate_count += judged.duplicate_count
        self.gap_count += judged.gap_count
        self.dropped_rows += judged.dropped_rows

    def add_latencies(self, samples: Iterable[tuple[str, int]], t_utc_ns: int, now_ns: int) -> None:
        """Count frames that became durable at a UTC time of this machine.

        Args:
            samples: Job, and when a frame was put, by the node's monotonic clock.
            now_ns: Monotonic.
        """
        if self.since_boot_ns is None:
            return
        base_ns = t_utc_ns - self.since_boot_ns
        for job, t_put_ns in samples:
            latency_s = max(base_ns - t_put_ns, 0) * 1e-9
            self._latency.add(latency_s, 1, now_ns)
            sketch = self._latency_by_job.get(job)
            if sketch is None:
                if len(self._latency_by_job) >= JOBS_MAX:
                    continue
                sketch = self._latency_by_job[job] = WindowedSketch()
            sketch.add(latency_s, 1, now_ns)

    def to_map(self, now_ns: int) -> dict[str, Any]:
        """Return it for a report."""
        by_job = {job: sketch.sketch(now_ns).to_list() for job, sketch in self._latency_by_job.items()}
        return {
            "connected": self.is_connected,
            "last_active_ns": self.last_active_ns,
            "in_rows": self.in_rows,
            "in_bytes": self.in_bytes,
            "duplicate_count": self.duplicate_count,
            "gap_count": self.gap_count,
            "dropped_rows": self.dropped_rows,
            "refused_count": self.refused_count,
            "resend_count": self.resend_count,
            "cloned_ns": self.cloned_ns,
            "clock_offset_ms": None if self.offset_ns is None else self.offset_ns / 1e6,
            "clock_error_ms": None if self.error_ns is None else self.error_ns / 1e6,
            "latency": self._latency.sketch(now_ns).to_list(),
            "latency_by_job": {job: held for job, held in by_job.items() if held},
        }
