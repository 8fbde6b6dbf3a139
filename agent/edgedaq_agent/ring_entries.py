"""What the lane needs to know of rings: runs as entries that fit a part, and when a ring is short of room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edgedaq.errors import WireError
from edgedaq.frame import length_at
from edgedaq.inlet import RingView, Run
from edgedaq.lane_parts import Entry, Release
from edgedaq.transport import PART_BYTES

__all__ = ["entries_of", "is_crowded", "open_of", "pieces_of", "release"]


def entries_of(run: Run, now_ns: int) -> Iterator[Entry]:
    """Yield a run as entries that each fit a part; the last one releases it."""
    yield from pieces_of(Entry(run.ring, run.frames, run.count, run.end, now_ns), PART_BYTES)


def pieces_of(entry: Entry, part_bytes: int) -> Iterator[Entry]:
    """Yield an entry, cut at borders of frames where it is too large; the last piece releases it."""
    frames = entry.frames
    if len(frames) <= part_bytes:
        yield entry
        return
    begin = position = count = 0
    while position < len(frames):
        try:
            length = length_at(frames, position)
        except WireError:
            length = len(frames) - position  # the intake will say so
        if count and position + length - begin > part_bytes:
            yield Entry(entry.holder, frames[begin:position], count, None, entry.t_ns)
            begin, count = position, 0
        position += length
        count += 1
    yield Entry(entry.holder, frames[begin:], count, entry.release_to, entry.t_ns)


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
