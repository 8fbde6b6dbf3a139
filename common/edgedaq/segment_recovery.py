"""What a log is after a crash: which records it has, where they end, what was lost; nothing is invented.

Recovery reads the segments from a checkpoint to the end and keeps every valid record:

- A hole with valid records behind it stays where it is; its bytes are copied to ``<segment>.<position>.bad``.
  Readers explain it to whoever follows (``segment_reader.py``), and the table does the same here.
- What follows the last valid record is cut: never acknowledged, or damaged beyond proof.
- Between these lies a hole behind the last SYNCED record: nobody was told that it was durable, so a power cut
  may have taken it and left what was written after it. A log whose sender offers again what was not
  acknowledged (``resends``: the journal) is cut there, or the data would be declared lost while the sender
  still has it. A log that is the only copy (a spool: the rings did not survive either) keeps the rest.

A segment is continued only if its last record says that all before it was durable (an orderly end).
Otherwise it is truncated to its end, and the next one begins behind all that it could have held, so that no
position is ever used twice. Damage never raises; an unwritable disk is reported, not raised.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.segment_file import SegmentFile, list_segments
from edgedaq.segment_format import Control, Hole, Record, RecordKind, file_name, open_map
from edgedaq.segment_gaps import Explainer
from edgedaq.segment_pool import FREE_SUFFIX, FreeFile
from edgedaq.segment_quarantine import RecoveryReport, quarantine, set_aside
from edgedaq.segment_reader import find_open
from edgedaq.storage import Storage

__all__ = ["FoundSegment", "Recovered", "RecoveryReport", "recover"]

_COPY_BYTES = 1 << 20

_NO_FILE = {errno.EISDIR, errno.ESPIPE, errno.ENXIO, errno.ELOOP, errno.ENOENT}
"""What opening or reading a directory, a pipe, a socket or a link to nowhere says."""

SCAN_BYTES = 4 << 30
"""How much of a log is verified at start, newest first; damage further back is found by whoever reads it."""


@dataclass(slots=True)
class FoundSegment:
    """A segment that is part of the log; ``end`` is where its records end."""

    first: int
    size: int
    salt: int
    begin: int
    end: int


@dataclass(slots=True)
class Recovered:
    """A log as it was found; ``may_continue`` says whether its last segment takes more records."""

    segments: list[FoundSegment]
    free: list[FreeFile]
    table: StreamTable
    cursor: dict[str, object]
    may_continue: bool
    next_first: int
    report: RecoveryReport


@dataclass(slots=True)
class _Scan:
    """One pass over the segments: its result up to ``cut``, or to the end."""

    table: StreamTable = field(default_factory=StreamTable)
    cursor: dict[str, object] = field(default_factory=dict)
    records: int = 0
    unknown_count: int = 0
    holes: list[Hole] = field(default_factory=list)
    proven: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    is_clean: bool = False


def recover(
    storage: Storage, directory: Path, *, resends: bool, segment_bytes: int, scan_bytes: int = SCAN_BYTES
) -> Recovered:
    """Find out what a log holds, and put its end in order.

    The caller holds the log's lock. The directory exists.

    Args:
        resends: Whether whoever appends offers again what was never reported durable; see above.
        segment_bytes: The usual size of a segment.
        scan_bytes: How much to verify.

    Raises:
        OSError: The directory cannot be read.
    """
    report = RecoveryReport()
    free = _find_free(storage, directory)
    firsts = list_segments(storage, directory)
    files = _find_segments(storage, directory, firsts, free, report)
    try:
        found = _recover(storage, directory, files, free, report, resends, segment_bytes, scan_bytes)
    finally:
        for file in files:
            file.close()
    if firsts and files and firsts[-1] > files[-1].first:
        # Also the positions of a file that was one, and is none any more, are never used twice.
        found.next_first = max(found.next_first, firsts[-1] + segment_bytes)
        found.may_continue = False
    return found


def _recover(
    storage: Storage,
    directory: Path,
    files: list[SegmentFile],
    free: list[FreeFile],
    report: RecoveryReport,
    resends: bool,  # noqa: FBT001
    segment_bytes: int,
    scan_bytes: int,
) -> Recovered:
    start = _start_of_scan(files, scan_bytes)
    scan = _scan(storage, directory, files, start, None)
    unproven = [hole for hole in scan.holes if hole.last > scan.proven]
    is_cut = resends and bool(unproven)
    if is_cut:
        whole = scan
        cut = unproven[0].first
        scan = _scan(storage, directory, files, start, cut)
        report.cut_records = whole.records - scan.records
        kept = [file for file in files if file.first < cut]
        for file in files[len(kept) :]:
            report.cut_bytes += max(0, whole.ends.get(file.first, file.begin) - file.begin)
            file.close()
            set_aside(storage, file.path, report)
        del files[len(kept) :]
        if files:
            end = whole.ends.get(files[-1].first, cut)
            report.cut_bytes += max(0, end - cut)
            quarantine(storage, files[-1], Hole(cut, end, "cut"), report)
    report.kept_records = scan.records
    report.unknown_count = scan.unknown_count
    report.holes = scan.holes
    for hole in scan.holes:
        for file in files:
            if file.first <= hole.first < file.first + file.size and hole.reason == "damaged":
                quarantine(storage, file, hole, report)
    segments = [
        FoundSegment(
            file.first, file.size, file.salt, file.begin, scan.ends.get(file.first, _known_end(files, at))
        )
        for at, file in enumerate(files)
    ]
    next_first = 0
    may_continue = False
    if segments:
        last = segments[-1]
        next_first = last.first + max(last.size, segment_bytes)
        tail_bytes = 0 if is_cut else _tail_bytes(files[-1], last.end)
        report.cut_bytes += tail_bytes
        may_continue = scan.is_clean and not is_cut and not tail_bytes
        if not may_continue:
            _truncate(storage, directory, last, report)
    _make_durable(storage, directory, files[start:], report)
    return Recovered(segments, free, scan.table, scan.cursor, may_continue, next_first, report)


def _find_free(storage: Storage, directory: Path) -> list[FreeFile]:
    found: list[FreeFile] = []
    for name in storage.names(directory):
        if name.endswith(FREE_SUFFIX):
            fd = storage.open(directory / name)
            found.append(FreeFile(directory / name, storage.size(fd)))
            storage.close(fd)
    return found


def _find_segments(
    storage: Storage, directory: Path, firsts: list[int], free: list[FreeFile], report: RecoveryReport
) -> list[SegmentFile]:
    """Return the segments in order, closed: there may be more than a process may open.

    Files that are none, or none any more, go to the free ones. Only a disk error makes one missing, or what
    is no file: to go on without one that could not be opened for another reason would give up what it holds.
    """
    files: list[SegmentFile] = []
    empty: list[SegmentFile] = []
    for first in firsts:
        path = directory / file_name(first)
        try:
            file = SegmentFile(storage, directory, first)
        except OSError as e:
            if e.errno not in _NO_FILE and e.errno != errno.EIO:
                raise
            report.problems.append(f"{path}: cannot be opened: {e}")
            if e.errno in _NO_FILE:
                set_aside(storage, path, report)
            continue
        file.close()
        if file.foreign is not None and file.foreign.first > first:
            # Recycled, and a power cut lost the new name: whatever lay before it had been trimmed too.
            empty += [*files, file]
            files.clear()
        elif file.foreign is not None or not file.salt:
            # Named, and a power cut lost the new header.
            empty.append(file)
        else:
            files.append(file)
    proven = max((file.header.durable for file in files if file.header is not None), default=0)
    for file in empty:
        if file.foreign is None and not file.salt and file.first < proven:
            report.problems.append(f"{file.path}: was durable, and has neither a header nor records")
            set_aside(storage, file.path, report)
        else:
            free.append(FreeFile(file.path, file.size))
    return files


def _start_of_scan(files: list[SegmentFile], scan_bytes: int) -> int:
    """Return the first segment to verify; it has a checkpoint, unless none before has one either."""
    start, seen, is_based = len(files), 0, True
    while start > 0 and (seen < scan_bytes or not is_based):
        start -= 1
        file = files[start]
        seen += file.size
        file.reopen()
        is_based = file.checkpoint() is not None
        file.close()
    return start


def _known_end(files: list[SegmentFile], at: int) -> int:
    """Return where a segment says, through the next one's header, that it ends."""
    following = files[at + 1].header if at + 1 < len(files) else None
    if following is not None and following.previous == files[at].first:
        return following.previous_end
    return files[at].first + files[at].size


