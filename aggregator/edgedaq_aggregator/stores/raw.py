"""The raw store: the bytes of messages back to back, or each behind its length as a little-endian u32.

Only whole messages are in a file. Tables that are put here are stored as the bodies of their frames: of a
packed stream these are its rows, fixed-width and little-endian, so that ``numpy.fromfile`` reads them; other
bodies are as ``frame.py`` draws them. With ``length_prefix`` each such body counts as one message.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from edgedaq.batch import MESSAGE_COLUMN, BatchDecoder, raw_body, raw_messages
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.frame import FLAG_CONTINUES, FLAG_PIECE, Frame, Kind
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage
from edgedaq.store_config import DAQJobStoreConfigRaw

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.data_file import Buffer
from edgedaq_aggregator.stores.file_backend import Encoder, FileBackend, FileOptions, Piece
from edgedaq_aggregator.stores.file_reader import FileReader
from edgedaq_aggregator.stores.places import find_place
from edgedaq_aggregator.stores.put_away import put_files_away
from edgedaq_aggregator.stores.ranges import Block
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader

__all__ = ["DAQJobStoreRaw", "RawFormat", "make_reader"]

_LENGTH = struct.Struct("<I")


class RawFormat:
    """Frames to the bytes of their messages."""

    key = "raw"

    def options(self, store_config: object) -> FileOptions:
        """See ``FileFormat``."""
        found = _convert(store_config)
        return FileOptions(
            found.file_path,
            found.add_date,
            found.overwrite,
            rotate_bytes=found.rotate_size or 0,
            rotate_ns=found.rotate_ns,
        )

    def encoder(self, info: OpenInfo) -> Encoder:
        """See ``FileFormat``."""
        try:
            return _RawEncoder(has_lengths=_convert(info.store_config.get(self.key)).length_prefix)
        except ConfigError:
            return _RawEncoder(has_lengths=False)


def _convert(store_config: object) -> DAQJobStoreConfigRaw:
    try:
        return msgspec.convert(store_config, DAQJobStoreConfigRaw)
    except msgspec.ValidationError as e:
        message = f"store_config.raw: {e}"
        raise ConfigError(message) from e


class _RawEncoder:
    def __init__(self, *, has_lengths: bool) -> None:
        self._has_lengths = has_lengths

    def encode(self, frames: Sequence[Frame]) -> list[Piece]:
        if self._has_lengths:
            return [Piece(b"", _prefixed(frames))]
        return [Piece(b"", [raw_body(frame) if frame.kind is Kind.RAW else frame.body for frame in frames])]


def _prefixed(frames: Sequence[Frame]) -> list[Buffer]:
    found: list[Buffer] = []
    parts: list[memoryview] = []
    for frame in frames:
        if not frame.flags & FLAG_PIECE:
            for message in raw_messages(frame) if frame.kind is Kind.RAW else [frame.body]:
                found += (_LENGTH.pack(len(message)), message)
            continue
        parts.append(frame.body)
        if not frame.flags & FLAG_CONTINUES:
            found += (_LENGTH.pack(sum(map(len, parts))), *parts)
            parts = []
    return found


class DAQJobStoreRaw(DAQJobStore):
    """Stores streams whose ``store_config`` has ``raw``."""

    key = "raw"

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return FileBackend(RawFormat(), state_dir, out_dir, OsStorage())

    @classmethod
    def put_away(cls, place: StorePlace) -> list[Path]:
        """See ``DAQJobStore``."""
        return put_files_away(place)


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a raw store back."""
    return FileReader(place, "raw", _parse, functools.partial(find_place, RawFormat()))


def _parse(info: OpenInfo, block: Block, data: bytes) -> Any:
    """Return messages, or the rows of a packed table.

    Raises:
        StoreError: Nothing in the file tells where a row or a message ends.
    """
    rows = sum(told[2] for told in block.held.streams.values())
    has_lengths = _convert(info.store_config.get("raw")).length_prefix
    parts = _split(data) if has_lengths else [data]
    if info.form == "table":
        body = b"".join(parts)
        frame = Frame(Kind.PACKED, 0, rows, 0, 0, 0, 0, 0, memoryview(body), memoryview(b""))
        try:
            return pa.Table.from_batches(BatchDecoder(info).batches([frame]))
        except WireError as e:
            message = (
                f"{block.file}: its rows are not of fixed width, and cannot be read back from a raw file"
            )
            raise StoreError(message) from e
    if not has_lengths and rows != 1:
        message = f"{block.file}: {rows} messages back to back; only with length_prefix are they told apart"
        raise StoreError(message)
    return pa.table({MESSAGE_COLUMN: pa.array(parts, pa.binary())})


def _split(data: bytes) -> list[bytes]:
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        parts.append(data[at - length : at])
    return parts
