"""Files with an index inside (ROOT, HDF5), read again by their libraries.

Their bytes do not stay, so that no digest tells of them; values are compared with what the journal has, older
rows are counted. Which rows are whose nothing tells, so that all of a file are compared at once
(``joint.py``); rows that lie in several files, by date, size or columns, are counted only.

A commit writes in the middle of a file. One that cannot be read while its store runs, or before a killed one
has started again, is read a few times, then told of as what cannot be asked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from edgedaq.delivery import TOMBSTONES_MAX, StreamTable
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage

from edgedaq_aggregator.stores.alike import Group, Placed, info_of
from edgedaq_aggregator.stores.column_types import column_types, typed
from edgedaq_aggregator.stores.commits import CommitState, read_commits
from edgedaq_aggregator.stores.compared import accounts_of, compare
from edgedaq_aggregator.stores.file_backend import FileFormat
from edgedaq_aggregator.stores.file_reader import FileReader
from edgedaq_aggregator.stores.reader import Checked, Part, Problem, Retained, StorePlace
from edgedaq_aggregator.stores.row_columns import Field, fields_of
from edgedaq_aggregator.stores.streams import redirected_to

__all__ = ["ContainerReader", "ReadableFile"]

_ROWS_AT_ONCE = 50_000
_LOOKS = 5
_LOOK_AGAIN_S = 0.1
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
    EOFError,
)


class ReadableFile(Protocol):
    """A container, opened by its library; errors are the library's own."""

    row_count: int

    def columns(self, fields: tuple[Field, ...], begin: int, end: int) -> dict[str, Any]:
        """Return the columns that it has of rows: arrays of numpy, of text and lists Python's."""

    def close(self) -> None:
        """Let go of it."""


class _Family(NamedTuple):
    """The files that streams of one node write under one name, and these streams, oldest first."""

    paths: list[Path]
    streams: tuple[int, ...]
    is_in_order: bool


