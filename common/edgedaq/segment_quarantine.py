"""What recovery found, and where it keeps damaged bytes for a human: ``*.bad``, bounded, never removed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from edgedaq.segment_file import SegmentFile
from edgedaq.segment_format import Hole
from edgedaq.storage import Storage, write_all

__all__ = ["RecoveryReport", "quarantine", "set_aside"]

BAD_BYTES_MAX = 256 << 20
"""How much damaged data is kept for a human; what comes then is reported only."""

_COPY_BYTES = 1 << 20


@dataclass(slots=True)
class RecoveryReport:
    """What recovery found, for the log of events and for alarms.

    ``holes`` are those within the kept records; ``cut_bytes`` counts what was taken off the end, valid
    records that a cut at a hole took (``cut_records``) included. ``problems`` are sentences for a human.
    """

    kept_records: int = 0
    holes: list[Hole] = field(default_factory=list)
    cut_bytes: int = 0
    cut_records: int = 0
    unknown_count: int = 0
    bad_files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def set_aside(storage: Storage, path: Path, report: RecoveryReport) -> None:
    """Take a whole file, which is closed, out of the log; kept for a human."""
    target = path.with_name(path.name + ".bad")
    try:
        storage.rename(path, target)
        report.bad_files.append(target)
    except OSError as e:
        report.problems.append(f"{path}: cannot be set aside: {e}")


def quarantine(storage: Storage, file: SegmentFile, hole: Hole, report: RecoveryReport) -> None:
    """Copy the bytes of a hole for a human; once."""
    directory = file.path.parent
    target = directory / f"{file.path.name}.{hole.first:016x}.bad"
    if target.name in storage.names(directory):
        return
    if _bad_bytes(storage, directory) + hole.last - hole.first > BAD_BYTES_MAX:
        report.problems.append(
            f"{target}: not written, {BAD_BYTES_MAX} bytes of damaged data are kept already"
        )
        return
    try:
        fd = storage.open(target, write=True, create=True)
        try:
            position = hole.first
            file.reopen()
            while position < hole.last:
                data = file.read(position, min(_COPY_BYTES, hole.last - position))
                if not data:
                    break
                write_all(storage, fd, [data], position - hole.first)
                position += len(data)
            storage.fdatasync(fd)
        finally:
            storage.close(fd)
            file.close()
        report.bad_files.append(target)
    except OSError as e:
        report.problems.append(f"{target}: cannot be written: {e}")


def _bad_bytes(storage: Storage, directory: Path) -> int:
    total = 0
    for name in storage.names(directory):
        if name.endswith(".bad"):
            with contextlib.suppress(OSError):
                fd = storage.open(directory / name)
                total += storage.size(fd)
                storage.close(fd)
    return total
