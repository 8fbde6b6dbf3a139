"""How a supervisor's service does, in one line for ``systemctl status``; pure but for the rates it is given.

::

    5 of 6 jobs run, 1200 rows/s; BACKOFF: hv (cannot open /dev/ttyUSB0); link up, spool 12 MiB
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgedaq.stats import WindowedRate
from edgedaq.units import format_bytes

__all__ = ["JobRates", "one_line"]

_REASON_MAX = 80


def one_line(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Return the line for the jobs of a ``status`` answer."""
    held = list(jobs)
    running = sum(job["state"] in ("RUNNING", "BLOCKED") for job in held)
    devices = [job for job in held if job["group"] == "device"]
    put = sum(job["rates"].get("out_count_per_s") or 0.0 for job in devices)
    parts = [f"{running} of {len(held)} jobs run" + (f", {put:.0f} rows/s" if devices else "")]
    for state in ("BLOCKED", "BACKOFF", "FAILED"):
        names = [_named(job) for job in held if job["state"] == state]
        if names:
            parts.append(f"{state}: {', '.join(names)}")
    parts += [text for job in held for text in _part(job)]
    return "; ".join(parts)


def _named(job: Mapping[str, Any]) -> str:
    reason = str(job.get("reason") or "")
    short = reason if len(reason) <= _REASON_MAX else reason[: _REASON_MAX - 1] + "…"
    return f"{job['unique_id']} ({short})" if short else str(job["unique_id"])


def _part(job: Mapping[str, Any]) -> list[str]:
    """Return what is worth a word of an uplink or an intake."""
    extra = (job.get("total") or {}).get("extra") or {}
    if job["group"] == "uplink" and extra.get("link"):
        down = f" ({extra['reason']})" if extra.get("reason") else ""
        return [f"link {extra['link']}{down}", f"spool {format_bytes(int(extra.get('spool_bytes') or 0))}"]
    if job["group"] == "intake" and isinstance(extra.get("nodes"), dict):
        return [f"{len(extra['nodes'])} nodes known"]
    return []


class JobRates:
    """How fast the counts of one job grow."""

    def __init__(self) -> None:
        self._held = {
            name: WindowedRate()
            for name in ("in_count", "in_bytes", "out_count", "out_bytes", "dropped_count")
        }

    def take(self, total: Any, now_ns: int) -> None:
        """Note the counts of a snapshot, if there is one."""
        if total is not None:
            for name, rate in self._held.items():
                rate.add(getattr(total, name), now_ns)

    def per_s(self) -> dict[str, float | None]:
        """Return the growth of each per second."""
        return {f"{name}_per_s": rate.per_s() for name, rate in self._held.items()}
