"""How far stores are behind, when they will be through, when the journal is full: from samples, without I/O.

An estimate is what the last minutes say, continued in a straight line: ``None`` where they say that it does
not happen, or too little. A level is told once when it is reached, and again only after it was left::

    level   the journal is full in          left when that is more than
      2     less than an hour               two hours, or not at all
      1     less than a day                 two days, or not at all
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

__all__ = ["BEHIND_S", "JournalFill", "StoreLag", "Told", "Trend", "full_in_s", "level_of"]

WINDOW_S = 300.0
SPAN_MIN_S = 20.0
SAMPLES_MAX = 120
BEHIND_S = 60.0
TELL_EVERY_S = 60.0

_LEVELS_S = (86_400.0, 3600.0)
_CAUGHT_UP_S = 5.0


class Trend:
    """A quantity over the last minutes."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, value: float) -> None:
        """Take a sample; more than one in a few seconds are passed over.

        Args:
            now_s: Monotonic.
        """
        samples = self._samples
        if samples and now_s - samples[-1][0] < WINDOW_S / SAMPLES_MAX:
            return
        samples.append((now_s, value))
        while now_s - samples[0][0] > WINDOW_S:
            samples.popleft()

    @property
    def per_s(self) -> float | None:
        """How fast it grows, by least squares; None while the samples span too little."""
        samples = self._samples
        if not samples or samples[-1][0] - samples[0][0] < SPAN_MIN_S:
            return None
        count = len(samples)
        mean_t = sum(t for t, _ in samples) / count
        mean_v = sum(v for _, v in samples) / count
        spread = sum((t - mean_t) ** 2 for t, _ in samples)
        return sum((t - mean_t) * (v - mean_v) for t, v in samples) / spread


def full_in_s(used_bytes: float, limit_bytes: float, per_s: float | None) -> float | None:
    """Return when something is full that is filled at this rate; None: not to be foreseen."""
    if used_bytes >= limit_bytes:
        return 0.0
    if per_s is None or per_s <= 0:
        return None
    return (limit_bytes - used_bytes) / per_s


def level_of(left_s: float | None, level: int) -> int:
    """Return the level as drawn above, given the one that was told before."""
    if left_s is None:
        return 0
    reached = sum(left_s < limit_s for limit_s in _LEVELS_S)
    kept = sum(left_s < 2 * limit_s for limit_s in _LEVELS_S)
    return max(reached, min(level, kept))


class Told(NamedTuple):
    """An event of the log, with its facts; ``is_warning``, else it is for information."""

    event: str
    is_warning: bool
    facts: dict[str, object]


class JournalFill:
    """When the journal is full, by what waits in it for the store that is furthest behind."""

    def __init__(self) -> None:
        self.full_in_s: float | None = None
        self._trend = Trend()
        self._level = 0

    def note(self, now_s: float, waiting_bytes: int, limit_bytes: int, slowest: str) -> Told | None:
        """Take how much waits; return what is to be logged, if anything is.

        Args:
            slowest: The store that it waits for.
        """
        self._trend.add(now_s, waiting_bytes)
        self.full_in_s = full_in_s(waiting_bytes, limit_bytes, self._trend.per_s)
        before, self._level = self._level, level_of(self.full_in_s, self._level)
        if self._level <= before or self.full_in_s is None:
            return None
        facts: dict[str, object] = {
            "store": slowest,
            "waiting_bytes": waiting_bytes,
            "limit_bytes": limit_bytes,
            "full_in_s": round(self.full_in_s),
        }
        return Told("journal.filling", is_warning=True, facts=facts)


class StoreLag:
    """How a store that fell behind comes on."""

    def __init__(self) -> None:
        self.through_in_s: float | None = None
        self._trend = Trend()
        self._next_s: float | None = None

    def note(self, now_s: float, lag_bytes: int, lag_s: float) -> Told | None:
        """Take how far it is behind; return what is to be logged, if anything is."""
        self._trend.add(now_s, lag_bytes)
        per_s = self._trend.per_s
        self.through_in_s = None if per_s is None else full_in_s(-lag_bytes, 0, -per_s)
        if lag_s < _CAUGHT_UP_S:
            self.through_in_s = None
            if self._next_s is None:
                return None
            self._next_s = None
            return Told("store.caught_up", is_warning=False, facts={"lag_bytes": lag_bytes})
        if lag_s < BEHIND_S or (self._next_s is not None and now_s < self._next_s):
            return None
        self._next_s = now_s + TELL_EVERY_S
        through = None if self.through_in_s is None else round(self.through_in_s)
        facts: dict[str, object] = {"lag_bytes": lag_bytes, "lag_s": round(lag_s), "through_in_s": through}
        return Told("store.behind", is_warning=True, facts=facts)
