"""``verify``: proves or refutes, from the files alone, that produced = stored + waiting + dropped.

=========== ==========================================================================================
produced    what the journal says of each stream at its end; read record by record, checksums checked
stored      what each store's commits have counted, and the stored data itself, read again in full
            (``stores/reader.py``): rows that are there as they were committed
waiting     rows that the journal really has behind what the store has committed
dropped     what the store has counted as missing, and the marks that say so beside the data
=========== ==========================================================================================

The aggregator may be running: stores are read as of one commit, then the journal as far as it reaches then.
Nothing is changed. The first problem of the report is the first discrepancy.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgedaq.delivery import StreamState, StreamTable, Verdict, gap_of
from edgedaq.errors import StoreError, WireError
from edgedaq.frame import DATA_KINDS, Frame, Kind, decode
from edgedaq.open_info import decode_open
from edgedaq.segment_file import list_segments
from edgedaq.segment_format import Hole, Record, file_name
from edgedaq.segment_reader import SegmentReader, table_at
from edgedaq.storage import OsStorage

from edgedaq_aggregator.ledger import LedgerRow, StoreAccounts, format_ledger, ledger_of
from edgedaq_aggregator.stored import Stored
from edgedaq_aggregator.stores.reader import Checked, Problem, StoreReader

__all__ = ["Report", "format_report", "verify"]

_FOR_EVER = (1 << 64) - 1
_LOOKS = 4
_LOOK_AGAIN_S = 0.05
_SHOWN_MAX = 20


class _Waiting(NamedTuple):
    """What of one store the journal is replayed into."""

    position: int
    table: StreamTable


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: Discrepancies, by store; empty: nothing was refuted.
        notes: What could not be checked.
        away_rows: Rows in files that are not there.
        counted_rows: Rows of which only that they are there is known: the journal no longer has them.
        silent: Stores that could not be asked, and why.
        lines: One per store: what was read.
    """

    rows: list[LedgerRow]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    away_rows: int = 0
    counted_rows: int = 0
    silent: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def is_proven(self) -> bool:
        """Every store was asked, nothing is wrong, and nothing is missing."""
        return not (self.problems or self.away_rows or self.silent)


def verify(stored: Stored) -> Report:
    """Read everything and compare.

    Raises:
        OSError: A file of the state cannot be read.
    """
    journal_dir = stored.state_dir / "journal"
    journal = _Journal(journal_dir)
    replays = {
        name: _Waiting(reader.position or 0, StreamTable.restore(reader.table.snapshot()))
        for name, (_, reader) in stored.readers.items()
    }
    produced = journal.replay(replays)
    accounts = {name: StoreAccounts(key, reader.table) for name, (key, reader) in stored.readers.items()}
    report = Report(ledger_of(produced, accounts))
    report.silent.update(stored.silent)
    for row in report.rows:
        if not row.balances:
            off = row.produced - row.stored - row.waiting - row.dropped
            report.problems.append(Problem(row.store, f"stream {row.stream}", f"its account is off by {off}"))
    needed = min([replay.position for replay in replays.values()], default=_FOR_EVER)
    for hole in journal.holes:
        if hole.last > needed:
            report.problems.append(_hole_problem(journal_dir, hole))
        else:
            report.notes.append(
                f"the journal is damaged where all of it is stored: {_hole_problem(journal_dir, hole)}"
            )
    for name, (_, reader) in stored.readers.items():
        _check_store(name, reader, replays[name], journal, report)
    return report


