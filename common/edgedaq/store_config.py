"""Where a job's data is stored: the options that a job's own TOML gives for each backend.

They live here so that an agent can check them without the libraries of the stores::

    [store_config.csv]
    file_path = "sensor_data.csv"
    add_date = true

A job may name several backends at once; each gets all of the data. Files land under ``out_dir/<node>/``.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from edgedaq.errors import ConfigError
from edgedaq.names import store_topic
from edgedaq.typed_toml import build

__all__ = [
    "MARKS_FILE",
    "STORE_TYPES",
    "DAQJobStoreConfig",
    "DAQJobStoreConfigCSV",
    "DAQJobStoreConfigHDF5",
    "DAQJobStoreConfigMySQL",
    "DAQJobStoreConfigROOT",
    "DAQJobStoreConfigRaw",
    "DAQJobStoreConfigRedis",
    "check_file_path",
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
}
"""Key in ``store_config`` → type of the job that stores it."""

_PATH_BYTES_MAX = 512
_SEGMENT_BYTES_MAX = 200  # leaves room for a date and a number beside the 255 of a file system
_CONTROL_END = 32


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


class DAQJobStoreConfigCSV(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``overwrite``: the file holds the newest stream's rows only; ``use_zstd``: one frame per commit."""

    overwrite: bool = False
    use_zstd: bool = False


class DAQJobStoreConfigRaw(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``length_prefix``: each message follows its length (little-endian u32); else they lie back to back."""

    overwrite: bool = False
    length_prefix: bool = False


class DAQJobStoreConfigROOT(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``compression_type`` LZ4 or ZSTD; ROOT's own default, ZLIB, is 10 to 36 times slower."""

    tree_name: str = "tree"
    compression_type: str = "LZ4"
    compression_level: Annotated[int, msgspec.Meta(ge=0, le=22)] = 1


class DAQJobStoreConfigHDF5(_FileOptions, frozen=True, forbid_unknown_fields=True):
    """``dataset_name``: where in the file the rows are."""

    dataset_name: str = "data"


class DAQJobStoreConfigMySQL(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``table_name``: made from the schema if it does not exist."""

    table_name: str


class DAQJobStoreConfigRedis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``key``: of the Redis stream; ``use_timeseries`` asks for time series, where the server has them."""

    key: str
    key_expiration_days: Annotated[int, msgspec.Meta(gt=0)] | None = None
    use_timeseries: bool = False


class DAQJobStoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The backends that data goes to; at least one."""

    csv: DAQJobStoreConfigCSV | None = None
    raw: DAQJobStoreConfigRaw | None = None
    root: DAQJobStoreConfigROOT | None = None
    hdf5: DAQJobStoreConfigHDF5 | None = None
    mysql: DAQJobStoreConfigMySQL | None = None
    redis: DAQJobStoreConfigRedis | None = None

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
