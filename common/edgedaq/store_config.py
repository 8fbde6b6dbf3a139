"""Where a job's data is stored: the options that a job's own TOML gives for each backend.

They live here so that an agent can check them without the libraries of the stores::

    [store_config.csv]
    file_path = "sensor_data.csv"
    add_date = true

A job may name several backends at once; each gets all of the data. Files land under ``out_dir/<node>/``.

Rotation leaves a file and goes on in the next one, by either or both of::

    rotate_size = "1 GB"     name.csv, name.2.csv, ...     a file is left once it is as large
    rotate_every = "1 h"     2026-05-01T13-00_name.csv     by the UTC time of the data
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from edgedaq.errors import ConfigError
from edgedaq.names import store_topic
from edgedaq.typed_toml import build
from edgedaq.units import Bytes, Seconds

__all__ = [
    "MARKS_FILE",
    "STORE_TYPES",
    "DAQJobStoreConfig",
    "DAQJobStoreConfigCSV",
    "DAQJobStoreConfigHDF5",
    "DAQJobStoreConfigMySQL",
    "DAQJobStoreConfigParquet",
    "DAQJobStoreConfigROOT",
    "DAQJobStoreConfigRaw",
    "DAQJobStoreConfigRedis",
    "DAQJobStoreConfigSQLite",
    "check_file_path",
    "check_table_name",
]

MARKS_FILE = "_marks.csv"
"""Beside the data files of a node; no data may be stored under this name."""

STORE_TYPES = {
    "csv": "DAQJobStoreCSV",
    "raw": "DAQJobStoreRaw",
    "root": "DAQJobStoreROOT",
    "hdf5": "DAQJobStoreHDF5",
    "mysql": "DAQJobStoreMySQL",
    "redis": "DAQJobStoreRedis",
    "parquet": "DAQJobStoreParquet",
    "sqlite": "DAQJobStoreSQLite",
}
"""Key in ``store_config`` → type of the job that stores it."""

_PATH_BYTES_MAX = 512
_SEGMENT_BYTES_MAX = 200  # leaves room for a date and a number beside the 255 of a file system
_CONTROL_END = 32
_TABLE_NAME_MAX = 64  # of MySQL; SQLite has no limit
_ROTATE_BYTES_MIN = 64 << 10
_ROOT_LEVELS = {"LZ4": 12, "ZSTD": 22, "ZLIB": 9, "LZMA": 9}


def check_file_path(file_path: str) -> str:
    """Return ``file_path`` if it stays below the directory that it is joined to.

    Raises:
        ConfigError: It is empty, absolute, has ``..`` or ``.`` or an empty part, is too long, or is reserved.
    """
    parts = file_path.split("/")
    if file_path.startswith("/") or ".." in parts:
        message = f"file_path must be relative and without '..', got {file_path!r}"
    elif not file_path or "" in parts or "." in parts:
        message = f"file_path must name a file, e.g. 'data.csv' or 'sub/data.csv', got {file_path!r}"
    elif any(ord(char) < _CONTROL_END or char in "\\\x7f" for char in file_path):
        message = f"file_path must not have control characters or backslashes, got {file_path!r}"
    elif len(_encoded(file_path)) > _PATH_BYTES_MAX or any(
        len(_encoded(part)) > _SEGMENT_BYTES_MAX for part in parts
    ):
        message = f"file_path must be at most {_PATH_BYTES_MAX} bytes, {_SEGMENT_BYTES_MAX} in each part"
    elif parts[0].startswith(".") or parts[-1] == MARKS_FILE:
        message = f"file_path must not be {MARKS_FILE!r} or begin with '.', got {file_path!r}"
    else:
        return file_path
    raise ConfigError(message)


def check_table_name(table_name: str) -> str:
    """Return ``table_name`` if a table of an SQL database may have it; any other character is quoted.

    Raises:
        ConfigError: It is empty, too long, has control characters, or is reserved.
    """
    if not table_name.strip() or len(table_name) > _TABLE_NAME_MAX:
        message = f"table_name must have 1 to {_TABLE_NAME_MAX} characters, got {table_name!r}"
    elif any(ord(char) < _CONTROL_END or char == "\x7f" for char in table_name) or table_name[-1] == " ":
        message = f"table_name must not have control characters or end with a space, got {table_name!r}"
    elif not _is_text(table_name):
        message = f"table_name must be valid Unicode, got {table_name!r}"
    elif table_name.casefold().startswith(("edgedaq_", "sqlite_")):
        message = f"table_name must not begin with 'edgedaq_' or 'sqlite_', got {table_name!r}"
    else:
        return table_name
    raise ConfigError(message)


def _is_text(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class _FileOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of every backend that writes files.

    ``add_date`` prefixes the file's name with the UTC date of the data.
    """

    file_path: str
    add_date: bool = False

    def __post_init__(self) -> None:
        check_file_path(self.file_path)