class ContainerReader:
    """See ``StoreReader``.

    Args:
        open_file: Opens a file, as a stream has asked for it.
    """

    def __init__(
        self,
        place: StorePlace,
        file_format: FileFormat,
        open_file: Callable[[Path, OpenInfo], ReadableFile],
    ) -> None:
        self._place = place
        self._format = file_format
        self._open = open_file
        self._marks = FileReader(place, file_format.key, _no_rows, lambda *_: None, has_only_marks=True)
        self._state = read_commits(place.state_dir, OsStorage())[0]
        self._accounts = accounts_of(self._state.table)
        self._infos = {s: info for s, account in self._accounts.items() if (info := info_of(account))}

    @property
    def position(self) -> int | None:
        """See ``StoreReader``."""
        return self._state.position

    @property
    def table(self) -> StreamTable:
        """See ``StoreReader``."""
        return self._state.table

    def check(self, retained: Retained) -> Checked:
        """See ``StoreReader``."""
        found = self._marks.check(retained)
        groups = [group for family in self._families() if (group := self._check_family(family, found))]
        compare(groups, self._state.table, self.marks(), retained, found)
        return found

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """See ``StoreReader``."""
        for family in self._families():
            left = sum(self._accounts[stream].rows for stream in family.streams)
            if not set(family.streams) & set(streams) or not left:
                continue
            for placed in self._read(family, 0):
                table = placed.table.slice(0, left)
                left -= table.num_rows
                if table.num_rows:
                    yield Part(family.streams, table)

    def marks(self) -> list[dict[str, str]]:
        """See ``StoreReader``."""
        return self._marks.marks()

    def _families(self) -> list[_Family]:
        held: dict[tuple[str, str], list[int]] = {}
        for stream, info in self._infos.items():
            refuge = redirected_to(stream, self._format.key)
            try:
                path = self._format.options(info.store_config.get(self._format.key)).file_path
            except ConfigError:
                path = refuge
            path = refuge if f"{info.node}/{refuge}" in self._state.files else path
            if self._accounts[stream].rows:
                held.setdefault((info.node, path), []).append(stream)
        return [self._family(node, path, streams) for (node, path), streams in held.items()]

    def _family(self, node: str, file_path: str, streams: list[int]) -> _Family:
        wanted = PurePosixPath(node, file_path)
        stem, dot, suffix = wanted.name.rpartition(".")
        stem, end = (stem, dot + suffix) if stem else (wanted.name, "")
        name = rf"(?:(\d{{4}}-\d\d-\d\d(?:T\d\d-\d\d)?)_)?{re.escape(stem)}(?:\.(\d+))?{re.escape(end)}"
        found: list[tuple[str, int, Path]] = []
        for held, mark in self._state.files.items():
            own = PurePosixPath(held)
            told = re.fullmatch(name, own.name)
            if told and own.parent == wanted.parent and mark.end:
                found.append((told[1] or "", int(told[2] or 1), self._place.out_dir / held))
        found.sort()
        in_order = sorted(streams, key=lambda stream: self._infos[stream].t_open_ns)
        return _Family([path for *_, path in found], tuple(in_order), len(found) == 1 and not found[0][0])

    def _check_family(self, family: _Family, found: Checked) -> Group | None:
        """Count the rows of a family; return them, if they can be compared."""
        there = [path for path in family.paths if path.is_file()]
        for path in set(family.paths) - set(there):
            found.notes.append(f"{path}: is not there, moved away or deleted")
        found.read_bytes += sum(path.stat().st_size for path in there)
        stored = sum(self._accounts[stream].rows for stream in family.streams)
        for stream in family.streams:
            found.rows[stream] = self._accounts[stream].rows
        try:
            count = self._count(family, there)
        except StoreError as e:
            if self._newest().clean:
                where, _, what = str(e).partition(": ")
                found.problems.append(Problem(where, "file", what))
            else:
                found.unasked.append(f"{e}; it may be in the middle of a commit, let its store start")
            return None
        newest = family.streams[-1]
        if count < stored and len(there) < len(family.paths):
            found.rows[newest] += count - stored
            found.away[newest] = stored - count
        elif count > stored and len(self._state.table.tombstones) >= TOMBSTONES_MAX:
            found.notes.append(f"{there[0]}: {count - stored} rows are of streams that are forgotten")
        else:
            found.rows[newest] += count - stored
            if family.is_in_order:
                where = str(family.paths[0])
                return Group(
                    family.streams, where, count, lambda skip: self._read(family, skip), is_filled=True
                )
        found.counted += count
        return None

    def _count(self, family: _Family, paths: list[Path]) -> int:
        """Return how many rows there are that this view has accounts of.

        Raises:
            StoreError: A file cannot be read.
        """
        for look in range(_LOOKS):
            before = self._newest()
            try:
                count = sum(self._rows_in(path, family) for path in paths)
            except StoreError:
                if before.clean or look == _LOOKS - 1:
                    raise
                time.sleep(_LOOK_AGAIN_S)
                continue
            now = self._newest()
            if now.position == before.position:
                break
        accounts = accounts_of(now.table)
        stored = sum(self._accounts[stream].rows for stream in family.streams)
        stored_now = sum(accounts[stream].rows for stream in family.streams if stream in accounts)
        return (count if now.clean else min(count, stored_now)) - (stored_now - stored)

    def _newest(self) -> CommitState:
        return read_commits(self._place.state_dir, OsStorage())[0]

    def _rows_in(self, path: Path, family: _Family) -> int:
        file = self._opened(path, family)
        try:
            return file.row_count
        finally:
            file.close()

    def _opened(self, path: Path, family: _Family) -> ReadableFile:
        try:
            return self._open(path, self._infos[family.streams[0]])
        except (*_UNREADABLE, ConfigError) as e:
            message = f"{path}: cannot be read: {e}"
            raise StoreError(message) from e

    def _read(self, family: _Family, skip: int) -> Iterator[Placed]:
        types = self._types(family)
        fields = fields_of(types)
        kinds = list(types.values())
        for path in family.paths:
            if not path.is_file():
                continue
            file = self._opened(path, family)
            try:
                begin, skip = min(skip, file.row_count), max(skip - file.row_count, 0)
                for first in range(begin, file.row_count, _ROWS_AT_ONCE):
                    last = min(first + _ROWS_AT_ONCE, file.row_count)
                    try:
                        columns = file.columns(fields, first, last)
                    except _UNREADABLE as e:
                        message = f"{path}: rows {first} to {last} cannot be read: {e}"
                        raise StoreError(message) from e
                    names = [name for name, field in zip(types, fields, strict=True) if field.name in columns]
                    arrays = [
                        _arrow(columns[field.name], kind)
                        for field, kind in zip(fields, kinds, strict=True)
                        if field.name in columns
                    ]
                    yield Placed(str(path), range(first, last), pa.Table.from_arrays(arrays, names=names))
            finally:
                file.close()

    def _types(self, family: _Family) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for stream in family.streams:
            try:
                for name, kind in column_types(self._infos[stream]).items():
                    found.setdefault(name, kind)
            except WireError:
                continue
        return found


def _arrow(values: Any, kind: Any) -> Any:
    """Return a column with the type that it was put with, as far as the container has kept it."""
    if not isinstance(values, np.ndarray):
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            values = [bytes(value) for value in values]
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return _listed(values, kind)
        return typed([None if value == "" and not _is_text(kind) else value for value in values], kind)
    if pa.types.is_fixed_size_list(kind):
        inner: Any = _arrow(values.reshape(-1, *values.shape[2:]), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(inner, kind.list_size).cast(kind)
    values = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("="))
    if pa.types.is_boolean(kind):
        return pa.array(values != 0, mask=values == 255)
    if pa.types.is_timestamp(kind):
        times = pa.array(values, mask=values == np.iinfo("i8").min)
        return times.cast(pa.timestamp("ns", tz=kind.tz)).cast(kind, safe=False)
    try:
        return pa.array(values).cast(kind)
    except pa.ArrowException:
        return pa.array(values)


def _listed(values: Any, kind: Any) -> Any:
    """Return lists; what was JSON comes back from it."""
    if any(isinstance(value, str) for value in values):
        return typed([value or None for value in values], kind)
    times = pa.types.is_timestamp(kind.value_type)
    inner = pa.list_(pa.int64()) if times else kind
    if pa.types.is_boolean(kind.value_type):
        values = [[element != 0 for element in value] for value in values]
    found = pa.array(values, inner)
    return found.cast(pa.list_(pa.timestamp("ns", tz=kind.value_type.tz))).cast(kind) if times else found


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _no_rows(info: OpenInfo, block: Any, data: bytes) -> Any:  # noqa: ARG001 -- has none
    return pa.table({})
