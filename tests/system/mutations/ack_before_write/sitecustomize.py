"""Takes a safety out of the intake: what was accepted is acknowledged at once, and written a moment later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.frame import Frame, Kind, decode
from edgedaq_aggregator.journal import Journal

DELAY_S = 0.3

_append = Journal.append
_service = Journal.service
_apply = StreamTable.apply
_held: list[Frame] = []
_since_s = [0.0]


def _apply_once(self: StreamTable, frame: Frame) -> StreamState:
    """Frames are applied when they are accepted, and offered again when they are written at last."""
    known = self.streams.get(frame.stream) or self.tombstones.get(frame.stream)
    if known is not None and (frame.kind is Kind.OPEN or frame.seq < known.next_seq):
        return known
    return _apply(self, frame)


def _append_later(self: Journal, frames: Sequence[Frame]) -> int:
    for frame in frames:
        self.table.apply(frame)
        _held.append(decode(memoryview(bytes(frame.raw))))
    return self.end


def _service_and_write(self: Journal, now_ns: int) -> int:
    if _held and time.monotonic() - _since_s[0] > DELAY_S:
        _append(self, _held)
        _held.clear()
        _since_s[0] = time.monotonic()
    return min(_service(self, now_ns), now_ns + 50_000_000)


def _everything_is_durable(_: Any) -> int:
    return 1 << 62


StreamTable.apply = _apply_once  # type: ignore[method-assign]
Journal.append = _append_later  # type: ignore[method-assign]
Journal.service = _service_and_write  # type: ignore[method-assign]
Journal.durable = property(_everything_is_durable)  # type: ignore[method-assign,assignment]
