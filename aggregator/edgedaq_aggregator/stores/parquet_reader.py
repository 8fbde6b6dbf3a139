"""Parts of the Parquet store, read again: each is a block of its own, with the digest of the whole file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from edgedaq.errors import StoreError, WireError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.alike import first_difference, frame_of
from edgedaq_aggregator.stores.parquet_parts import hidden
from edgedaq_aggregator.stores.ranges import Block
from edgedaq_aggregator.stores.tables import TableDecoder

__all__ = ["find_row", "located", "parse_part"]

_UNREADABLE = (pa.ArrowException, OSError, ValueError)


def parse_part(info: OpenInfo, block: Block, data: bytes) -> Any:  # noqa: ARG001 -- a part says what it has
    """Return the rows of a part.

    Raises:
        StoreError: It is none.
    """
    try:
        return pq.ParquetFile(io.BytesIO(data)).read().replace_schema_metadata()
    except _UNREADABLE as e:
        message = f"{block.file} cannot be read as Parquet: {e}"
        raise StoreError(message) from e


def located(path: Path) -> Path:
    """Return where a part is: between its commit and its name there is a moment."""
    unnamed = hidden(path)
    return unnamed if not path.exists() and unnamed.is_file() else path


def find_row(
    infos: Mapping[int, OpenInfo],
    frames: Mapping[int, list[Frame]],
    block: Block,
    data: bytes,  # noqa: ARG001 -- of a file that was written anew, not all
    path: Path,
) -> tuple[str, str] | None:
    """Return the first row of a part that is not as it was stored; see ``FindPlace``."""
    whole = f"bytes {block.start} to {block.end}"
    try:
        table = pq.ParquetFile(path).read()
    except _UNREADABLE as e:
        reason = str(e).strip().partition("\n")[0]
        return whole, f"are not those that were stored, and cannot be read: {reason}"
    if block.held.turns != len(block.held.streams):
        return None
    try:
        at = 0
        for stream, told in block.held.streams.items():
            found = _find(infos[stream], stream, frames[stream], table.slice(at, told[2]), told[2])
            if found is not None:
                row, what = found
                return f"{whole}, row {at + row}", what
            at += told[2]
    except (WireError, KeyError, LookupError):
        return None
    return whole, "are not those that were stored, though all values are"


def _find(
    info: OpenInfo, stream: int, frames: list[Frame], table: pa.Table, rows: int
) -> tuple[int, str] | None:
    """Return the first row that differs, and how.

    Raises:
        LookupError: The journal does not have all of it any more.
        WireError: A frame cannot be decoded.
    """
    if sum(frame.rows for frame in frames) != rows:
        raise LookupError(stream)
    at = 0
    for batch in _batches(info, frames):
        part = table.slice(at, batch.num_rows)
        found = first_difference(part, batch.slice(0, part.num_rows))
        if found is None and part.num_rows < batch.num_rows:
            found = part.num_rows, "it is not there"
        if found is not None:
            row, what = at + found[0], found[1]
            frame, number = frame_of(frames, row)
            return row, f"row {number} of stream {stream:016x} (seq {frame.seq}): {what}"
        at += batch.num_rows
    return None


def _batches(info: OpenInfo, frames: list[Frame]) -> Iterator[pa.RecordBatch]:
    yield from TableDecoder(info).batches(frames) if frames else ()
