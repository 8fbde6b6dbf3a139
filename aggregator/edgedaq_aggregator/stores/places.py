"""Where exactly a file differs from what was stored: its block beside the frames that the journal still has.

A block is the bytes of its streams' frames, whole frames in turns. They are encoded once more, and at each
place the stream whose next frame lies there is passed; where none does, the one of which most is there is
where the file is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import ConfigError, WireError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.data_file import DataFile
from edgedaq_aggregator.stores.file_backend import FileFormat
from edgedaq_aggregator.stores.ranges import Block
from edgedaq_aggregator.stores.tables import units_of

__all__ = ["find_place"]

_SHOWN_BYTES = 40
_CHUNK_BYTES = 4 << 20


class _FoundPlace(NamedTuple):
    """The first byte that differs, in the file; whose row it is in, numbered from 0 as its producer did."""

    byte: int
    stream: int
    seq: int
    row: int
    what: str


class _Unit(NamedTuple):
    frame: Frame
    header: bytes
    data: bytes


def find_place(
    file_format: FileFormat,
    infos: Mapping[int, OpenInfo],
    frames: Mapping[int, list[Frame]],
    block: Block,
    data: bytes,
    path: Path,
    *,
    has_lines: bool = False,
) -> tuple[str, str] | None:
    """Return where the bytes of a block are wrong, and how; None where the journal cannot tell any more.

    Args:
        frames: Of the block's streams, what the journal has of what the block says it holds.
        data: What is at its place in the file now; shorter where the file ends.
        path: The file.
        has_lines: A line of it is a row.
    """
    found = _find(file_format, infos, frames, block, data)
    if found is None:
        return None
    whose = f"row {found.row} of stream {found.stream:016x} (seq {found.seq})"
    line = f", line {_count_lines(path, found.byte) + 1}" if has_lines else ""
    return f"byte {found.byte}{line}", f"{whose}: {found.what}"


def _find(
    file_format: FileFormat,
    infos: Mapping[int, OpenInfo],
    frames: Mapping[int, list[Frame]],
    block: Block,
    data: bytes,
) -> _FoundPlace | None:
    waiting: dict[int, list[_Unit]] = {}
    for stream, info in infos.items():
        found = _units_of(file_format, info, frames.get(stream, []), block.file)
        if found is None or sum(unit[1] for unit in found) != block.held.streams[stream][2]:
            return None
        waiting[stream] = [unit for unit, _ in found][::-1]
    if len(waiting) < len(block.held.streams):
        return None
    at = 0
    newest = next(iter(waiting))
    while any(waiting.values()):
        heads = {stream: units_[-1] for stream, units_ in waiting.items() if units_}
        if at == 0 and block.start == 0:
            header = next(iter(heads.values())).header
            if not data.startswith(header):
                return _FoundPlace(_common(data, header), newest, 0, 0, "the first line is another one")
            at = len(header)
        passed = next((s for s in (newest, *heads) if s in heads and _lies(data, at, heads[s].data)), None)
        if passed is None:
            return _differs(block, data, at, heads)
        at += len(heads[passed].data)
        waiting[passed].pop()
        newest = passed
    return None


def _units_of(
    file_format: FileFormat, info: OpenInfo, frames: list[Frame], file: str
) -> list[tuple[_Unit, int]] | None:
    """Return what the frames of a stream are in this file, and the rows of each; None: cannot be compared."""
    try:
        options = file_format.options(info.store_config.get(file_format.key))
    except ConfigError:
        return None
    if options.make is not DataFile:
        return None  # the bytes of its rows are not in it as they are
    encoder = file_format.encoder(info)
    found: list[tuple[_Unit, int]] = []
    for unit in units_of(frames):
        period_ns = options.period_ns
        period = max(unit[0].t_first_ns or info.t_open_ns, 0) // period_ns if period_ns else -1
        if not os.path.basename(file).startswith(options.prefix(period)):  # noqa: PTH119
            continue
        try:
            pieces = encoder.encode(unit)
        except WireError:
            continue  # was refused
        data = b"".join(bytes(buffer) for piece in pieces for buffer in piece.buffers)
        header = pieces[0].header if pieces else b""
        found.append((_Unit(unit[0], header, data), sum(frame.rows for frame in unit)))
    return found


def _lies(data: bytes, at: int, expected: bytes) -> bool:
    return data[at : at + len(expected)] == expected


def _common(data: bytes, expected: bytes) -> int:
    """Return how long two begin alike."""
    if data.startswith(expected):
        return len(expected)
    low, high = 0, min(len(data), len(expected))
    while low < high:
        middle = (low + high + 1) // 2
        if data[:middle] == expected[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _likeness(data: bytes, at: int, expected: bytes) -> int:
    """Return how much of what was stored is there: its begin, and its second half, no later than it was."""
    half = expected[len(expected) // 2 :]
    is_there = data.find(half, at, at + len(expected)) >= 0
    return _common(data[at : at + len(expected)], expected) + (len(half) if is_there else 0)


def _differs(block: Block, data: bytes, at: int, heads: Mapping[int, _Unit]) -> _FoundPlace:
    stream = max(heads, key=lambda one: _likeness(data, at, heads[one].data))
    frame, header, expected = heads[stream]
    same = _common(data[at : at + len(expected)], expected)
    lines = expected.count(b"\n", 0, same)
    row = lines if header else same * frame.rows // max(len(expected), 1)
    begin = max(same - 8, 0)
    was, now = expected[begin : begin + _SHOWN_BYTES], data[at + begin : at + begin + _SHOWN_BYTES]
    what = f"stored was {was!r}, found is {now!r}" if now else f"stored was {was!r}, the file ends here"
    return _FoundPlace(block.start + at + same, stream, frame.seq, frame.row0 + row, what)


def _count_lines(path: Path, end: int) -> int:
    count = 0
    with path.open("rb") as file:
        while end > 0 and (data := file.read(min(end, _CHUNK_BYTES))):
            count += data.count(b"\n")
            end -= len(data)
    return count
