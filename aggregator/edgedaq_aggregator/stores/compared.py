"""What a store has beside what the journal still has: row by row, value by value.

For stores whose records tell how many rows there are, but not what is in them. Rows that lie together are a
*group*, of one stream, or of several whose rows come one after another. Its rows are those of its streams'
frames in order, without those that marks say were not stored; of the oldest the journal has no frames any
more::

    rows of a group      | not retained: counted | compared with frames  |
                         0            rows - retained                  rows

Where rows are missing among those that are not retained, the others lie that much earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import Frame, decode
from edgedaq.open_info import OpenInfo, decode_open

from edgedaq_aggregator.stores.reader import Checked, Problem, Retained
from edgedaq_aggregator.stores.tables import TableDecoder

__all__ = [
    "Group",
    "Placed",
    "accounts_of",
    "compare",
    "first_difference",
    "frame_of",
    "info_of",
    "sum_marks",
]

_ROWS_AT_ONCE = 4096
_NO_LOSS = ("close", "start", "stop", "redirected")


class Placed(NamedTuple):
    """Rows that were read back: in which file or table, the place of each in it, and what they are."""

    where: str
    places: Sequence[object]
    table: pa.Table


class Group(NamedTuple):
    """Rows that lie together.

    ``where``: what they lie in, for people; ``there``: how many there are, of those that the accounts of its
    streams speak of; ``read`` yields them from so many on; ``keeps`` says whether a value is stored as it is,
    and not as missing; ``is_filled``: what is missing is stored as a value.
    """

    streams: tuple[int, ...]
    where: str
    there: int
    read: Callable[[int], Iterator[Placed]]
    keeps: Callable[[Any], bool] = lambda _: True
    is_filled: bool = False


class _Difference(NamedTuple):
    row: int
    where: str
    place: str
    what: str


def accounts_of(table: StreamTable) -> dict[int, StreamState]:
    """Return all accounts of a store, open or closed."""
    return {**table.tombstones, **table.streams}


def info_of(account: StreamState | None) -> OpenInfo | None:
    """Return what a stream is; None if nobody can tell any more."""
    try:
        return None if account is None else decode_open(decode(memoryview(account.open_raw)))
    except WireError:
        return None


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
        retained, turns = self._count()
        cursors: dict[int, _Cursor] = {}
        for at, group in enumerate(self._groups):
            stored = sum(self._accounts[stream].rows for stream in group.streams)
            older = stored - retained.get(at, 0)
            lost = max(stored - group.there, 0)
            if at not in retained or older < 0 or turns[at] > len(group.streams):
                found.counted += group.there
                if lost:
                    what = f"{lost} of {stored} rows are not there"
                    found.problems.append(Problem(group.where, f"{group.there} rows", what))
                continue
            found.counted += max(older - lost, 0)
            cursors[at] = _Cursor(group, older, lost)
        for stream, frames in self._units(set(cursors)):
            cursor = cursors[self._group_of[stream]]
            if not cursor.is_over:
                problem = cursor.pass_frames(stream, frames, self._accounts[stream])
                found.problems += [problem] if problem is not None else []

    def _count(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return how many rows of each group are retained, and how often their stream changes."""
        rows: dict[int, int] = {}
        turns: dict[int, int] = {}
        newest: dict[int, int] = {}
        for frame in self._frames(set(range(len(self._groups)))):
            at = self._group_of[frame.stream]
            rows[at] = rows.get(at, 0) + frame.rows
            turns[at] = turns.get(at, 0) + (newest.get(at) != frame.stream)
            newest[at] = frame.stream
        return rows, turns

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


def first_difference(
    table: pa.Table,
    batch: pa.RecordBatch,
    keeps: Callable[[Any], bool] = lambda _: True,
    *,
    is_filled: bool = False,
) -> tuple[int, str] | None:
    """Return the first row of a table that is not as in a batch of as many rows, and how it differs."""
    first: tuple[int, str] | None = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        absent = pa.chunked_array([pa.nulls(table.num_rows)])
        there: Any = table[name] if name in table.column_names else absent
        if there.type == column.type and there.equals(pa.chunked_array([column])):
            continue
        pairs = zip(_plain_values(there), _plain_values(column), strict=True)
        for row, (found, value) in enumerate(pairs):
            if first is not None and row >= first[0]:
                break
            is_same = _same(found, value, keeps) or (is_filled and _is_filled(found, value))
            if not is_same:
                first = row, f"{name}: stored was {_shown(value)}, found is {_shown(found)}"
    return first


def _plain_values(column: Any) -> list[Any]:
    """Return the values of a column as Python has them, times as whole numbers."""
    values: list[Any] = column.cast(_timeless(column.type)).to_pylist()
    return values


def _timeless(kind: Any) -> Any:
    types = pa.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_timestamp(kind):
        return pa.int64()
    if types.is_fixed_size_list(kind):
        return pa.list_(_timeless(kind.value_type), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_timeless(kind.value_type))
    return kind


def _same(there: Any, value: Any, keeps: Callable[[Any], bool]) -> bool:
    if there == value and type(there) is type(value):
        return True
    if isinstance(value, float) and not keeps(value):
        return there is None
    if isinstance(value, float) and isinstance(there, float):
        return there == value or (math.isnan(there) and math.isnan(value))
    if isinstance(value, list) and isinstance(there, list):
        return len(there) == len(value) and all(
            _same(a, b, lambda _: True) for a, b in zip(there, value, strict=True)
        )
    if isinstance(there, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return there == str(value) or _number(there) == value
    if isinstance(there, int | float) and isinstance(value, int | float):
        return there == value
    return bool(there == value)


def _is_filled(there: Any, value: Any) -> bool:
    """Tell whether a value stands for what is missing, as ``row_columns.py`` says."""
    if isinstance(value, list) and isinstance(there, list) and len(there) == len(value):
        return all(_same(a, b, lambda _: True) or _is_filled(a, b) for a, b in zip(there, value, strict=True))
    if value is None:
        is_limit = isinstance(there, int) and (there + 1) & there == 0
        is_least = isinstance(there, int) and there < 0 and -there & (-there - 1) == 0
        is_nan = isinstance(there, float) and math.isnan(there)
        return not there or is_limit or is_least or is_nan or isinstance(there, list)
    return there is None and isinstance(value, int)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def frame_of(frames: Sequence[Frame], number: int) -> tuple[Frame, int]:
    """Return the frame that a row is in, and its number as its producer gave it."""
    for frame in frames:
        if number < frame.rows:
            return frame, frame.row0 + number
        number -= frame.rows
    return frames[-1], frames[-1].row0


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
