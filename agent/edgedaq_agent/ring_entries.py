"""What the lane needs to know of rings: runs as entries that fit a part, and when a ring is short of room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edgedaq.errors import WireError
from edgedaq.frame import length_at
from edgedaq.inlet import RingView, Run
from edgedaq.lane import Entry, Release
from edgedaq.transport import PART_BYTES

__all__ = ["entries_of", "is_crowded", "open_of", "release"]


def entries_of(run: Run, now_ns: int) -> Iterator[Entry]:
    """Yield a run as entries, cut at borders of frames so that each fits a part; the last one releases it."""
    frames = run.frames
    if len(frames) <= PART_BYTES:
        yield Entry(run.ring, frames, run.count, run.end, now_ns)
        return
    begin = position = count = 0
    while position < len(frames):
        try:
            length = length_at(frames, position)
        except WireError:
            length = len(frames) - position  # the intake will say so
        if count and position + length - begin > PART_BYTES:
            yield Entry(run.ring, frames[begin:position], count, None, now_ns)
            begin, count = position, 0
        position += length
        count += 1
    yield Entry(run.ring, frames[begin:], count, run.end, now_ns)


def is_crowded(holder: object, held_bytes: int) -> bool:
    """Tell whether what is held of a ring is more than half of it."""
    return isinstance(holder, RingView) and held_bytes > holder.layout.ring_bytes // 2


def open_of(holder: object, stream: int) -> bytes | None:
    """Return the OPEN frame of a stream of a ring."""
    return holder.open_frame(stream) if isinstance(holder, RingView) else None


def release(releases: Iterable[Release]) -> None:
    """Tell rings what is not needed any more."""
    for ring, up_to in releases:
        if isinstance(ring, RingView):
            ring.release(up_to)
