"""The pieces a lane is handled in: what arrives, what may be forgotten, what is to be sent, how old it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["AgeMarks", "Entry", "FromMemory", "FromSpool", "Release"]

_AGE_MARKS_MAX = 512
_AGE_MARK_NS = 1_000_000_000


@dataclass(slots=True)
class Entry:
    """Whole frames back to back in memory that belongs to ``holder`` (a ring).

    ``release_to`` is the holder's position that is released with this entry; None where a later entry of the
    same run bears it. ``index`` is the lane's.
    """

    holder: Hashable
    frames: memoryview
    count: int
    release_to: int | None
    t_ns: int = 0
    index: int = -1


class Release(NamedTuple):
    """Nothing of ``holder`` before ``up_to`` is needed any more."""

    holder: Hashable
    up_to: int


class FromSpool(NamedTuple):
    """What to send next: records of the spool, from a position, as far as ``upto`` at most."""

    position: int
    upto: int


class FromMemory(NamedTuple):
    """What to send next: whole entries, all of them."""

    entries: list[Entry]
    size: int


class AgeMarks:
    """When what lies in the spool had arrived, to a second; coarser where it is much."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int]] = deque()

    def add(self, position: int, t_ns: int) -> None:
        """Note that what begins at a position arrived then; positions and times only grow."""
        if self._marks and t_ns - self._marks[-1][1] < _AGE_MARK_NS:
            return
        self._marks.append((position, t_ns))
        if len(self._marks) > _AGE_MARKS_MAX:
            kept = list(self._marks)
            self._marks = deque(kept[:1] + kept[2::2])

    def add_first(self, position: int, t_ns: int) -> None:
        """Note the age of what was there from the start."""
        self._marks.appendleft((position, t_ns))

    def oldest_ns(self) -> int | None:
        """Return the time of the oldest; None where nothing is known."""
        return self._marks[0][1] if self._marks else None

    def forget_before(self, position: int) -> None:
        """Drop what says nothing about a position or what follows it."""
        while len(self._marks) > 1 and self._marks[1][0] <= position:
            self._marks.popleft()

    def clear(self) -> None:
        """Drop all: the spool is empty."""
        self._marks.clear()
