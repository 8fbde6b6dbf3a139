"""What the uplink changes in the frames it sends because the intake said that it cannot take them. No I/O.

=========================== ================================================================================
the intake said             so, when the lane is sent again from that position
=========================== ================================================================================
REFUSED(stream, seq)        a GAP with the reason goes in the frame's place
REFUSED(stream, 0)          its OPEN: no frame of this stream can be taken; all of it is set aside
REFUSED(..., "topic")       this node may not send its topics: it is opened without any, nor stores, and a GAP
                            with the reason goes in the place of each of its frames, until its CLOSE
UNKNOWN(stream)             its OPEN goes before its next frame; where nobody has one, all of it is set aside
AHEAD(stream, expected)     a GAP from there to the frame that is ahead goes before it: the rest is lost for
good
=========================== ================================================================================

Corrections are forgotten once their place has been passed, or the session ends: if one was needed after all,
the intake says it again. Only streams that are set aside are remembered, until their CLOSE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, decode, encode, pack_map
from edgedaq.open_info import decode_open, encode_open
from edgedaq.session_messages import TOPIC, Ahead, Refused, Unknown

__all__ = ["Repair", "SetAside"]

_DROPPED_MAX = 4096

OpenFinder = Callable[[int], bytes | None]


class SetAside(NamedTuple):
    """A frame that nobody will take, and why."""

    frame: Frame
    reason: str


class Repair:
    """The corrections that are to be made. Used by one thread."""

    def __init__(self) -> None:
        self.lost_reason = "lost: neither side has it"
        """What the GAPs say that stand for what was ahead."""
        self._dropped: dict[int, str] = {}
        self._muted: dict[int, str] = {}
        self._refused: dict[tuple[int, int], str] = {}
        self._opens: set[int] = set()
        self._ahead: dict[tuple[int, int], tuple[int, int | None]] = {}
        self._checks = False

    @property
    def is_needed(self) -> bool:
        """Frames must be looked at one by one."""
        return bool(self._checks or self._dropped or self._muted)

    def note(self, problem: Refused | Unknown | Ahead) -> None:
        """Take what the intake said."""
        self._checks = True
        stream = problem.stream
        if isinstance(problem, Unknown):
            self._opens.add(stream)
        elif isinstance(problem, Ahead):
            self._ahead[stream, problem.seq] = (problem.expected, problem.rows)
        elif problem.code == TOPIC:
            _put(self._muted, stream, f"refused: {problem.code}: {problem.text}")
        elif problem.seq == 0:
            self._drop(stream, f"refused: {problem.code}: {problem.text}")
        else:
            self._refused[stream, problem.seq] = f"refused: {problem.code}"

    def check_all(self) -> None:
        """Look at the frames themselves too: something was damaged on the way, or here."""
        self._checks = True

    def forget(self) -> None:
        """Drop the corrections; streams that are set aside stay so."""
        self._refused.clear()
        self._opens.clear()
        self._ahead.clear()
        self._checks = False

    def apply(
        self, frames: Iterable[Frame], find_open: OpenFinder
    ) -> tuple[list[bytes | memoryview], list[SetAside]]:
        """Return what to send in place of these frames, and what is set aside.

        Args:
            frames: In order; each is whole.
            find_open: Returns the OPEN frame of a stream from wherever there is one.
        """
        out: list[bytes | memoryview] = []
        aside: list[SetAside] = []
        opens = set(self._opens)
        for frame in frames:
            stream = frame.stream
            if stream in opens and frame.seq:
                raw = find_open(stream)
                opens.discard(stream)
                if raw is None:
                    self._drop(stream, "the aggregator does not know the stream, and nobody has its OPEN")
                else:
                    out.append(_without_topics(raw) if stream in self._muted else raw)
            dropped = self._dropped.get(stream)
            if dropped is not None:
                aside.append(SetAside(frame, dropped))
                if frame.kind is Kind.CLOSE:
                    del self._dropped[stream]
                continue
            missing = self._ahead.get((stream, frame.seq))
            if missing is not None and 0 < missing[0] < frame.seq:
                expected, rows = missing
                row0 = frame.row0 - (rows or 0)
                out.append(_gap(stream, expected, frame.seq - 1, rows, row0, self.lost_reason))
            reason = self._muted.get(stream) or self._refused.get((stream, frame.seq))
            if reason is None:
                out.append(frame.raw)
                continue
            if stream in self._muted and frame.kind in {Kind.OPEN, Kind.CLOSE, Kind.GAP}:
                out.append(_without_topics(frame.raw) if frame.kind is Kind.OPEN else frame.raw)
                if frame.kind is Kind.CLOSE:
                    del self._muted[stream]
                continue
            aside.append(SetAside(frame, reason))
            if frame.kind is Kind.CLOSE:
                out.append(_close(frame))
            else:
                rows = None if frame.kind is Kind.GAP else frame.rows
                out.append(_gap(stream, frame.seq, frame.seq, rows, frame.row0, reason))
        return out, aside

    def _drop(self, stream: int, reason: str) -> None:
        _put(self._dropped, stream, reason)


def _put(held: dict[int, str], stream: int, reason: str) -> None:
    held[stream] = reason
    while len(held) > _DROPPED_MAX:
        del held[next(iter(held))]


def _without_topics(raw: bytes | memoryview) -> bytes | memoryview:
    """Return an OPEN that asks for nothing, so that the GAPs of its stream have a place."""
    frame = decode(memoryview(raw))
    try:
        info = decode_open(frame)
    except WireError:
        return raw  # will be refused for that
    return encode_open(frame.stream, msgspec.structs.replace(info, topics=(), store_config={}))


def _gap(stream: int, first: int, last: int, rows: int | None, row0: int, reason: str) -> bytes:
    return encode(Kind.GAP, stream, first, _gap_body(last, rows, reason), row0=max(row0, 0))


def _gap_body(last: int, rows: int | None, reason: str) -> bytes:
    return pack_map({"last": last, "rows": rows, "reason": reason[:200]})


def _close(frame: Frame) -> bytes:
    """Return a CLOSE that says what it can in place of one whose body nobody understood."""
    body = pack_map({"rows": frame.row0, "tail_unknown": True, "bound_s": 0.0})
    return encode(Kind.CLOSE, frame.stream, frame.seq, body, row0=frame.row0)
