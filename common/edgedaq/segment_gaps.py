"""What an absence means for each stream: pure functions from two accounts to the frames between them.

A log never has an unexplained absence, although nothing is written into it where it was damaged: whoever
reads across a hole derives the same GAP frames from what lies around it. The frame behind the hole bears its
seq and, in ``row0``, the rows before it; the checkpoint of the next segment tells the rest: streams of which
nothing follows, an OPEN that fell into the hole, a CLOSE that did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgedaq.delivery import StreamState, StreamTable, Verdict
from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind, decode, encode, pack_map

__all__ = ["Explainer", "apply_all", "bridge", "gap_frame"]


def gap_frame(stream: int, first: int, last: int, row0: int, rows: int | None, reason: str) -> Frame:
    """Return the GAP that says ``first`` to ``last`` of a stream are lost; ``rows`` None: nobody knows."""
    if rows is not None and rows < 0:
        rows = None
    body = pack_map({"last": last, "rows": rows, "reason": reason})
    return decode(memoryview(encode(Kind.GAP, stream, first, body, row0=max(row0, 0))))


def _close_frame(state: StreamState) -> Frame:
    body = pack_map({"rows": state.next_row, "tail_unknown": state.tail_unknown, "bound_s": 0.0})
    return decode(memoryview(encode(Kind.CLOSE, state.stream, state.next_seq - 1, body, row0=state.next_row)))


def bridge(
    held: Callable[[int], tuple[int, int] | None],
    known: StreamTable,
    reason: str,
    wants: Callable[[int], bool] | None = None,
) -> Iterator[Frame]:
    """Yield the frames that bring a receiver from what it has to what is known to have been there.

    Args:
        held: Returns (next seq, next row) of a stream as the receiver has it; None for one it never opened.
        known: The account of all streams at the far side of the absence.
        reason: What the GAPs say.
        wants: Which streams matter.

    Yields:
        Per stream, in order, what applies of: its OPEN, a GAP, a CLOSE of a stream whose own CLOSE is lost.
    """
    for state in [*known.tombstones.values(), *known.streams.values()]:
        if wants is not None and not wants(state.stream):
            continue
        have = held(state.stream)
        if have is None:
            try:
                opened = decode(memoryview(state.open_raw))
            except WireError:
                continue
            yield opened
            have = (1, 0)
        next_seq, next_row = have
        if next_seq >= state.next_seq:
            continue
        last = state.next_seq - (2 if state.closed else 1)
        if last >= next_seq:
            rows = state.next_row - next_row
            yield gap_frame(state.stream, next_seq, last, next_row, rows, reason)
        if state.closed:
            yield _close_frame(state)


def apply_all(table: StreamTable, frames: list[Frame]) -> WireError | None:
    """Apply frames that are kept whatever they are; returns what was wrong with one of them, if so."""
    failed: WireError | None = None
    for frame in frames:
        try:
            table.apply(frame)
        except WireError as e:
            failed = e
        except KeyError:
            failed = WireError(f"stream {frame.stream:016x} was never opened")
    return failed


class Explainer:
    """Turns what follows a hole into a sequence without an unexplained absence.

    Feed it every frame behind the hole, in order; deliver what it returns instead. ``table`` is the account
    of what was delivered.

    Args:
        table: The account before the hole; taken over.
        find_open: Returns the account of a stream whose OPEN fell into the hole, if any place still has it.
        wants: Which streams matter; the others pass unlooked at.
    """

    def __init__(
        self,
        table: StreamTable,
        find_open: Callable[[int], StreamState | None],
        wants: Callable[[int], bool] | None = None,
    ) -> None:
        self.table = table
        self.reason = "damaged"
        self.unknown_count = 0
        self._find_open = find_open
        self._wants = wants

    def explain(self, frame: Frame) -> list[Frame]:
        """Return the frames to deliver for ``frame``: those that explain what is absent, then itself."""
        if self._wants is not None and not self._wants(frame.stream):
            return [frame]
        before: list[Frame] = []
        verdict = self.table.judge(frame)
        if verdict is Verdict.UNKNOWN:
            state = self._find_open(frame.stream)
            if state is None:
                self.unknown_count += 1
                return [frame]
            opened = decode(memoryview(state.open_raw))
            self.table.apply(opened)
            before.append(opened)
            verdict = self.table.judge(frame)
        if verdict is Verdict.AHEAD:
            state = self.table.streams[frame.stream]
            row0, rows = state.next_row, frame.row0 - state.next_row
            gap = gap_frame(frame.stream, state.next_seq, frame.seq - 1, row0, rows, self.reason)
            self.table.apply(gap)
            before.append(gap)
            verdict = Verdict.ACCEPT
        if verdict is Verdict.ACCEPT:
            try:
                self.table.apply(frame)
            except WireError:
                self.unknown_count += 1
        return [*before, frame]

    def arrive(self, checkpoint: StreamTable) -> list[Frame]:
        """Return what is still to be explained once a checkpoint behind the hole tells all streams."""
        frames = list(bridge(self.table.progress, checkpoint, self.reason, self._wants))
        for frame in frames:
            if self.table.judge(frame) is Verdict.ACCEPT:
                self.table.apply(frame)
        return frames
