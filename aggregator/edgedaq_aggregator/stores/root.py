"""The ROOT store: rows as a TTree, large baskets even where rows come slowly.

=============== =========================================================================================
columns         a branch each; characters that are none of a name in C++ are ``_``
fixed arrays    ``x[3]/D``; lists and bytes ``x[nx]/D``, with a branch ``nx`` of lengths
text            ``/C``
=============== =========================================================================================

What becomes what is in ``row_columns.py``.

Each commit extends the tree by what has come. Small extensions make small baskets, which cost more than
what is in them. So the rows of the *tail*, those since the last large extension, are kept in memory, and when
there are enough of them (or ``TAIL_PARTS_MAX`` small extensions) the file is rewound to before the tail, and
the tail is written as one. Its rows are committed all the while::

    | large | large | 7 | 3 | 9 |   +   5    ─►   | large | large | 24 |      a tail of one, it goes on
    | large | large | 999 |         +   7    ─►   | large | large | large |   and is forgotten
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import awkward as ak
import fsspec
import msgspec
import numpy as np
import uproot
from edgedaq.errors import ConfigError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage
from edgedaq.store_config import DAQJobStoreConfigROOT

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.container_file import ContainerFile
from edgedaq_aggregator.stores.container_reader import ContainerReader
from edgedaq_aggregator.stores.file_backend import Encoder, FileBackend, FileOptions, Piece
from edgedaq_aggregator.stores.held_file import HeldFile
from edgedaq_aggregator.stores.put_away import put_files_away
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.row_columns import Field, Ragged, RowDecoder, Rows, header_of

__all__ = ["DAQJobStoreROOT", "RootFormat"]

EXTEND_ROWS_MAX = 100_000
EXTEND_BYTES_MAX = 8 << 20
TAIL_PARTS_MAX = 32
BRANCH_BYTES = 32 << 10
"""A tail is large enough when each branch has as much, on average; ROOT's own baskets have as much."""

TAIL_BYTES_MAX = 8 << 20
_OPEN: weakref.WeakValueDictionary[str, HeldFile] = weakref.WeakValueDictionary()
_NO_NAME = re.compile(r"\W")


class RootFormat:
    """Frames to rows of a tree.

    Args:
        tail_parts: How many small extensions are joined at the latest.
    """

    key = "root"

    def __init__(self, tail_parts: int = TAIL_PARTS_MAX) -> None:
        self._tail_parts = tail_parts

    def options(self, store_config: object) -> FileOptions:
        """See ``FileFormat``."""
        found = _convert(store_config)
        container = _RootContainer(_name(found.tree_name), _compression(found), self._tail_parts)
        make = functools.partial(ContainerFile, container=container)
        return FileOptions(
            found.file_path,
            found.add_date,
            make=make,
            rotate_bytes=found.rotate_size or 0,
            rotate_ns=found.rotate_ns,
        )

    def encoder(self, info: OpenInfo) -> Encoder:
        """See ``FileFormat``."""
        try:
            return _RootEncoder(info, _name(_convert(info.store_config.get(self.key)).tree_name))
        except ConfigError:
            return _RootEncoder(info, DAQJobStoreConfigROOT(self.key).tree_name)


def _convert(store_config: object) -> DAQJobStoreConfigROOT:
    try:
        return msgspec.convert(store_config, DAQJobStoreConfigROOT)
    except msgspec.ValidationError as e:
        message = f"store_config.root: {e}"
        raise ConfigError(message) from e


def _compression(options: DAQJobStoreConfigROOT) -> Any:
    level = options.compression_level
    return getattr(uproot, options.compression_type)(level) if level else None


class _RootEncoder:
    def __init__(self, info: OpenInfo, tree_name: str) -> None:
        self._decoder = RowDecoder(info)
        self._tree_name = tree_name

    def encode(self, frames: Sequence[Frame]) -> list[Piece]:
        return [Piece(header_of(rows.fields, self._tree_name), [rows]) for rows in self._decoder.rows(frames)]


class _RootContainer:
    def __init__(self, tree_name: str, compression: Any, tail_parts: int) -> None:
        self._tree_name = tree_name
        self._compression = compression
        self._tail_parts = tail_parts

    def writer(self, held: HeldFile, example: Rows) -> _RootWriter:
        """See ``Container``."""
        return _RootWriter(held, self._tree_name, self._compression, self._tail_parts, example.fields)


