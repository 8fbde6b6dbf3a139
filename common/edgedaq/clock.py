"""The only place that reads a wall clock.

Intervals, timers and limits use the monotonic clock, which no administrator and no NTP step moves. Wall time
is read only to label data and files, always as UTC nanoseconds.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from pathlib import Path

__all__ = ["boot_id", "iso_utc", "mono_ns", "utc_date", "utc_ns"]

mono_ns = time.monotonic_ns
"""Nanoseconds of this boot's monotonic clock."""

utc_ns = time.time_ns
"""UTC nanoseconds since 1970-01-01, as far as this machine's clock is right."""

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LAST_NS = int((dt.datetime.max.replace(tzinfo=dt.UTC) - _EPOCH).total_seconds()) * 1_000_000_000


def iso_utc(t_utc_ns: int) -> str:
    """Return ISO 8601 UTC with milliseconds, e.g. ``2026-05-01T12:00:00.123Z``; empty for 0 (never)."""
    if not 0 < t_utc_ns < _LAST_NS:
        return ""
    moment = _EPOCH + dt.timedelta(microseconds=t_utc_ns // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def utc_date(t_utc_ns: int) -> str:
    """Return the UTC date of a time, e.g. ``2026-05-01``; times outside the calendar become its edge."""
    clamped = min(max(t_utc_ns, 0), _LAST_NS)
    return (_EPOCH + dt.timedelta(microseconds=clamped // 1000)).strftime("%Y-%m-%d")


def boot_id() -> str:
    """Return what names this boot of this machine: monotonic times compare only within one boot.

    Linux tells it; elsewhere the boot time (to 10 s, it jitters) names it.
    """
    path = Path("/proc/sys/kernel/random/boot_id")
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    booted_s = (utc_ns() - mono_ns()) // 10_000_000_000
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{uuid.getnode()}-{booted_s}"))