def _scan(storage: Storage, directory: Path, files: list[SegmentFile], start: int, cut: int | None) -> _Scan:
    """Read the segments from ``start`` on, up to ``cut`` when there is one."""
    scan = _Scan()
    explainer: Explainer | None = None
    explained = 0
    for at in range(start, len(files)):
        file = files[at]
        if cut is not None and file.first >= cut:
            break
        file.reopen()
        checkpoint = file.checkpoint()
        if checkpoint is not None:
            scan.cursor = checkpoint[1]
        if explainer is None:
            if checkpoint is not None:
                scan.table = checkpoint[0]
            explainer = Explainer(scan.table, partial(find_open, storage, directory, file.first))
        if file.header is not None:
            scan.proven = max(scan.proven, file.header.durable)
        if at > start:
            before = files[at - 1].first
            if file.header is None or file.header.previous != before:
                reason = "damaged" if file.header is None else "missing"
                scan.holes.append(Hole(scan.ends[before], file.begin, reason))
        if checkpoint is not None and len(scan.holes) > explained:
            explainer.arrive(checkpoint[0])
            explained = len(scan.holes)
        _scan_file(file, files, at, cut, scan, explainer)
        file.close()
    if explainer is not None:
        scan.unknown_count = explainer.unknown_count
    return scan


