"""Commits that a server has, but has not yet on its disk: how far the journal may be trimmed meanwhile."""

from __future__ import annotations

from collections import deque

__all__ = ["Settling"]


class Settling:
    """Positions of commits, in order, each with a number that the server's disk will pass: an LSN, a time.

    One thread adds, another asks.
    """

    def __init__(self) -> None:
        self.durable_position: int | None = None
        self._waiting: deque[tuple[float, int]] = deque()

    def add(self, number: float, position: int | None) -> None:
        """Take a commit; it is durable once ``number`` is reached."""
        if position is not None:
            self._waiting.append((number, position))

    def reach(self, number: float) -> None:
        """Learn that the disk has everything up to ``number``."""
        while self._waiting and self._waiting[0][0] <= number:
            self.durable_position = self._waiting.popleft()[1]
