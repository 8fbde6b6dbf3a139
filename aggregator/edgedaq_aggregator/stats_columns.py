"""The columns of both statistics files, in order; ``docs/statistics.md`` defines each."""

from __future__ import annotations

__all__ = ["JOB_COLUMNS", "NODE_COLUMNS"]

JOB_COLUMNS = (
    "supervisor",
    "daq_job",
    "is_alive",
    "last_message_in_date",
    "message_in_count",
    "last_message_out_date",
    "message_out_count",
    "message_in_queue_size",
    "message_out_queue_size",
    "last_restart_date",
    "restart_count",
    "unique_id",
    "state",
    "message_in_megabytes",
    "message_out_megabytes",
    "dropped_count",
    "put_blocked_s",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "cpu_percent",
    "rss_megabytes",
)
"""Columns of ``stats.csv``; the seed's first, in its order."""

NODE_COLUMNS = (
    "supervisor",
    "is_alive",
    "last_active",
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
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "spool_megabytes",
    "oldest_unacknowledged_s",
    "jobs_running",
    "jobs_total",
    "restart_count",
    "cpu_percent",
    "rss_megabytes",
    "clock_offset_ms",
    "clock_error_ms",
    "version",
)
"""Columns of ``stats_remote.csv``; the seed's first, in its order."""
