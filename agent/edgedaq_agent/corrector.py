"""Problems that the intake told, from when they arrive until the frames they are about were sent corrected.

The state around ``Repair``: how long to look at every frame, when a position is hopeless, what is counted
and logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from edgedaq.bad_files import BadFiles
from edgedaq.errors import WireError
from edgedaq.frame import Frame, decode, length_at
from edgedaq.lane_parts import Entry
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.session_messages import Ahead, Refused, Resend, Unknown
from edgedaq.transport import PART_BYTES, PART_BYTES_MIN

from edgedaq_agent.repair import OpenFinder, Repair

__all__ = ["Corrector", "Problem"]

Problem = Resend | Refused | Unknown | Ahead

_STUCK_MAX = 20


class Corrector:
    """Corrects the frames of one lane. Used by one thread.

    Args:
        bad: Takes what is set aside.
        find_open: Returns the OPEN of a stream from wherever there is one.
    """

    def __init__(self, bad: BadFiles, find_open: OpenFinder) -> None:
        self.counts = {"Refused": 0, "Resend": 0, "Unknown": 0, "Ahead": 0}
        self._bad = bad
        self._find_open = find_open
        self._repair = Repair()
        self._until = 0
        self._part_bytes = PART_BYTES
        self._stuck = (-1, 0)
        self._limit = LogLimit()
        self._log = get_logger()

    @property
    def part_bytes(self) -> int:
        """How much to send in one part.

        Halved by each part that came damaged, so that some get through a bad cable; doubled by as much as has
        passed since.
        """
        return self._part_bytes

    @property
    def is_needed(self) -> bool:
        """Frames must go through ``correct`` before they are sent."""
        return self._repair.is_needed

    @property
    def lost_reason(self) -> str:
        """What the GAPs say that stand for frames which neither side has."""
        return self._repair.lost_reason

    @lost_reason.setter
    def lost_reason(self, reason: str) -> None:
        self._repair.lost_reason = reason

    def begin_session(self) -> None:
        """Forget what an earlier session told."""
        self._repair.forget()
        self._until = PART_BYTES

    def note(self, problem: Problem, sent: int, now_ns: int) -> bool:
        """Take a problem; False when there were so many at one position that the session should end.

        Args:
            sent: Position up to which the session had sent before it went back.
        """
        name = type(problem).__name__
        self.counts[name] += 1
        count = self._limit.note(now_ns)
        if count:
            self._log.warning("part.returned", problem=name, count=count, **_facts(problem))
        times = self._stuck[1] + 1 if self._stuck[0] == problem.position else 1
        self._stuck = (problem.position, times)
        if times > _STUCK_MAX:
            self._stuck = (-1, 0)
            return False
        self._until = max(self._until, sent + PART_BYTES) if self.is_needed else sent + PART_BYTES
        if isinstance(problem, Resend):
            self._repair.check_all()
            self._part_bytes = max(self._part_bytes // 2, PART_BYTES_MIN)
            return True
        self._repair.note(problem)
        return True

    def passed(self, position: int) -> None:
        """Tell how far the session has sent: behind all problems, corrections are forgotten."""
        if position >= self._until:
            self._repair.forget()
            self._until = position + PART_BYTES
            self._part_bytes = min(2 * self._part_bytes, PART_BYTES)

    def whole_frames(self, entries: Iterable[Entry]) -> list[Frame]:
        """Return the frames of entries; what was damaged here is set aside."""
        return [frame for entry in entries for frame in whole_frames(entry.frames, self._bad)]

    def correct(self, frames: Sequence[Frame]) -> list[bytes | memoryview]:
        """Return what to send for frames."""
        chunks, aside = self._repair.apply(frames, self._find_open)
        for frame, reason in aside:
            self._bad.add(frame.stream, frame.seq, reason, frame.raw)
        return chunks


def whole_frames(buffer: memoryview, bad: BadFiles) -> list[Frame]:
    """Return the frames that lie back to back in a buffer; what is damaged is set aside.

    Behind a frame whose length cannot be told, the rest goes with it.
    """
    frames: list[Frame] = []
    position, end = 0, len(buffer)
    while position < end:
        try:
            frame = decode(buffer, position)
        except WireError as e:
            length = end - position
            with contextlib.suppress(WireError):
                length = min(length_at(buffer, position), length)
            bad.add(0, 0, str(e), buffer[position : position + length])
            position += length
            continue
        frames.append(frame)
        position += len(frame.raw)
    return frames


def _facts(problem: Problem) -> dict[str, Any]:
    facts: dict[str, Any] = {"position": problem.position}
    if isinstance(problem, Resend):
        return facts | {"reason": problem.text}
    facts["stream"] = f"{problem.stream:016x}"
    if isinstance(problem, Refused):
        return facts | {"seq": problem.seq, "reason": f"{problem.code}: {problem.text}"}
    if isinstance(problem, Ahead):
        return facts | {"seq": problem.seq, "reason": f"expected seq {problem.expected}"}
    return facts | {"reason": "its OPEN is not known there"}