class _RotatedOptions(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """Options of backends that can end a file and go on in the next one; see the drawing above."""

    rotate_size: Annotated[Bytes, msgspec.Meta(ge=_ROTATE_BYTES_MIN)] | None = None
    rotate_every: Annotated[Seconds, msgspec.Meta(ge=60)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotate_every is not None and self.rotate_every % 60:
            message = f"rotate_every must be whole minutes, got {self.rotate_every} s"
            raise ConfigError(message)
        if getattr(self, "overwrite", False) and (self.rotate_size or self.rotate_every):
            message = "overwrite keeps one file, rotate_* makes many: only one of them can be given"
            raise ConfigError(message)

    @property
    def rotate_ns(self) -> int:
        """``rotate_every`` in nanoseconds, 0 for never."""
        return round((self.rotate_every or 0) * 1e9)


class DAQJobStoreConfigCSV(_RotatedOptions, frozen=True, forbid_unknown_fields=True):
    """``overwrite``: the file holds the newest stream's rows only; ``use_zstd``: one frame per commit."""

    overwrite: bool = False
    use_zstd: bool = False


class DAQJobStoreConfigRaw(_RotatedOptions, frozen=True, forbid_unknown_fields=True):
    """``length_prefix``: each message follows its length (little-endian u32); else they lie back to back."""

    overwrite: bool = False
    length_prefix: bool = False


class DAQJobStoreConfigROOT(_RotatedOptions, frozen=True, forbid_unknown_fields=True):
    """``compression_type``: ROOT's own default, ZLIB, is 10 to 36 times slower than LZ4 or ZSTD."""

    tree_name: str = "tree"
    compression_type: Literal["LZ4", "ZSTD", "ZLIB", "LZMA"] = "LZ4"
    compression_level: Annotated[int, msgspec.Meta(ge=0)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        most = _ROOT_LEVELS[self.compression_type]
        if self.compression_level > most:
            kind, level = self.compression_type, self.compression_level
            message = f"compression_level of {kind} must be 0 to {most}, got {level}"
            raise ConfigError(message)


class DAQJobStoreConfigHDF5(_RotatedOptions, frozen=True, forbid_unknown_fields=True):
    """``dataset_name``: where in the file the rows are; may have groups, ``"run/events"``."""

    dataset_name: str = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if {"", ".", ".."} & {*self.dataset_name.strip("/").split("/")} or "\0" in self.dataset_name:
            message = f"dataset_name must be like 'data' or 'group/data', got {self.dataset_name!r}"
            raise ConfigError(message)


class DAQJobStoreConfigParquet(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``file_path`` is a directory of parts, each complete; ``compression`` of their columns."""

    compression: Literal["zstd", "snappy", "lz4", "none"] = "zstd"


class DAQJobStoreConfigSQLite(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``file_path`` is a database, ``table_name`` in it: made from the schema if it does not exist."""

    table_name: str = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table_name(self.table_name)


class DAQJobStoreConfigMySQL(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``table_name``: made from the schema if it does not exist."""

    table_name: str


class DAQJobStoreConfigRedis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``key``: of the Redis stream, behind the node's name.

    ``use_timeseries`` asks for time series, where the server has them; ``packed`` makes an entry of many
    rows, as an Arrow stream, instead of one per row.
    """

    key: str
    key_expiration_days: Annotated[int, msgspec.Meta(gt=0)] | None = None
    use_timeseries: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        if self.packed and self.use_timeseries:
            message = "packed makes entries of a stream, use_timeseries makes none: only one can be given"
            raise ConfigError(message)


class DAQJobStoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The backends that data goes to; at least one."""

    csv: DAQJobStoreConfigCSV | None = None
    raw: DAQJobStoreConfigRaw | None = None
    root: DAQJobStoreConfigROOT | None = None
    hdf5: DAQJobStoreConfigHDF5 | None = None
    mysql: DAQJobStoreConfigMySQL | None = None
    redis: DAQJobStoreConfigRedis | None = None
    parquet: DAQJobStoreConfigParquet | None = None
    sqlite: DAQJobStoreConfigSQLite | None = None

    def __post_init__(self) -> None:
        if not self.keys():
            message = f"at least one store must be named, of {', '.join(STORE_TYPES)}"
            raise ConfigError(message)

    def keys(self) -> tuple[str, ...]:
        """Return the keys that are given, e.g. ``("csv", "raw")``."""
        return tuple(key for key in STORE_TYPES if getattr(self, key) is not None)

    def topics(self) -> tuple[str, ...]:
        """Return the topics that route to the stores named here, e.g. ``("store.DAQJobStoreCSV",)``."""
        return tuple(store_topic(STORE_TYPES[key]) for key in self.keys())

    def to_map(self) -> dict[str, Any]:
        """Return plain maps for OPEN, defaults included, backends that are not named left out."""
        return {key: msgspec.to_builtins(getattr(self, key)) for key in self.keys()}

    @classmethod
    def from_map(cls, raw: dict[str, Any], where: str = "store_config") -> DAQJobStoreConfig:
        """Return what ``to_map`` described.

        Raises:
            ConfigError: It is not that; the message begins with ``where``.
        """
        return build(cls, raw, where)
