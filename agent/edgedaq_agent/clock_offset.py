"""How far this node's clock is from the aggregator's, from the round trips of PING and PONG. No I/O."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from edgedaq.session_messages import Pong

__all__ = ["ClockOffset", "Offset"]

_SAMPLES_MAX = 16
_DRIFT_PPB = 50_000
_STEP_NS = 2_000_000


class Offset(NamedTuple):
    """Aggregator minus node, and by how much that may be wrong, in ns."""

    offset_ns: int
    error_ns: int


class _Sample(NamedTuple):
    t_mono_ns: int
    offset_ns: int
    error_ns: int


class ClockOffset:
    """The best of the last round trips: the shortest one, made worse by 50 ppm of its age."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES_MAX)
        self._utc_minus_mono_ns: int | None = None

    def add(self, pong: Pong, t_mono_ns: int, t_utc_ns: int) -> None:
        """Take an answer that arrived at these times of this node."""
        self.watch(t_mono_ns, t_utc_ns)
        if abs((pong.t_utc_ns - pong.t_mono_ns) - (t_utc_ns - t_mono_ns)) > _STEP_NS:
            return
        there_ns = pong.sent_utc_ns - pong.received_utc_ns
        round_trip_ns = t_mono_ns - pong.t_mono_ns - there_ns
        if round_trip_ns < 0 or there_ns < 0:
            return
        offset_ns = ((pong.received_utc_ns - pong.t_utc_ns) + (pong.sent_utc_ns - t_utc_ns)) // 2
        self._samples.append(_Sample(t_mono_ns, offset_ns, round_trip_ns // 2 + 1))

    def watch(self, t_mono_ns: int, t_utc_ns: int) -> None:
        """Forget what was measured before a step of this node's wall clock; call it before ``best``."""
        if self._utc_minus_mono_ns is None or abs(t_utc_ns - t_mono_ns - self._utc_minus_mono_ns) > _STEP_NS:
            self._samples.clear()
        self._utc_minus_mono_ns = t_utc_ns - t_mono_ns

    def best(self, now_ns: int) -> Offset | None:
        """Return the best estimate at a monotonic time; None before the first answer."""
        aged = [
            Offset(sample.offset_ns, sample.error_ns + (now_ns - sample.t_mono_ns) * _DRIFT_PPB // 10**9)
            for sample in self._samples
        ]
        return min(aged, key=lambda offset: offset.error_ns, default=None)