class _RootWriter:
    def __init__(
        self,
        held: HeldFile,
        tree_name: str,
        compression: Any,
        tail_parts: int,
        fields: tuple[Field, ...],
    ) -> None:
        self._held = held
        self._tree_name = tree_name
        self._compression = compression
        self._tail_parts = tail_parts
        self._fields = fields
        self._branches = branch_names(fields)
        self._enough = min(max(BRANCH_BYTES * len(fields), 256 << 10), TAIL_BYTES_MAX)
        self._tail: list[Rows] = []
        self._fresh: list[Rows] = []
        self._open()

    def append(self, rows: Rows) -> None:
        """See ``ContainerWriter``."""
        if rows.count:
            self._fresh.append(rows)

    def flush(self) -> None:
        """See ``ContainerWriter``."""
        fresh, self._fresh = self._fresh, []
        rows = [*self._tail, *fresh]
        is_enough = sum(part.size_bytes for part in rows) >= self._enough
        if self._tail and (is_enough or len(self._tail) >= self._tail_parts):
            self._held.rewind()
            self._open()
            self._tail, fresh = [], rows
        if not fresh:
            return
        for part in _portions(fresh):
            self._extend(part)
        if is_enough:
            self._tail = []
            self._held.settle()
        else:
            self._tail.append(Rows.joined(fresh))

    def close(self) -> None:
        """See ``ContainerWriter``; nothing is left to be written."""

    def _open(self) -> None:
        if self._held.size == 0:
            self._file = uproot.recreate(self._held, compression=self._compression)
            types = {
                name: _branch_type(field) for name, field in zip(self._branches, self._fields, strict=True)
            }
            self._tree = self._file.mktree(self._tree_name, types)
            return
        fsspec.register_implementation(_HeldFileSystem.protocol, _HeldFileSystem, clobber=True)
        _OPEN[str(id(self._held))] = self._held
        self._file = uproot.update(f"{_HeldFileSystem.protocol}://{id(self._held)}")
        self._tree = self._file[self._tree_name]
        self._tree.compression = self._compression  # it is not read from the file

    def _extend(self, rows: Rows) -> None:
        columns = zip(self._branches, rows.fields, rows.columns, strict=True)
        self._tree.extend({name: _values(field, column) for name, field, column in columns})


class _HeldFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Held files by their number: uproot continues trees only in what it has opened by name."""

    protocol = "edgedaq-held"
    cachable = False

    def exists(self, path: str, **_: Any) -> bool:
        """See ``fsspec``."""
        return path in _OPEN

    def open(self, path: str, mode: str = "rb", **_: Any) -> HeldFile:  # noqa: ARG002 -- both
        """See ``fsspec``."""
        return _OPEN[path]


def _portions(parts: Sequence[Rows]) -> Iterator[Rows]:
    """Yield the same rows in portions of the size that is extended best."""
    held: list[Rows] = []
    count = size_bytes = 0
    for part in [piece for whole in parts for piece in whole.slices(_most_rows(whole))]:
        if held and (count + part.count > EXTEND_ROWS_MAX or size_bytes + part.size_bytes > EXTEND_BYTES_MAX):
            yield Rows.joined(held)
            held, count, size_bytes = [], 0, 0
        held.append(part)
        count, size_bytes = count + part.count, size_bytes + part.size_bytes
    yield Rows.joined(held)


def _most_rows(rows: Rows) -> int:
    return min(max(EXTEND_BYTES_MAX * rows.count // max(rows.size_bytes, 1), 1), EXTEND_ROWS_MAX)


def branch_names(fields: tuple[Field, ...]) -> list[str]:
    """Return a name in C++ for each column; a list ``x`` has ``nx`` too."""
    taken: set[str] = set()
    names = []
    for field in fields:
        plain = name = _name(field.name)
        number = 1
        while {name, f"n{name}"} & taken:
            number += 1
            name = f"{plain}_{number}"
        taken |= {name, f"n{name}"} if has_counter(field) else {name}
        names.append(name)
    return names


def _name(text: str) -> str:
    name = _NO_NAME.sub("_", text)
    return f"_{name}" if not name or name[0].isdigit() else name


def has_counter(field: Field) -> bool:
    """Tell whether a branch has another one, of its lengths."""
    return field.is_ragged or field.dtype == "bytes"


def _branch_type(field: Field) -> Any:
    if field.dtype == "utf8":
        return "string"
    if has_counter(field):
        return ak.types.from_datashape(f"var * {field.element.name}", highlevel=False)
    return np.dtype((field.element, field.shape)) if field.shape else field.element


def _values(field: Field, column: Any) -> Any:
    if not isinstance(column, Ragged):
        return column
    offsets = ak.index.Index64(np.concatenate([[0], column.ends]).astype("<i8"))
    if field.dtype == "utf8":
        chars = ak.contents.NumpyArray(column.flat, parameters={"__array__": "char"})
        return ak.Array(ak.contents.ListOffsetArray(offsets, chars, parameters={"__array__": "string"}))
    return ak.Array(ak.contents.ListOffsetArray(offsets, ak.contents.NumpyArray(column.flat)))


class DAQJobStoreROOT(DAQJobStore):
    """Stores streams whose ``store_config`` has ``root``."""

    key = "root"

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return FileBackend(RootFormat(), state_dir, out_dir, OsStorage())

    @classmethod
    def put_away(cls, place: StorePlace) -> list[Path]:
        """See ``DAQJobStore``."""
        return put_files_away(place)


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads a ROOT store back."""
    return ContainerReader(place, RootFormat(), _RootFile)


class _RootFile:
    """See ``ReadableFile``."""

    def __init__(self, path: Path, info: OpenInfo) -> None:
        self._file = path.open("rb")  # given a name, uproot would leave threads behind
        try:
            self._tree = uproot.open(self._file)[_name(_convert(info.store_config.get("root")).tree_name)]
            self.row_count = int(self._tree.num_entries)
        except BaseException:
            self._file.close()
            raise

    def columns(self, fields: tuple[Field, ...], begin: int, end: int) -> dict[str, Any]:
        """See ``ReadableFile``."""
        found: dict[str, Any] = {}
        for name, field in zip(branch_names(fields), fields, strict=True):
            if name in self._tree:
                values = self._tree[name].array(entry_start=begin, entry_stop=end)
                is_apart = has_counter(field) or field.dtype == "utf8"
                found[field.name] = ak.to_list(values) if is_apart else ak.to_numpy(values)
        return found

    def close(self) -> None:
        """See ``ReadableFile``."""
        self._file.close()
