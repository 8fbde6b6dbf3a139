"""What a consumer has had of each stream, and so what is missing before the frame that comes. No I/O.

Dropping appends nothing to a ring: whoever reads at the head derives the gap. A frame bears its seq and the
number of rows before it (``row0``), so that the first frame behind a hole tells exactly how much lies in it::

    had      seq 4, rows 400 .. 499          → expected: seq 5, row 500
    comes    seq 9, row0 930                 → Gap(first 5, last 8, rows 430)

A GAP frame, of what was lost before it came into the ring, is told in the same way, with its own reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from edgedaq.delivery import gap_of
from edgedaq.frame import Frame, Kind

__all__ = ["MISSED", "Gap", "GapFinder"]

MISSED = "missed by this consumer"
"""Reason of what the ring had and the consumer was too slow for, or away too long."""

_BEGIN = (1, 0)


class Gap(msgspec.Struct, frozen=True):
    """Frames ``first`` to ``last`` of a stream do not come; ``rows`` is None when nobody knows how many."""

    stream: int
    first: int
    last: int
    rows: int | None
    reason: str


class GapFinder:
    """The account of one life of a producer at one consumer.

    Args:
        begin: Per stream the seq and row to come next; others begin behind their OPEN. None where nobody
            knows what was had before: then each stream begins with the frame that comes first.
    """

    def __init__(self, begin: Mapping[int, tuple[int, int]] | None) -> None:
        self._next = dict(begin or {})
        self._begins_anywhere = begin is None

    def take(self, frame: Frame) -> tuple[bool, list[Gap]]:
        """Return whether a frame is news, and what is missing before it or, if it is a GAP, what it tells."""
        if frame.kind is Kind.OPEN:
            return True, []
        seq, row = self._expected(frame.stream, (frame.seq, frame.row0))
        last, rows, reason = gap_of(frame) if frame.kind is Kind.GAP else (frame.seq, frame.rows, "")
        if last < seq:
            return False, []
        found = []
        if frame.seq > seq:
            found.append(_missing(frame.stream, (seq, row), (frame.seq, frame.row0)))
            seq, row = frame.seq, frame.row0
        end = frame.row0 + (rows or 0)
        if frame.kind is Kind.GAP:
            # One that begins before what was had tells of that, too.
            known = None if rows is None else max(end - row, 0)
            found.append(Gap(frame.stream, seq, last, known, reason))
        self._next[frame.stream] = (last + 1, max(end, row))
        return True, found

    def finish(self, ends: Mapping[int, tuple[int, int]]) -> list[Gap]:
        """Return what is missing up to where the streams have ended (seq and row to come next)."""
        found = []
        for stream, end in ends.items():
            begin = self._expected(stream, end)
            if end[0] > begin[0]:
                self._next[stream] = end
                if end[1] > begin[1]:  # a mere CLOSE is no loss
                    found.append(_missing(stream, begin, end))
        return found

    def _expected(self, stream: int, found: tuple[int, int]) -> tuple[int, int]:
        return self._next.get(stream) or (found if self._begins_anywhere else _BEGIN)


def _missing(stream: int, begin: tuple[int, int], end: tuple[int, int]) -> Gap:
    return Gap(stream, begin[0], end[0] - 1, max(end[1] - begin[1], 0), MISSED)
