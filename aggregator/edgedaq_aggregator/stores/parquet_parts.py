"""Parts: Parquet files that are written under a hidden name, and get their own once they are committed.

::

    <out_dir>/<node>/<file_path>/000001.parquet              a dataset is a directory of parts
                                 000002.parquet              each complete, and never changed again
                                 .000003.parquet.new         being written

What has its name is committed: the record comes before the rename, which recovery repeats. So a reader of a
dataset never sees a row that may be taken back, and ``pandas.read_parquet`` of the directory reads all of it
at any time. What has a hidden name and no record is overwritten.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from edgedaq.errors import StoreError
from edgedaq.storage import Storage, write_all

from edgedaq_aggregator.stores.commits import FileMark
from edgedaq_aggregator.stores.ranges import BlockStreams, OpenBlock

__all__ = ["SUFFIX", "Dataset", "Part", "hidden"]

SUFFIX = ".parquet"
GROUP_BYTES = 16 << 20
"""Rows are gathered to row groups of this size in memory."""

_WRITE_BYTES = 1 << 20
_PART = re.compile(r"(\d+)\.parquet\Z")
_HIDDEN = re.compile(r"\.\d+\.parquet\.new\Z")


class Part:
    """One part: rows in memory at first, from the first row group on in its file.

    Args:
        name: That it gets, below ``out_dir``.
        storage: All writing goes through it.
    """

    def __init__(self, path: Path, name: str, schema: pa.Schema, compression: str, storage: Storage) -> None:
        self.path = path
        self.name = name
        self.buffered_bytes = 0
        self._block = OpenBlock(0)
        self._schema = schema
        self._compression = compression
        self._storage = storage
        self._batches: list[pa.RecordBatch] = []
        self._sink: _Sink | None = None
        self._writer: Any = None

    @property
    def held(self) -> BlockStreams:
        """Whose rows it has."""
        return self._block.held

    def append(self, batch: pa.RecordBatch, stream: int, first_seq: int, last_seq: int) -> None:
        """Take rows of its schema, of these frames.

        Raises:
            OSError, StoreError: The part must be given back.
        """
        self._block.tell(stream, first_seq, last_seq, batch.num_rows)
        self._batches.append(batch)
        self.buffered_bytes += batch.nbytes
        if self.buffered_bytes >= GROUP_BYTES:
            self.write_group()

    def write_group(self) -> None:
        """Write what was gathered as a row group; not durable."""
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches)
        self._batches, self.buffered_bytes = [], 0
        with _told(self.name):
            if self._writer is None:
                self._sink = _Sink(hidden(self.path), self._storage)
                options: dict[str, Any] = {
                    "compression": self._compression,
                    "version": "2.6",
                    "use_dictionary": _texts(self._schema),
                }
                self._writer = pq.ParquetWriter(cast("Any", self._sink), self._schema, **options)
            self._writer.write_table(table, row_group_size=len(table))

    def finish(self) -> FileMark:
        """Complete it, durable under its hidden name; return what a commit records of it.

        Raises:
            OSError, StoreError: The part must be given back.
        """
        self.write_group()
        sink = self._sink
        if sink is None:
            message = f"{self.name} has no rows"
            raise RuntimeError(message)
        with _told(self.name):
            self._writer.close()
        sink.flush()
        self._storage.fdatasync(sink.fd)
        if not self._storage.is_at(sink.fd, hidden(self.path)):
            message = f"{self.name} was moved away while it was written"
            raise StoreError(message)
        self.close()
        return FileMark(sink.size, 0, sink.hash.intdigest())

    def publish(self) -> None:
        """Give it its name."""
        self._storage.rename(hidden(self.path), self.path)

    def close(self) -> None:
        """Give it back; what is not finished is abandoned."""
        if self._sink is not None:
            self._sink.abandon()
            with contextlib.suppress(OSError, pa.ArrowException, ValueError):
                self._writer.close()
        self._batches.clear()


class Dataset:
    """A directory of parts of one schema; ``next_number`` is that of the next part."""

    def __init__(self, path: Path, name: str, schema: pa.Schema, next_number: int) -> None:
        self.path = path
        self.name = name
        self.schema = schema
        self.next_number = next_number
        self.part: Part | None = None
        self.last_used = 0
        self._inode = path.stat().st_ino

    @property
    def is_there(self) -> bool:
        """The directory is the one that was found."""
        try:
            return self.path.stat().st_ino == self._inode
        except (FileNotFoundError, NotADirectoryError):
            return False

    def new_part(self, compression: str, storage: Storage) -> Part:
        """Begin the next part."""
        while True:
            base = f"{self.next_number:06}{SUFFIX}"
            self.next_number += 1
            if not (self.path / base).exists():
                break
        self.part = Part(self.path / base, f"{self.name}/{base}", self.schema, compression, storage)
        return self.part

    @classmethod
    def at(cls, path: Path, name: str, schema: pa.Schema, recorded: int, storage: Storage) -> Dataset | None:
        """Return the dataset of a directory if it is of this schema; an empty one is of any.

        Args:
            recorded: Number of the newest part that was ever committed there.
        """
        parts: dict[int, str] = {}
        for entry in storage.names(path):
            if _HIDDEN.match(entry):
                storage.unlink(path / entry)  # of a death: whatever is recorded was given its name before
            elif found := _PART.match(entry):
                parts[int(found[1])] = entry
        newest = max(parts, default=0)
        if parts:
            try:
                held = pq.read_schema(path / parts[newest])
            except (OSError, pa.ArrowException):
                return None
            if not held.equals(schema):
                return None
        return cls(path, name, schema, max(newest, recorded) + 1)


def _texts(schema: pa.Schema) -> list[str]:
    """Return the columns that a dictionary is tried for; of measured numbers it costs more than all else."""
    return [field.name for field in schema if pa.types.is_string(field.type)]


def hidden(path: Path) -> Path:
    """Return the name that a part has until it is committed."""
    return path.with_name(f".{path.name}.new")


class _Sink:
    """The file object that pyarrow writes a part to: gathers small writes, hashes, counts."""

    def __init__(self, path: Path, storage: Storage) -> None:
        self.size = 0
        self.hash = xxhash.xxh3_64()
        self.closed = False
        self._storage = storage
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.fd = storage.open(path, write=True, create=True)
        try:
            storage.truncate(self.fd, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: Any) -> int:
        if self.closed:
            return len(data)
        self._held.append(bytes(data))
        self._held_bytes += len(data)
        if self._held_bytes >= _WRITE_BYTES:
            self.flush()
        return len(data)

    def tell(self) -> int:
        return self.size + self._held_bytes

    def flush(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        if held and not self.closed:
            whole = b"".join(held)
            write_all(self._storage, self.fd, [whole], self.size)
            self.hash.update(whole)
            self.size += len(whole)

    def close(self) -> None:
        """Does nothing: pyarrow calls it, the descriptor is closed by ``abandon``."""

    def abandon(self) -> None:
        """Take nothing more, and give the descriptor back."""
        if not self.closed:
            self.closed = True
            self._storage.close(self.fd)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what pyarrow raises into what a store raises."""
    try:
        yield
    except pa.ArrowException as e:
        message = f"{name}: {e}"
        raise StoreError(message) from e
