"""How much may be on its way at once, so that what is urgent does not queue behind what is not. No I/O.

The intake's credit is what it can hold: far more than a slow link carries in a second. Bytes that were sent
wait in buffers that nobody can reorder, so a lane with little to say would wait for all that another lane has
put there. The window keeps that wait short: it follows the rate at which acknowledgements come, starts small,
and grows by half or more with each answer while the link takes it::

    limit = 3 x acknowledged per second x max(shortest round trip, 125 ms), never below 64 KiB

A link that is faster than the credit allows is not held up by it.
"""

from __future__ import annotations

from collections import deque

__all__ = ["WINDOW_MIN_BYTES", "LinkWindow"]

WINDOW_MIN_BYTES = 64 << 10

_GROWTH = 3
_HORIZON_NS = 250_000_000
_ROUND_TRIP_MIN_NS = 125_000_000


class LinkWindow:
    """The window of one session. Used by one thread."""

    def __init__(self) -> None:
        self._acked: deque[tuple[int, int]] = deque()
        self._acked_bytes = 0
        self._round_trip_ns = 0
        self._probe: tuple[int, int, int] | None = None

    def sent(self, lane: int, position: int, now_ns: int) -> None:
        """Take that a lane has sent up to a position of the session."""
        if self._probe is None:
            self._probe = lane, position, now_ns

    def acked(self, lane: int, position: int, size_bytes: int, now_ns: int) -> None:
        """Take that a lane's next ``size_bytes``, up to a position of the session, were acknowledged."""
        if self._probe is not None and self._probe[0] == lane and position >= self._probe[1]:
            taken_ns = max(now_ns - self._probe[2], 1)
            self._round_trip_ns = min(self._round_trip_ns or taken_ns, taken_ns)
            self._probe = None
        self._acked.append((now_ns, size_bytes))
        self._acked_bytes += size_bytes

    def limit_bytes(self, now_ns: int) -> int:
        """Return how much may be unacknowledged."""
        horizon_ns = max(_HORIZON_NS, 2 * self._round_trip_ns)
        while self._acked and self._acked[0][0] < now_ns - horizon_ns:
            self._acked_bytes -= self._acked.popleft()[1]
        round_trip_ns = max(self._round_trip_ns, _ROUND_TRIP_MIN_NS)
        return max(WINDOW_MIN_BYTES, _GROWTH * self._acked_bytes * round_trip_ns // horizon_ns)
