"""The frames that lie in a ring, read with an eye for damage: memory that somebody else wrote over.

Each frame bears its own checksum, so that one is either whole or not there: behind damage, reading goes on
with the next frame that is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from edgedaq.errors import WireError
from edgedaq.frame import HEADER_BYTES, Frame, Kind, decode, length_at
from edgedaq.ring_layout import PAD, STREAMS_MAX, W_OPEN_AT, W_STREAM, Layout

__all__ = ["find_opens", "read_opens", "walk"]

_MAGIC = b"EDQ"
_MAGIC_AT = 8


def read_opens(buffer: memoryview, layout: Layout, begin: int, end: int) -> dict[int, bytes]:
    """Return the OPEN frames between two positions of the opens area, by stream.

    Raises:
        WireError: There are no such frames there.
    """
    if not 0 <= begin <= end <= layout.opens_bytes:
        message = f"the opens area has {layout.opens_bytes} bytes, got {begin} to {end}"
        raise WireError(message)
    area = buffer[layout.opens_offset : layout.opens_offset + end]
    found: dict[int, bytes] = {}
    while begin < end:
        frame = decode(area, begin)
        found[frame.stream] = bytes(frame.raw)
        begin += len(frame.raw)
    return found


def find_opens(buffer: memoryview, layout: Layout, end: int) -> tuple[dict[int, bytes], bool]:
    """Return the OPEN frames of the opens area up to ``end`` that are whole, and whether all are.

    Raises:
        WireError: The opens area has no such end.
    """
    try:
        return read_opens(buffer, layout, 0, end), True
    except WireError:
        if not 0 <= end <= layout.opens_bytes:
            raise
    area = buffer[layout.opens_offset : layout.opens_offset + end]
    found: dict[int, bytes] = {}
    for index in range(STREAMS_MAX):
        entry = layout.words(buffer, layout.entry_offset(index))
        if entry[W_STREAM] and entry[W_OPEN_AT] < end:
            frame = _whole(area, entry[W_OPEN_AT])
            if frame is not None and frame.kind is Kind.OPEN and frame.stream == entry[W_STREAM]:
                found[frame.stream] = bytes(frame.raw)
    return found, False


def walk(buffer: memoryview, layout: Layout, begin: int, end: int) -> list[tuple[int, Frame | None]]:
    """Return position and frame of all between two positions of the data area, checked.

    None stands for what is damaged, of any length; it is followed by the next frame that is whole, if any.

    Raises:
        WireError: A ring of this size cannot hold what lies between the positions.
    """
    size = layout.ring_bytes
    if not 0 <= begin <= end <= begin + size or begin % 8:
        message = f"a ring of {size} bytes cannot hold what lies between {begin} and {end}"
        raise WireError(message)
    found: list[tuple[int, Frame | None]] = []
    area = buffer[layout.data_offset : layout.data_offset + size]
    while begin < end:
        at = begin % size
        left = min(size - at, end - begin)
        if size - at < HEADER_BYTES or area[at + 8 : at + 16] == PAD:
            begin += size - at
            continue
        lap = area[: at + left]
        frame = _whole(lap, at)
        found.append((begin, frame))
        begin += len(frame.raw) if frame is not None else _next_whole(lap, at) - at
    return found


def _next_whole(lap: memoryview, at: int) -> int:
    """Return where the next whole frame begins behind damage at ``at``; the end of the lap if nowhere."""
    for begin in _candidates(lap, at):
        if _whole(lap, begin) is not None:
            return begin
    return len(lap)


def _candidates(lap: memoryview, at: int) -> Iterator[int]:
    with contextlib.suppress(WireError):
        yield at + length_at(lap, at)  # a body was damaged, its header says where it ends
    held = bytes(lap[at:])
    found = held.find(_MAGIC, _MAGIC_AT + 8)
    while found >= 0:
        if found % 8 == 0:
            yield at + found - _MAGIC_AT
        found = held.find(_MAGIC, found + 1)


def _whole(area: memoryview, at: int) -> Frame | None:
    try:
        return decode(area, at)
    except WireError:
        return None