def _scan_file(
    file: SegmentFile, files: list[SegmentFile], at: int, cut: int | None, scan: _Scan, explainer: Explainer
) -> None:
    following = files[at + 1].header if at + 1 < len(files) else None
    trusted = following is not None and following.previous == file.first
    limit = following.previous_end if trusted and following else file.first + file.size
    if cut is not None and cut <= limit:
        limit, trusted = cut, True
    end = file.begin
    scan.is_clean = False
    for entry in file.walk(file.begin, limit, trusted=trusted):
        if isinstance(entry, Hole):
            scan.holes.append(entry)
            end = entry.last
            scan.is_clean = False
            continue
        end = entry.end
        if isinstance(entry, Record):
            scan.records += 1
            scan.is_clean = False
            explainer.explain(entry.frame)
        else:
            _take_control(entry, scan)
    scan.ends[file.first] = end


def _take_control(entry: Control, scan: _Scan) -> None:
    scan.is_clean = False
    if entry.kind == RecordKind.SYNCED and len(entry.payload) >= 8:
        durable = int.from_bytes(entry.payload[:8], "little")
        scan.proven = max(scan.proven, durable)
        scan.is_clean = durable == entry.position
    elif entry.kind == RecordKind.CURSOR:
        with contextlib.suppress(WireError):
            scan.cursor = open_map(entry.payload)


def _tail_bytes(file: SegmentFile, end: int) -> int:
    """Return how many bytes behind the end bear the salt of this use: a torn or damaged record."""
    file.reopen()
    needle = file.salt.to_bytes(8, "little")
    position, last = end, end
    while position < file.first + file.size:
        data = bytes(file.read(position, _COPY_BYTES))
        at = data.rfind(needle)
        if at >= 8:
            last = position + at + 16
        if len(data) < _COPY_BYTES:
            break
        position += _COPY_BYTES - 16
    return last - end


def _truncate(storage: Storage, directory: Path, last: FoundSegment, report: RecoveryReport) -> None:
    size = last.end - last.first
    if size >= last.size:
        return
    try:
        fd = storage.open(directory / file_name(last.first), write=True)
        try:
            storage.truncate(fd, size)
            storage.fdatasync(fd)
        finally:
            storage.close(fd)
        last.size = size
    except OSError as e:
        report.problems.append(f"{directory / file_name(last.first)}: cannot be cut: {e}")


def _make_durable(
    storage: Storage, directory: Path, files: list[SegmentFile], report: RecoveryReport
) -> None:
    """Make what was found hold: after a kill it may be in the page cache only."""
    try:
        for file in files:
            file.reopen()
            storage.fdatasync(file.fd)
            file.close()
        storage.sync_directory(directory)
    except OSError as e:
        report.problems.append(f"{directory}: what was found cannot be made durable: {e}")
