"""Tells when something that happens often may be logged again: counted always, said once per interval."""

from __future__ import annotations

__all__ = ["LogLimit"]

_INTERVAL_NS = 10_000_000_000


class LogLimit:
    """One kind of event. Not thread-safe."""

    def __init__(self, interval_ns: int = _INTERVAL_NS) -> None:
        self._interval_ns = interval_ns
        self._next_ns: int | None = None
        self._count = 0

    def note(self, now_ns: int) -> int:
        """Count an event; return how many there were since the last logged one, 0 when to say nothing."""
        self._count += 1
        if self._next_ns is not None and now_ns < self._next_ns:
            return 0
        self._next_ns = now_ns + self._interval_ns
        count, self._count = self._count, 0
        return count