def format_report(report: Report) -> str:
    """Return a report as text; its last line is the verdict."""
    lines = [format_ledger(report.rows), *report.lines, *(f"note: {note}" for note in report.notes)]
    lines += [f"not asked: {name}: {reason}" for name, reason in report.silent.items()]
    shown = report.problems[:_SHOWN_MAX]
    lines += [f"wrong: {where}: {place}: {what}" for where, place, what in shown]
    if len(report.problems) > len(shown):
        lines.append(f"and {len(report.problems) - len(shown)} more")
    sums = [sum(row[at] for row in report.rows) for at in (6, 7, 8, 9)]  # type: ignore[misc]
    account = "produced {} = stored {} + waiting {} + dropped {}".format(*sums)
    if report.counted_rows:
        account += f"; of {report.counted_rows} rows only that they are there"
    missing = [f"{', '.join(report.silent)} could not be asked"] if report.silent else []
    if report.away_rows:
        missing.append(f"{report.away_rows} rows are in files that are not here")
    if report.problems:
        where, place, what = report.problems[0]
        lines.append(f"verify: REFUTED, first by {where}: {place}: {what}")
    elif missing:
        lines.append(f"verify: not refuted, but {' and '.join(missing)}; {account}")
    else:
        lines.append(f"verify: proven, {account}")
    return "\n".join(lines)


