"""Tells when something that happens often may be logged again: counted always, said once per interval."""

from __future__ import annotations

__all__ = ["LogBudget", "LogLimit"]

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


class LogBudget:
    """So many lines per interval, whatever happens; what is above is counted. Not thread-safe."""

    def __init__(self, lines: int, interval_ns: int = _INTERVAL_NS) -> None:
        self._lines = lines
        self._interval_ns = interval_ns
        self._begun_ns: int | None = None
        self._left = lines
        self._unsaid = 0

    def take(self, now_ns: int) -> tuple[bool, int]:
        """Return whether a line may be written now, and how many were not since the last one that was."""
        if self._begun_ns is None or now_ns - self._begun_ns >= self._interval_ns:
            self._begun_ns, self._left = now_ns, self._lines
        if not self._left:
            self._unsaid += 1
            return False, 0
        self._left -= 1
        unsaid, self._unsaid = self._unsaid, 0
        return True, unsaid
