"""Rows of several streams that lie together, and nothing tells whose each is, beside the journal.

A store writes the rows of a frame one after another, but frames of two streams not always in the order of the
journal: small ones are gathered while large ones are written. So each frame is looked for among the rows that
are not passed yet, mostly it is the next one::

    | passed | not passed | passed | not passed yet ...       no more than ``_WINDOW_ROWS`` are held

A frame that is not found by the end is where the first rows are that nobody has passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
from edgedaq.delivery import StreamState
from edgedaq.errors import WireError
from edgedaq.frame import Frame

from edgedaq_aggregator.stores.alike import Group, Placed, first_difference, info_of
from edgedaq_aggregator.stores.reader import Problem
from edgedaq_aggregator.stores.tables import TableDecoder, units_of

__all__ = ["JointCursor"]

_WINDOW_ROWS = 1_000_000

pc: Any = pyarrow.compute  # its types know no scalars beside columns


class JointCursor:
    """Which rows of a group of several streams have been found.

    Args:
        older: How many rows the journal does not have any more.
        lost: How many rows of the group are missing, nobody knows where.
    """

    def __init__(self, group: Group, older: int, lost: int) -> None:
        self.is_over = False
        self.unread = 0
        """Rows that were not compared, for there were too many to be held."""
        self._group = group
        self._older = older
        self._lost = lost
        self._decoders: dict[int, TableDecoder] = {}
        self._reading: Iterator[Placed] = group.read(max(older - lost, 0))
        self._window: list[Placed] = []
        self._near = 0
        self._absent: list[tuple[int, Frame, pa.RecordBatch]] = []

    def pass_frames(self, stream: int, frames: Sequence[Frame], account: StreamState) -> Problem | None:
        """Look for frames; only one that cannot be decoded is told at once."""
        decoder = self._decoders.get(stream)
        try:
            if decoder is None and (info := info_of(account)) is not None:
                decoder = self._decoders[stream] = TableDecoder(info)
            for unit in units_of(frames) if decoder is not None else ():
                for batch in decoder.batches(unit) if decoder is not None else ():
                    if self.unread:
                        self.unread += batch.num_rows
                    elif not self._pass(batch):
                        self._absent.append((stream, unit[0], batch))
        except WireError as e:
            self.is_over = True
            return Problem("journal", f"stream {stream:016x} (seq {frames[0].seq})", str(e))
        return None

    def finish(self) -> Problem | None:
        """Return the first frame that was not found, and where it should have been."""
        if not self._absent:
            if not self._lost or self.unread:
                return None
            what = f"{self._lost} rows are not there that the journal no longer has"
            return Problem(self._group.where, f"{self._group.there} rows", what)
        stream, frame, batch = self._absent[0]
        whose = f"of stream {stream:016x} (seq {frame.seq})"
        best: tuple[int, Problem] | None = None
        for held in self._window:
            count = min(held.table.num_rows, batch.num_rows)
            found = first_difference(
                held.table.slice(0, count),
                batch.slice(0, count),
                self._group.keeps,
                is_filled=self._group.is_filled,
            )
            row, what = found or (count, "it is not there")
            place = f"row {held.places[min(row, count - 1)]}"
            problem = Problem(held.where, place, f"row {frame.row0 + row} {whose}: {what}")
            if best is None or row > best[0]:
                best = row, problem
        if best is None:
            return Problem(self._group.where, "the end", f"row {frame.row0} {whose}: it is not there")
        return best[1]

    def _pass(self, batch: pa.RecordBatch) -> bool:
        """Take the rows of a batch out of what is not passed; return False if they are not there."""
        if self._near < len(self._window) and self._pass_in(self._near, batch, is_next=True):
            return True
        at = 0
        while True:
            while at < len(self._window):
                if self._pass_in(at, batch):
                    return True
                at += 1
            if sum(held.table.num_rows for held in self._window) > _WINDOW_ROWS:
                self.unread += batch.num_rows
                return True
            more = next(self._reading, None)
            if more is None:
                return False
            at = max(len(self._window) - 1, 0)
            self._append(more)

    def _append(self, more: Placed) -> None:
        """Hold what comes next; a frame may begin in what was read before."""
        last = self._window[-1] if self._window else None
        if last is None or last.where != more.where or last.table.schema != more.table.schema:
            self._window.append(more)
            return
        places = [*last.places, *more.places]
        self._window[-1] = Placed(last.where, places, pa.concat_tables([last.table, more.table]))

    def _pass_in(self, at: int, batch: pa.RecordBatch, *, is_next: bool = False) -> bool:
        where, places, table = self._window[at]
        count = batch.num_rows
        for begin in [0] if is_next else self._begins(table, batch):
            part = table.slice(begin, count)
            if part.num_rows < count:
                return False
            found = first_difference(part, batch, self._group.keeps, is_filled=self._group.is_filled)
            if found is None:
                self._near = at + (begin > 0)
                end = begin + count
                rest = [
                    Placed(where, places[:begin], table.slice(0, begin)),
                    Placed(where, places[end:], table.slice(end)),
                ]
                self._window[at : at + 1] = [held for held in rest if held.table.num_rows]
                return True
        return False

    def _begins(self, table: pa.Table, batch: pa.RecordBatch) -> Iterator[int]:
        """Yield where the rows of a batch may begin."""
        last = table.num_rows - batch.num_rows
        if last < 0:
            return
        yield 0
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            head = column[0]
            if name in table.column_names and table[name].type == column.type and head.is_valid:
                is_like: Any = pc.equal(table[name], head) if not pa.types.is_nested(column.type) else None
                if is_like is not None and pc.any(is_like).as_py():
                    found: list[int] = pc.indices_nonzero(is_like).to_pylist()
                    yield from (begin for begin in found if 0 < begin <= last)
                    return
        yield from range(1, last + 1)
