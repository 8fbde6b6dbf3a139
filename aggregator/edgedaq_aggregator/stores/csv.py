"""The CSV store: one line per row, the names of the columns in the first line of each file.

=============== =========================================================================================
whole numbers   as they are; floats in the shortest form that reads back the same; ``nan``, ``inf``
booleans        ``true``, ``false``
timestamps      ISO 8601 UTC, as many digits below the second as it takes
text            quoted where it holds a comma, a quote or a line break; an empty one is ``""``
bytes           hex, none at all ``""``
arrays          ``"[1,2,3]"``, fixed and ragged ones alike
missing         empty
=============== =========================================================================================

A raw stream that is put here has one column, ``message``, in hex; an event stream has ``metadata`` (JSON) and
``payload`` (hex).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from edgedaq.errors import ConfigError, WireError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage
from edgedaq.store_config import DAQJobStoreConfigCSV

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.csv_tables import parse_lines
from edgedaq_aggregator.stores.data_file import DataFile
from edgedaq_aggregator.stores.file_backend import Encoder, FileBackend, FileOptions, Piece
from edgedaq_aggregator.stores.file_reader import FileReader
from edgedaq_aggregator.stores.places import find_place
from edgedaq_aggregator.stores.put_away import put_files_away
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.tables import TableDecoder, dumped

__all__ = ["CsvFormat", "DAQJobStoreCSV", "make_reader"]

_NEEDS_QUOTES = '[",\r\n]|^$'


class CsvFormat:
    """Frames to lines of CSV."""

    key = "csv"

    def options(self, store_config: object) -> FileOptions:
        """See ``FileFormat``."""
        try:
            found = msgspec.convert(store_config, DAQJobStoreConfigCSV)
        except msgspec.ValidationError as e:
            message = f"store_config.csv: {e}"
            raise ConfigError(message) from e
        return FileOptions(
            found.file_path,
            found.add_date,
            found.overwrite,
            suffix=".zst" if found.use_zstd else "",
            make=functools.partial(DataFile, compress=_compress) if found.use_zstd else DataFile,
            rotate_bytes=found.rotate_size or 0,
            rotate_ns=found.rotate_ns,
        )

    def encoder(self, info: OpenInfo) -> Encoder:
        """See ``FileFormat``."""
        return _CsvEncoder(info)


class _CsvEncoder:
    def __init__(self, info: OpenInfo) -> None:
        self._decoder = TableDecoder(info)
        self._names: list[str] = []
        self._header = b""

    def encode(self, frames: Sequence[Frame]) -> list[Piece]:
        try:
            return self._pieces(frames)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as e:
            message = f"there is no CSV form of it: {e}"
            raise WireError(message) from e

    def _pieces(self, frames: Sequence[Frame]) -> list[Piece]:
        return [
            self._piece(batch.schema.names, [_text(column) for column in batch.columns])
            for batch in self._decoder.batches(frames)
        ]

    def _piece(self, names: list[str], columns: Sequence[Any]) -> Piece:
        if names != self._names:
            quoted = _quoted(pa.array(names, pa.string())).to_pylist()
            self._names, self._header = names, (",".join(quoted) + "\n").encode()
        return Piece(self._header, [_lines(columns)])


def _lines(columns: Sequence[Any]) -> memoryview:
    """Return the lines of text columns: the joined values lie back to back in one buffer."""
    missing = "" if len(columns) > 1 else '""'  # an empty line would be no row for many a reader
    filled = [pc.fill_null(column, missing) for column in columns]
    last = _joined(filled[-1], "\n")
    lines = _joined(*filled[:-1], last, between=",") if len(filled) > 1 else last
    _, offsets, data = lines.buffers()
    if data is None or not len(lines):
        return memoryview(b"")
    bounds = memoryview(offsets).cast("B").cast("i")
    return memoryview(data).cast("B")[bounds[lines.offset] : bounds[lines.offset + len(lines)]]


def _text(column: Any) -> Any:
    """Return a column as text ready to stand between commas, null where a value is missing."""
    kind = column.type
    types = pa.types
    if types.is_dictionary(kind):
        return _text(column.dictionary_decode())
    if types.is_string(kind) or types.is_large_string(kind):
        return _quoted(column.cast(pa.string()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _joined('"', pc.replace_substring(_json(column), '"', '""'), '"')
    if types.is_nested(kind):
        return _quoted(pa.array([dumped(value) for value in column.to_pylist()], pa.string()))
    return _plain(column)


def _plain(column: Any) -> Any:
    """Return a scalar column as text that needs no quotes."""
    kind = column.type
    types = pa.types
    if types.is_timestamp(kind):
        aware = column if kind.tz is None else column.cast(pa.timestamp(kind.unit, tz="UTC"))
        text = pc.replace_substring(aware.cast(pa.string()), " ", "T", max_replacements=1)
        text = pc.replace_substring_regex(text, r"Z?$", "Z")
        return pc.replace_substring_regex(text, r"(?:\.0+|(\.\d*[1-9])0+)Z$", r"\1Z")
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        values = column.to_pylist()
        return _quoted(pa.array([None if value is None else value.hex() for value in values], pa.string()))
    if types.is_null(kind):
        return pa.array([None] * len(column), pa.string())
    return column.cast(pa.string())


def _json(column: Any) -> Any:
    """Return lists as text, ``[1,2,3]``; elements that are missing are ``null``."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type))
    flat = column.values
    inner = flat.type
    texts: Any
    if pa.types.is_struct(inner) or pa.types.is_map(inner):
        texts = pa.array([dumped(value) for value in flat.to_pylist()], pa.string())
    elif pa.types.is_nested(inner):
        texts = _json(flat)
    elif pa.types.is_string(inner) or pa.types.is_large_string(inner):
        texts = pa.array(
            [None if value is None else json.dumps(value) for value in flat.to_pylist()], pa.string()
        )
    elif pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
        texts = pa.array([None if v is None else f'"{v.hex()}"' for v in flat.to_pylist()], pa.string())
    else:
        texts = _plain(flat)
    lists = type(column).from_arrays(column.offsets, pc.fill_null(texts, "null"))
    joined = _joined("[", pc.binary_join(lists, ","), "]")
    return (
        pc.if_else(column.is_valid(), joined, pa.scalar(None, pa.string())) if column.null_count else joined
    )


def _joined(*parts: Any, between: str = "") -> Any:
    return pc.binary_join_element_wise(*parts, between)


def _quoted(column: Any) -> Any:
    special = pc.match_substring_regex(column, _NEEDS_QUOTES)
    if not pc.any(special).as_py():
        return column
    escaped = _joined('"', pc.replace_substring(column, '"', '""'), '"')
    return pc.if_else(special, escaped, column)


def _compress(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


class DAQJobStoreCSV(DAQJobStore):
    """Stores streams whose ``store_config`` has ``csv``."""

    key = "csv"

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return FileBackend(CsvFormat(), state_dir, out_dir, OsStorage())

    @classmethod
    def put_away(cls, place: StorePlace) -> list[Path]:
        """See ``DAQJobStore``."""
        return put_files_away(place)


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a CSV store back."""
    return FileReader(place, "csv", parse_lines, functools.partial(find_place, CsvFormat(), has_lines=True))
