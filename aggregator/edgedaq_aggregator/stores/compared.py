"""What a store has beside what the journal still has: row by row, value by value.

For stores whose records tell how many rows there are, but not what is in them. Rows that lie together are a
*group*, of one stream, or of several whose rows nothing tells apart (``joint.py``). Its rows are those of its
streams' frames in order, without those that marks say were not stored; of the oldest the journal has no
frames any more::

    rows of a group      | not retained: counted | compared with frames  |
                         0            rows - retained                  rows

Where rows are missing among those that are not retained, the others lie that much earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import Frame

from edgedaq_aggregator.stores.alike import Group, Placed, first_difference, frame_of, info_of
from edgedaq_aggregator.stores.joint import JointCursor
from edgedaq_aggregator.stores.reader import Checked, Problem, Retained
from edgedaq_aggregator.stores.tables import TableDecoder

__all__ = [
    "accounts_of",
    "compare",
    "sum_marks",
]

_ROWS_AT_ONCE = 4096
_NO_LOSS = ("close", "start", "stop", "redirected")


class _Difference(NamedTuple):
    row: int
    where: str
    place: str
    what: str


def accounts_of(table: StreamTable) -> dict[int, StreamState]:
    """Return all accounts of a store, open or closed."""
    return {**table.tombstones, **table.streams}


def sum_marks(marks: Sequence[Mapping[str, str]], found: Checked) -> None:
    """Add up what marks say is missing of each stream."""
    for mark in marks:
        try:
            stream = int(mark["stream"] or "", 16)
            rows = int(mark["rows"]) if mark["rows"] else None
        except (KeyError, TypeError, ValueError):
            continue  # somebody else's, or damaged: the sums will tell
        if mark["kind"] in _NO_LOSS:
            continue
        known = found.marked.get(stream, 0)
        found.marked[stream] = None if rows is None or known is None else known + rows


def compare(
    groups: Sequence[Group],
    table: StreamTable,
    marks: Sequence[Mapping[str, str]],
    retained: Retained,
    found: Checked,
) -> None:
    """Compare groups with the journal; the first difference of each is added to what was found."""
    comparison = _Comparison(groups, table, marks, retained)
    comparison.run(found)


class _Comparison:
    def __init__(
        self,
        groups: Sequence[Group],
        table: StreamTable,
        marks: Sequence[Mapping[str, str]],
        retained: Retained,
    ) -> None:
        self._groups = groups
        self._accounts = accounts_of(table)
        self._retained = retained
        self._skipped = _skipped(marks)
        self._group_of = {stream: at for at, group in enumerate(groups) for stream in group.streams}

    def run(self, found: Checked) -> None:
        retained = self._count()
        cursors: dict[int, _Cursor | JointCursor] = {}
        for at, group in enumerate(self._groups):
            stored = sum(self._accounts[stream].rows for stream in group.streams)
            older = stored - retained.get(at, 0)
            lost = max(stored - group.there, 0)
            if at not in retained or older < 0:
                found.counted += group.there
                if lost:
                    what = f"{lost} of {stored} rows are not there"
                    found.problems.append(Problem(group.where, f"{group.there} rows", what))
                continue
            found.counted += max(older - lost, 0)
            make = _Cursor if len(group.streams) == 1 else JointCursor
            cursors[at] = make(group, older, lost)
        for stream, frames in self._units(set(cursors)):
            cursor = cursors[self._group_of[stream]]
            if not cursor.is_over:
                problem = cursor.pass_frames(stream, frames, self._accounts[stream])
                found.problems += [problem] if problem is not None else []
        for cursor in cursors.values():
            if isinstance(cursor, JointCursor) and not cursor.is_over:
                problem = cursor.finish()
                found.problems += [problem] if problem is not None else []
                found.counted += cursor.unread

    def _count(self) -> dict[int, int]:
        """Return how many rows of each group are retained."""
        rows: dict[int, int] = {}
        for frame in self._frames(set(range(len(self._groups)))):
            at = self._group_of[frame.stream]
            rows[at] = rows.get(at, 0) + frame.rows
        return rows

    def _units(self, groups: set[int]) -> Iterator[tuple[int, list[Frame]]]:
        """Yield frames that are decoded at once; all pieces of a message together."""
        held: dict[int, list[Frame]] = {}
        for frame in self._frames(groups):
            at = self._group_of[frame.stream]
            gathered = held.setdefault(at, [])
            is_another = bool(gathered) and (
                gathered[0].stream != frame.stream or gathered[0].kind is not frame.kind
            )
            if is_another or sum(f.rows for f in gathered) >= _ROWS_AT_ONCE:
                yield gathered[0].stream, gathered
                gathered = held[at] = []
            gathered.append(frame)
        for gathered in held.values():
            yield gathered[0].stream, gathered

    def _frames(self, groups: set[int]) -> Iterator[Frame]:
        """Yield the frames of groups that the journal has, and the store should have."""
        streams = {stream for stream, at in self._group_of.items() if at in groups}
        for frame in self._retained.follow(streams):
            is_skipped = any(a <= frame.seq <= b for a, b in self._skipped.get(frame.stream, ()))
            if frame.seq < self._accounts[frame.stream].next_seq and not is_skipped:
                yield frame


class _Cursor:
    """How far the rows of a group have been compared.

    Args:
        older: How many rows the journal does not have any more.
        lost: How many rows of the group are missing, nobody knows where.
    """

    def __init__(self, group: Group, older: int, lost: int) -> None:
        self.is_over = False
        self._group = group
        self._older = older
        self._lost = lost
        self._decoders: dict[int, TableDecoder] = {}
        self._reading: Iterator[Placed] | None = None
        self._held: Placed | None = None
        self._last = group.where, "the begin"

    def pass_frames(self, stream: int, frames: Sequence[Frame], account: StreamState) -> Problem | None:
        """Compare what is next with frames; return the first difference."""
        decoder = self._decoders.get(stream)
        try:
            if decoder is None and (info := info_of(account)) is not None:
                decoder = self._decoders[stream] = TableDecoder(info)
            batches = [] if decoder is None else decoder.batches(frames)
        except WireError as e:
            self.is_over = True
            return Problem("journal", f"stream {stream:016x} (seq {frames[0].seq})", str(e))
        number = 0
        for batch in batches:
            found = self._begin(batch) if self._reading is None else None
            if found is None:
                found = self._pass_batch(batch)
            if found is None:
                number += batch.num_rows
                continue
            self.is_over = True
            frame, row = frame_of(frames, number + found.row)
            whose = f"row {row} of stream {stream:016x} (seq {frame.seq})"
            return Problem(found.where, found.place, f"{whose}: {found.what}")
        return None

    def _begin(self, batch: pa.RecordBatch) -> _Difference | None:
        """Find where the rows that are retained begin."""
        if self._lost and self._older:
            self._reading = self._group.read(max(self._older - self._lost, 0))
            begun = self._last
            if self._pass_batch(batch) is None:
                what = f"{self._lost} rows before it are not there, which the journal no longer has"
                return _Difference(0, *self._last, what)
            self._last = begun
        self._reading, self._held = self._group.read(self._older), None
        return None

    def _pass_batch(self, batch: pa.RecordBatch) -> _Difference | None:
        at = 0
        while at < batch.num_rows:
            part = self._take(batch.num_rows - at)
            if part is None:
                where, place = self._last
                return _Difference(at, where, f"behind {place}", "it is not there")
            count = part.table.num_rows
            row = first_difference(
                part.table, batch.slice(at, count), self._group.keeps, is_filled=self._group.is_filled
            )
            if row is not None:
                place = f"row {part.places[row[0]]}"
                return _Difference(at + row[0], part.where, place, row[1])
            at += count
            self._last = part.where, f"row {part.places[-1]}"
        return None

    def _take(self, count: int) -> Placed | None:
        """Return the rows that are next, at most so many; None at the end."""
        held = self._held or next(self._reading or iter(()), None)
        if held is None:
            return None
        where, places, table = held
        self._held = Placed(where, places[count:], table.slice(count)) if table.num_rows > count else None
        return Placed(where, places[:count], table.slice(0, count))


def _skipped(marks: Sequence[Mapping[str, str]]) -> dict[int, list[tuple[int, int]]]:
    """Return the seqs of each stream that were not stored, as marks say."""
    found: dict[int, list[tuple[int, int]]] = {}
    for mark in marks:
        if mark["kind"] in _NO_LOSS:
            continue
        try:
            told = int(mark["stream"], 16), int(mark["first_seq"]), int(mark["last_seq"])
        except (TypeError, ValueError):
            continue
        found.setdefault(told[0], []).append(told[1:])
    return found
