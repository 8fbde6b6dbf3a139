"""Who takes which frame: the receiving side of the promise, without any I/O.

A ``StreamTable`` is kept by whoever receives frames (intake, spool, store). Per stream it holds the next seq:

========== ======================================== ==========================================
seq is     verdict                                  the caller then
========== ======================================== ==========================================
< next     ``DUPLICATE``                            drops and counts it
== next    ``ACCEPT``                               keeps it, then calls ``apply``
> next     ``AHEAD``                                asks again from ``expected``
no OPEN    ``UNKNOWN``                              asks for the OPEN
closed     ``DUPLICATE``                            drops and counts it
========== ======================================== ==========================================

A GAP with ``first <= next <= last`` is accepted and moves next to ``last + 1``; one wholly before next is a
duplicate. A closed stream becomes a tombstone, which remembers only its account; tombstones expire oldest
first beyond a limit.

The table is what segments write as their checkpoint: ``snapshot`` and ``restore`` are exact inverses.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, unpack_map

__all__ = ["StreamState", "StreamTable", "Verdict", "gap_of"]

TOMBSTONES_MAX = 4096
STREAMS_MAX = 65536


class Verdict(enum.Enum):
    """What a receiver does with a frame."""

    ACCEPT = "accept"
    DUPLICATE = "duplicate"
    AHEAD = "ahead"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class StreamState:
    """The account of one stream at one receiver.

    ``rows`` counts what was accepted, ``gap_rows`` what accepted GAPs say was lost (unknown numbers excluded:
    ``gaps_unknown`` counts those), ``next_row`` is the row0 that the next frame should bear.
    """

    stream: int
    open_raw: bytes
    next_seq: int = 1
    rows: int = 0
    next_row: int = 0
    gap_rows: int = 0
    gap_frames: int = 0
    gaps_unknown: int = 0
    closed: bool = False
    tail_unknown: bool = False
    t_last_ns: int = 0
    body_bytes: int = 0


@dataclass(slots=True)
class StreamTable:
    """All streams that a receiver knows; ``judge`` decides, ``apply`` records what was kept."""

    streams: dict[int, StreamState] = field(default_factory=dict)
    tombstones: dict[int, StreamState] = field(default_factory=dict)
    tombstones_max: int = TOMBSTONES_MAX

    def judge(self, frame: Frame) -> Verdict:
        """Return what to do with a frame that is itself valid. Changes nothing."""
        state = self.streams.get(frame.stream)
        if state is None:
            if frame.stream in self.tombstones:
                return Verdict.DUPLICATE
            return Verdict.ACCEPT if frame.seq == 0 else Verdict.UNKNOWN
        seq, expected = frame.seq, state.next_seq
        if seq == expected:
            return Verdict.ACCEPT
        if seq > expected:
            return Verdict.AHEAD
        if frame.kind is Kind.GAP and gap_of(frame)[0] >= expected:
            return Verdict.ACCEPT
        return Verdict.DUPLICATE

    def expected(self, stream: int) -> int:
        """Return the next seq of a stream; 0 when its OPEN is missing."""
        state = self.streams.get(stream)
        return 0 if state is None else state.next_seq

    def progress(self, stream: int) -> tuple[int, int] | None:
        """Return (next seq, next row) of a stream, open or closed; None for one that was never opened."""
        state = self.streams.get(stream) or self.tombstones.get(stream)
        return None if state is None else (state.next_seq, state.next_row)

    def apply(self, frame: Frame) -> StreamState:
        """Record that a frame judged ``ACCEPT`` was kept.

        Raises:
            WireError: Its body is not what its kind says, or there are too many open streams.
        """
        if frame.kind is Kind.OPEN:
            if len(self.streams) >= STREAMS_MAX:
                message = f"at most {STREAMS_MAX} streams can be open at once"
                raise WireError(message)
            state = StreamState(frame.stream, bytes(frame.raw), t_last_ns=frame.t_first_ns)
            self.streams[frame.stream] = state
            return state
        state = self.streams[frame.stream]
        if frame.kind is Kind.GAP:
            last, rows, _ = gap_of(frame)
            # A GAP that begins before next also covers rows that were kept; those are not lost.
            kept_rows = max(state.next_row - frame.row0, 0) if frame.seq < state.next_seq else 0
            state.gap_frames += last + 1 - state.next_seq
            state.next_seq = last + 1
            if rows is None:
                state.gaps_unknown += 1
            else:
                state.gap_rows += max(rows - kept_rows, 0)
                state.next_row = frame.row0 + rows
            return state
        if frame.kind is Kind.CLOSE:
            state.tail_unknown = bool(unpack_map(frame.body).get("tail_unknown", False))
            state.next_seq = frame.seq + 1
            self._bury(state)
            return state
        state.next_seq = frame.seq + 1
        state.rows += frame.rows
        state.next_row = frame.row0 + frame.rows
        state.body_bytes += len(frame.body)
        if frame.t_first_ns:
            state.t_last_ns = frame.t_first_ns
        return state

    def snapshot(self) -> list[list[object]]:
        """Return all accounts as plain lists, for a checkpoint."""
        held = [*self.tombstones.values(), *self.streams.values()]
        return [[getattr(state, name) for name in StreamState.__slots__] for state in held]

    @classmethod
    def restore(cls, rows: object) -> StreamTable:
        """Return the table that ``snapshot`` described.

        Raises:
            WireError: The description does not have that shape.
        """
        table = cls()
        if not isinstance(rows, list):
            message = f"a stream table must be a list, got {type(rows).__name__}"
            raise WireError(message)
        kinds = (int, bytes, int, int, int, int, int, int, bool, bool, int, int)
        for row in rows:
            if not isinstance(row, list) or [type(value) for value in row] != list(kinds):
                message = f"an account in a stream table must have the types {[k.__name__ for k in kinds]}"
                raise WireError(message)
            state = StreamState(*row)
            (table.tombstones if state.closed else table.streams)[state.stream] = state
        return table

    def _bury(self, state: StreamState) -> None:
        state.closed = True
        del self.streams[state.stream]
        self.tombstones[state.stream] = state
        while len(self.tombstones) > self.tombstones_max:
            del self.tombstones[next(iter(self.tombstones))]


def gap_of(frame: Frame) -> tuple[int, int | None, str]:
    """Return ``(last, rows, reason)`` of a GAP frame; rows is None when nobody knows.

    Raises:
        WireError: The body does not say so.
    """
    body = unpack_map(frame.body)
    last, rows, reason = body.get("last"), body.get("rows"), body.get("reason")
    if type(last) is not int or last < frame.seq or not isinstance(reason, str):
        message = (
            f"a GAP needs last >= its seq {frame.seq} and a reason, got last {last!r}, reason {reason!r}"
        )
        raise WireError(message)
    if rows is not None and (type(rows) is not int or rows < 0):
        message = f"a GAP's rows must be a number or nothing, got {rows!r}"
        raise WireError(message)
    return last, rows, reason
