"""The HDF5 store: rows as one compound dataset, to be read while it grows.

::

    /<dataset_name>           one compound row per row. Numbers and fixed arrays are fields as they are; of
                              text, bytes and lists, the field says where in their elements the row ends
    /<dataset_name>.<column>  the elements of all rows of such a column, back to back; "/" in its name is "_"

Row ``i`` has the elements from the end of row ``i - 1`` (0 for the first) to its own. What becomes what is in
``row_columns.py``. Chunks have ``CHUNK_BYTES``, whatever the first rows were. Datasets bear ``units`` and
``kinds``: JSON maps of columns that have a unit, or are a ``bool``, a ``timestamp``, text.

Each commit is as SWMR writers leave a file: readers may have it open meanwhile (``swmr=True``). It is never
marked as being written (``hdf5_superblock.py``), so that it can be opened, copied and moved at any time.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from edgedaq.errors import ConfigError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage
from edgedaq.store_config import DAQJobStoreConfigHDF5

from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.container_file import ContainerFile
from edgedaq_aggregator.stores.container_reader import ContainerReader
from edgedaq_aggregator.stores.file_backend import Encoder, FileBackend, FileOptions, Piece
from edgedaq_aggregator.stores.hdf5_superblock import SUPERBLOCK_BYTES, unmarked
from edgedaq_aggregator.stores.held_file import HeldFile
from edgedaq_aggregator.stores.put_away import put_files_away
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader
from edgedaq_aggregator.stores.row_columns import Field, Ragged, RowDecoder, Rows, header_of

__all__ = ["DAQJobStoreHDF5", "Hdf5Format"]

CHUNK_BYTES = 256 << 10
_FORMAT = ("v110", "v110")


class Hdf5Format:
    """Frames to rows of a dataset."""

    key = "hdf5"

    def options(self, store_config: object) -> FileOptions:
        """See ``FileFormat``."""
        found = _convert(store_config)
        make = functools.partial(ContainerFile, container=_Hdf5Container(found.dataset_name))
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
            return _Hdf5Encoder(info, _convert(info.store_config.get(self.key)).dataset_name)
        except ConfigError:
            return _Hdf5Encoder(info, DAQJobStoreConfigHDF5(self.key).dataset_name)


def _convert(store_config: object) -> DAQJobStoreConfigHDF5:
    try:
        return msgspec.convert(store_config, DAQJobStoreConfigHDF5)
    except msgspec.ValidationError as e:
        message = f"store_config.hdf5: {e}"
        raise ConfigError(message) from e


class _Hdf5Encoder:
    def __init__(self, info: OpenInfo, dataset_name: str) -> None:
        self._decoder = RowDecoder(info)
        self._dataset_name = dataset_name

    def encode(self, frames: Sequence[Frame]) -> list[Piece]:
        return [
            Piece(header_of(rows.fields, self._dataset_name), [rows]) for rows in self._decoder.rows(frames)
        ]


class _Hdf5Container:
    def __init__(self, dataset_name: str) -> None:
        self._dataset_name = dataset_name

    def writer(self, held: HeldFile, example: Rows) -> _Hdf5Writer:
        """See ``Container``."""
        is_new = held.size == 0
        file = h5py.File(held, "w" if is_new else "r+", libver=_FORMAT)
        try:
            if is_new:
                _create(file, self._dataset_name, example.fields)
            return _Hdf5Writer(file, held, self._dataset_name, example.fields)
        except BaseException:
            file.close()
            raise


class _Hdf5Writer:
    def __init__(self, file: Any, held: HeldFile, dataset_name: str, fields: tuple[Field, ...]) -> None:
        self._file = file
        self._held = held
        self._rows = file[dataset_name]
        self._dtype = _row_dtype(fields)
        if self._rows.dtype != self._dtype:
            message = f"{dataset_name!r} has the columns {self._rows.dtype}, not {self._dtype}"
            raise ValueError(message)
        self._flat = {column: file[name] for column, name in _flat_names(dataset_name, fields).items()}
        file.swmr_mode = True

    def append(self, rows: Rows) -> None:
        """See ``ContainerWriter``."""
        if not rows.count:
            return
        packed = rows.packed
        if packed is None:
            packed = np.empty(rows.count, self._dtype)
            for field, column in zip(rows.fields, rows.columns, strict=True):
                if isinstance(column, Ragged):
                    flat = self._flat[field.name]
                    packed[field.name] = column.ends.astype("<u8") + np.uint64(len(flat))
                    _extend(flat, column.flat)
                else:
                    packed[field.name] = column
        _extend(self._rows, packed)

    def flush(self) -> None:
        """See ``ContainerWriter``."""
        self._file.flush()
        self._held.seek(0)
        superblock = unmarked(self._held.read(SUPERBLOCK_BYTES))
        self._held.seek(0)
        self._held.write(superblock)

    def close(self) -> None:
        """See ``ContainerWriter``."""
        self._file.close()


def _create(file: Any, dataset_name: str, fields: tuple[Field, ...]) -> None:
    dtype = _row_dtype(fields)
    rows = file.create_dataset(dataset_name, (0,), dtype, maxshape=(None,), chunks=_chunk(dtype))
    rows.attrs["units"] = json.dumps({f.name: f.unit for f in fields if f.unit}, ensure_ascii=False)
    rows.attrs["kinds"] = json.dumps(
        {f.name: f.what or f.dtype for f in fields if f.what or _is_apart(f)}, ensure_ascii=False
    )
    elements = {field.name: field.element for field in fields}
    for column, name in _flat_names(dataset_name, fields).items():
        element = elements[column]
        file.create_dataset(name, (0,), element, maxshape=(None,), chunks=_chunk(element))


def _extend(dataset: Any, values: Any) -> None:
    if len(values):
        begin = len(dataset)
        dataset.resize((begin + len(values),))
        dataset[begin:] = values


def _row_dtype(fields: tuple[Field, ...]) -> np.dtype[Any]:
    return np.dtype([(f.name, "<u8" if _is_apart(f) else f.element, f.shape) for f in fields])


def _is_apart(field: Field) -> bool:
    return field.is_ragged or field.dtype in ("utf8", "bytes")


def _flat_names(dataset_name: str, fields: tuple[Field, ...]) -> dict[str, str]:
    """Return the dataset that has the elements of each column that is apart."""
    found: dict[str, str] = {}
    for field in fields:
        if _is_apart(field):
            plain = name = f"{dataset_name}.{field.name.replace('/', '_')}"
            number = 1
            while name in found.values():
                number += 1
                name = f"{plain}_{number}"
            found[field.name] = name
    return found


def _chunk(dtype: np.dtype[Any]) -> tuple[int]:
    return (max(CHUNK_BYTES // dtype.itemsize, 1),)


class DAQJobStoreHDF5(DAQJobStore):
    """Stores streams whose ``store_config`` has ``hdf5``."""

    key = "hdf5"

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """See ``DAQJobStore``."""
        return FileBackend(Hdf5Format(), state_dir, out_dir, OsStorage())

    @classmethod
    def put_away(cls, place: StorePlace) -> list[Path]:
        """See ``DAQJobStore``."""
        return put_files_away(place)


def make_reader(place: StorePlace) -> StoreReader:
    """Return what reads an HDF5 store back."""
    return ContainerReader(place, Hdf5Format(), _Hdf5File)


class _Hdf5File:
    """See ``ReadableFile``."""

    def __init__(self, path: Path, info: OpenInfo) -> None:
        self._name = _convert(info.store_config.get("hdf5")).dataset_name
        self._file = h5py.File(path, "r", locking=False)
        try:
            self._rows = self._file[self._name]
            self.row_count = len(self._rows)
            self._fields = _held_fields(self._rows)
        except BaseException:
            self._file.close()
            raise

    def columns(self, fields: tuple[Field, ...], begin: int, end: int) -> dict[str, Any]:
        """See ``ReadableFile``."""
        rows = self._rows[max(begin - 1, 0) : end]
        before, rows = (rows[0], rows[1:]) if begin else (None, rows)
        apart = _flat_names(self._name, tuple(self._fields.values()))
        found: dict[str, Any] = {}
        for name in (field.name for field in fields if field.name in self._fields):
            field = self._fields[name]
            found[name] = rows[name]
            if field.name in apart:
                start = 0 if before is None else int(before[field.name])
                ends = [int(end) for end in rows[field.name]]
                flat = self._file[apart[field.name]][start : ends[-1] if ends else start]
                parts = [flat[a - start : b - start] for a, b in itertools.pairwise([start, *ends])]
                found[field.name] = [_whole(field, part) for part in parts]
        return found

    def close(self) -> None:
        """See ``ReadableFile``."""
        self._file.close()


def _held_fields(rows: Any) -> dict[str, Field]:
    """Return the columns that a dataset has; those that are apart may be text where numbers were before."""
    kinds = json.loads(rows.attrs["kinds"]) if "kinds" in rows.attrs else {}
    found = {}
    for name in rows.dtype.names or ():
        element = rows.dtype[name]
        if name in kinds and element == np.dtype("<u8"):
            found[name] = Field(name, kinds[name], is_ragged=kinds[name] not in ("utf8", "bytes"))
        else:
            found[name] = Field(name, f"{element.base.kind}{element.base.itemsize}", element.shape)
    return found


def _whole(field: Field, part: Any) -> Any:
    """Return the value of a row whose elements were apart."""
    if field.dtype == "utf8":
        return part.tobytes().decode("utf-8", "replace")
    return part.tobytes() if field.dtype == "bytes" else part.tolist()