class _Journal:
    """The journal, read in order."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._storage = OsStorage()
        self.holes: list[Hole] = []

    def replay(self, replays: Mapping[str, _Waiting]) -> StreamTable:
        """Read all of it into the accounts of the stores; return the account at its end."""
        table = StreamTable()
        for position, found in self._entries():
            if isinstance(found, StreamTable):
                table = found
                continue
            if isinstance(found, Hole):
                self.holes.append(found)
                continue
            _apply(table, found)
            for replay in replays.values():
                if position >= replay.position:
                    _apply(replay.table, found)
        return table

    def take(self, wanted: Mapping[int, tuple[int, int]]) -> dict[int, list[Frame]]:
        """See ``Retained``."""
        frames: dict[int, list[Frame]] = {stream: [] for stream in wanted}
        for _, found in self._entries():
            if isinstance(found, Frame) and found.stream in wanted and found.kind in DATA_KINDS:
                first, last = wanted[found.stream]
                held = frames[found.stream]
                if first <= found.seq <= last and (not held or held[-1].seq < found.seq):
                    held.append(found)
        return frames

    def follow(self, streams: Collection[int]) -> Iterator[Frame]:
        """See ``Retained``."""
        reached: dict[int, int] = {}
        for _, found in self._entries():
            if (
                isinstance(found, Frame)
                and found.stream in streams
                and found.kind in DATA_KINDS
                and found.seq > reached.get(found.stream, -1)
            ):
                reached[found.stream] = found.seq
                yield found

    def _entries(self) -> Iterator[tuple[int, Frame | Hole | StreamTable]]:
        """Yield the account at the begin, then what follows, each with its position.

        Beside a running writer a record may be seen half written: a hole counts if it is still there later.
        """
        firsts = list_segments(self._storage, self._directory)
        if not firsts:
            return
        at = firsts[0]
        yield at, table_at(self._directory, at, storage=self._storage)
        doubted, looks = -1, 0
        while True:
            with SegmentReader(self._directory, at, storage=self._storage) as reader:
                for entry in _read_all(reader):
                    if isinstance(entry, Record):
                        yield entry.position, entry.frame
                        continue
                    if entry.last == _FOR_EVER:
                        return
                    if entry.table is not None:
                        yield entry.first, entry.table
                        continue
                    looks = looks + 1 if entry.first == doubted else 1
                    if looks < _LOOKS:
                        at = doubted = entry.first
                        time.sleep(_LOOK_AGAIN_S)
                        break
                    yield entry.first, entry
                else:
                    return


def _read_all(reader: SegmentReader) -> Iterator[Record | Hole]:
    while found := reader.read(_FOR_EVER):
        yield from found


def _apply(table: StreamTable, frame: Frame) -> None:
    """Judge a frame as a store does; what it skips counts as missing."""
    try:
        verdict = table.judge(frame)
        if verdict is Verdict.ACCEPT and frame.kind is Kind.GAP:
            state = table.streams[frame.stream]
            gap_rows, next_row = state.gap_rows, state.next_row
            _, rows, _ = gap_of(frame)
            table.apply(frame)
            if rows is not None:
                state.gap_rows = gap_rows + max(frame.row0 + rows - next_row, 0)
        elif verdict is Verdict.ACCEPT:
            table.apply(frame)
    except WireError:
        return  # the store refuses it, and says so


def _hole_problem(directory: Path, hole: Hole) -> Problem:
    first = max((one for one in list_segments(OsStorage(), directory) if one <= hole.first), default=0)
    place = f"bytes {hole.first - first} to {hole.last - first}"
    return Problem(
        str(directory / file_name(first)), place, f"{hole.reason}: what was journaled here is lost"
    )


def _check_store(name: str, reader: StoreReader, replay: _Waiting, journal: _Journal, report: Report) -> None:
    try:
        found = reader.check(journal)
    except (StoreError, OSError) as e:
        report.silent[name] = f"cannot be read: {e}"
        return
    report.problems += found.problems
    report.notes += found.notes
    report.away_rows += sum(found.away.values())
    report.counted_rows += found.counted
    if found.unasked:
        report.silent[name] = "; ".join(found.unasked)
    there = sum(found.rows.values())
    report.lines.append(f"{name}: {found.read_bytes} bytes read again, {there} rows are as they were stored")
    accounts = [*reader.table.tombstones.values(), *reader.table.streams.values()]
    for account in accounts:
        _check_stored(name, account, found, report)
        _check_marked(name, account, found, report)
    for row in report.rows:
        if row.store == name and row.waiting:
            _check_waiting(row, reader.table, replay, report)


def _check_stored(name: str, account: StreamState, found: Checked, report: Report) -> None:
    """Compare what commits have counted of a stream with what was recorded of its rows."""
    there = found.rows.get(account.stream, 0)
    missing = account.rows - there - found.away.get(account.stream, 0)
    stream = f"stream {account.stream:016x}"
    if missing == 0 or _is_overwriting(account):
        return
    if missing > 0 and found.problems:
        return  # what follows a problem in its file was not counted
    what = f"{account.rows} rows were committed, {account.rows - missing} are recorded"
    if missing > 0 and not found.is_whole:
        report.notes.append(f"{name}: {stream}: {what}; the rest was stored before that")
        return
    report.problems.append(Problem(name, stream, what))


def _check_marked(name: str, account: StreamState, found: Checked, report: Report) -> None:
    """Compare what a store has counted as missing with what its marks say."""
    marked = found.marked.get(account.stream, 0)
    if marked is None or account.gaps_unknown or marked == account.gap_rows:
        return
    stream = f"stream {account.stream:016x}"
    what = f"{account.gap_rows} rows were dropped, its marks say {marked}"
    if marked < account.gap_rows and (found.problems or any("_marks" in note for note in found.notes)):
        report.notes.append(f"{name}: {stream}: {what}")
        return
    report.problems.append(Problem(name, stream, what))


def _check_waiting(row: LedgerRow, table: StreamTable, replay: _Waiting, report: Report) -> None:
    """Compare what waits for a store with what the journal has of it."""
    stream = int(row.stream, 16)
    now = replay.table.streams.get(stream) or replay.table.tombstones.get(stream)
    then = table.streams.get(stream) or table.tombstones.get(stream)
    reached = 0 if then is None else then.next_row
    there = 0 if now is None else now.next_row - reached
    if there != row.waiting:
        what = f"{row.waiting} rows wait for {row.store}, the journal has {there} of them"
        report.problems.append(Problem("journal", f"stream {row.stream}", what))


def _is_overwriting(account: StreamState) -> bool:
    try:
        config = decode_open(decode(memoryview(account.open_raw))).store_config
    except WireError:
        return False
    return any(isinstance(one, dict) and one.get("overwrite") is True for one in config.values())
