"""The commit record log of one store: what is committed, in one file that replaces a two-file transaction.

Data files and watermarks commit together by one append here: first the data is fdatasynced, then a record
is appended and fdatasynced. What a record does not cover does not exist: recovery cuts each file back to it.
The file ``commits.log`` has its full length from the start (a growing file costs a second flush)::

    offset  size  field
         0     8  magic     b"EDQCMT01"
         8     8  salt      random per file: bytes of an older file are never read as new
        16     8  check     xxh3-64 of bytes 0 .. 16
        24    40  zeros
        64        records, each at a multiple of 8:
               8  salt
               4  length    of the payload
               4  number    0, 1, 2, ... in this file
               8  check     xxh3-64 of the 16 bytes before and the payload
                  payload   a msgpack map, zeros up to a multiple of 8

The first record is the whole state, each later one what changed. Payload::

    store     str         its key in store_config
    position  int | nil   the journal is consumed up to here (exclusive)
    clean     bool        written at an orderly end: a longer file was then made longer by someone else
    files     {path below out_dir: [end, start, digest, header, owner, sealed]}
                          the file holds rows up to ``end``; digest is the xxh3-64 of start .. end, which
                          the last commit wrote (or it and those before it); header is the xxh3-64 of its
                          first line (0: none); owner the stream of a file that holds only one (0: shared);
                          sealed: it is left alone
    streams   {16 hex: account}   the fields of ``StreamState`` from next_seq on
    opens     {16 hex: frame}     OPEN of streams that are new in this record
              keys that a reader does not know are passed over

A file that has no mark is declared, with what it holds already, before the first byte is written to it.

When the file is full, or is opened, the state is written to a new file, which replaces it by rename. A valid
record behind a damaged one makes ``damage`` say so: watermarks may then be older than the files, and nothing
is cut.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import pack_map, unpack_map
from edgedaq.storage import Storage, write_all
from xxhash import xxh3_64_intdigest

__all__ = ["LOG_NAME", "Change", "CommitLog", "CommitState", "FileMark", "read_commits"]

LOG_NAME = "commits.log"
LOG_BYTES = 1 << 20
FILES_MAX = 4096
"""Beyond this, marks of the files written longest ago are forgotten; needed again, such a file is adopted."""

_MAGIC = b"EDQCMT01"
_HEADER_BYTES = 64
_PREFIX = struct.Struct("<QIIQ")
_PREFIX_HEAD = struct.Struct("<QII")
_ACCOUNT = tuple(name for name in StreamState.__slots__ if name not in ("stream", "open_raw"))
_ACCOUNT_TYPES = tuple(bool if name in ("closed", "tail_unknown") else int for name in _ACCOUNT)


class FileMark(NamedTuple):
    """What is committed of one data file; see the drawing."""

    end: int
    start: int = 0
    digest: int = 0
    header: int = 0
    owner: int = 0
    sealed: bool = False


@dataclass(slots=True)
class Change:
    """What one commit changes; ``files`` maps to None where a mark is forgotten."""

    position: int | None
    files: dict[str, FileMark | None] = field(default_factory=dict)
    accounts: list[StreamState] = field(default_factory=list)
    clean: bool = False


@dataclass(slots=True)
class CommitState:
    """Everything that is committed."""

    store: str = ""
    position: int | None = None
    clean: bool = True
    files: dict[str, FileMark] = field(default_factory=dict)
    table: StreamTable = field(default_factory=StreamTable)

    def apply(self, change: Change) -> None:
        """Take over a change."""
        self.position, self.clean = change.position, change.clean
        for path, mark in change.files.items():
            self.files.pop(path, None)
            if mark is not None:
                self.files[path] = mark
        while len(self.files) > FILES_MAX:
            del self.files[next(iter(self.files))]
        for account in change.accounts:
            self._put(account)

    def _put(self, account: StreamState) -> None:
        table = self.table
        if not account.closed:
            table.streams[account.stream] = account
            return
        table.streams.pop(account.stream, None)
        table.tombstones[account.stream] = account
        while len(table.tombstones) > table.tombstones_max:
            del table.tombstones[next(iter(table.tombstones))]


class CommitLog:
    """The log of one store; the directory is this process's alone while it is open.

    ``append`` and ``declare`` may be called from two threads.

    Args:
        directory: Made if it is absent.
        store: Key in ``store_config`` of the streams that it accounts for.

    Raises:
        BlockingIOError: Another process has it.
        OSError: It cannot be read or written.
    """

    def __init__(self, directory: Path, store: str, storage: Storage) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._storage = storage
        self._fd = -1
        self._turn = threading.Lock()
        self._lock = storage.lock(directory / "lock")
        try:
            self.state, self.damage = _load(directory / LOG_NAME, storage)
            self.state.store = store
            if self.damage:
                storage.rename(directory / LOG_NAME, directory / f"{LOG_NAME}.bad")
            self._known = {*self.state.table.streams, *self.state.table.tombstones}
            self._rewrite()
        except BaseException:
            self.close()
            raise

    def append(self, change: Change) -> None:
        """Make a change durable; the data that it speaks of must be so already.

        After an error the log must be closed and opened again.
        """
        with self._turn:
            self._append(change)

    def declare(self, path: str, mark: FileMark) -> None:
        """Make durable, before the first byte is written, what a file holds that has no mark yet.

        Without it, uncommitted rows in a new file could not be told from somebody's own.
        """
        with self._turn:
            self._append(Change(self.state.position, {path: mark}))

    def close(self) -> None:
        """Give the directory back; commits nothing."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                self._storage.close(fd)
        self._fd = self._lock = -1

    def _append(self, change: Change) -> None:
        record = self._record(change)
        if self._end + len(record) > self._size:
            self.state.apply(change)
            self._rewrite()
            return
        write_all(self._storage, self._fd, [record], self._end)
        self._storage.fdatasync(self._fd)
        self.state.apply(change)
        self._end += len(record)
        self._number += 1
        self._known.update(account.stream for account in change.accounts)

    def _record(self, change: Change) -> bytes:
        opens = {
            f"{account.stream:016x}": account.open_raw
            for account in change.accounts
            if account.stream not in self._known
        }
        payload = pack_map(
            {
                "store": self.state.store,
                "position": change.position,
                "clean": change.clean,
                "files": {path: None if mark is None else list(mark) for path, mark in change.files.items()},
                "streams": {
                    f"{account.stream:016x}": [getattr(account, name) for name in _ACCOUNT]
                    for account in change.accounts
                },
                "opens": opens,
            }
        )
        head = _PREFIX_HEAD.pack(self._salt, len(payload), self._number)
        check = struct.pack("<Q", xxh3_64_intdigest(head + payload))
        return head + check + payload + bytes(-len(payload) & 7)

    def _rewrite(self) -> None:
        """Replace the log by one that holds the whole state."""
        self._salt = int.from_bytes(os.urandom(8), "little")
        self._number = 0
        self._known = set()
        table = self.state.table
        accounts = [*table.tombstones.values(), *table.streams.values()]
        whole = Change(self.state.position, dict(self.state.files), accounts, self.state.clean)
        record = self._record(whole)
        head = _MAGIC + struct.pack("<Q", self._salt)
        head += struct.pack("<Q", xxh3_64_intdigest(head))
        image = head.ljust(_HEADER_BYTES, b"\0") + record
        size = max(LOG_BYTES, 4 * len(image) & ~7)
        path, fresh = self._directory / LOG_NAME, self._directory / f"{LOG_NAME}.new"
        fd = self._storage.open(fresh, write=True, create=True)
        try:
            self._storage.truncate(fd, 0)
            write_all(self._storage, fd, [image.ljust(size, b"\0")], 0)
            self._storage.fdatasync(fd)
            self._storage.rename(fresh, path)
            self._storage.sync_directory(self._directory)
        except BaseException:
            self._storage.close(fd)
            raise
        if self._fd >= 0:
            self._storage.close(self._fd)
        self._fd, self._size, self._end, self._number = fd, size, len(image), 1
        self._known = {account.stream for account in accounts}


def read_commits(directory: Path, storage: Storage) -> tuple[CommitState, str]:
    """Return what a store has committed, and what is damaged in its log (empty: nothing).

    For readers: takes no lock and changes nothing; the store may be running.
    """
    return _load(directory / LOG_NAME, storage)


def _load(path: Path, storage: Storage) -> tuple[CommitState, str]:
    state = CommitState()
    if not path.exists():
        return state, ""
    fd = storage.open(path)
    try:
        image = memoryview(storage.pread(fd, storage.size(fd), 0))
    finally:
        storage.close(fd)
    head = bytes(image[:16])
    if (
        len(image) < _HEADER_BYTES
        or head[:8] != _MAGIC
        or int.from_bytes(image[16:24], "little") != (xxh3_64_intdigest(head))
    ):
        return state, "the header is damaged"
    salt = head[8:16]
    at, number = _HEADER_BYTES, 0
    while (found := _record_at(image, at, salt)) is not None and found[0] == number:
        _apply_payload(state, found[2])
        at, number = at + found[1], number + 1
    if number == 0:
        return state, "the first record is damaged"
    damaged = number
    while (later := _next_record(image, at, salt)) is not None:
        start, record = later
        at = start + record[1]
        if record[0] > number:
            _apply_payload(state, record[2])
            number = record[0]
    return state, f"record {damaged} is damaged, with valid ones behind it" if number > damaged else ""


def _record_at(image: memoryview, at: int, salt: bytes) -> tuple[int, int, dict[str, object]] | None:
    """Return number, length and payload of the record at ``at``; None when there is no valid one."""
    if at + _PREFIX.size > len(image) or image[at : at + 8] != salt:
        return None
    _, length, number, check = _PREFIX.unpack_from(image, at)
    start = at + _PREFIX.size
    if start + length > len(image):
        return None
    payload = image[start : start + length]
    if xxh3_64_intdigest(bytes(image[at : at + 16]) + bytes(payload)) != check:
        return None
    try:
        return number, _PREFIX.size + length + (-length & 7), unpack_map(payload)
    except WireError:
        return None


def _next_record(
    image: memoryview, at: int, salt: bytes
) -> tuple[int, tuple[int, int, dict[str, object]]] | None:
    whole = image.obj if isinstance(image.obj, bytes) else bytes(image)
    while (at := whole.find(salt, at)) >= 0:
        record = _record_at(image, at, salt)
        if record is not None:
            return at, record
        at += 1
    return None


def _apply_payload(state: CommitState, payload: dict[str, object]) -> None:
    """Apply a record whose checksum holds; what does not have the drawn types is skipped whole."""
    position, files = payload.get("position"), payload.get("files")
    streams, opens = payload.get("streams"), payload.get("opens")
    if not (
        (position is None or type(position) is int)
        and isinstance(files, dict)
        and isinstance(streams, dict)
        and isinstance(opens, dict)
    ):
        return
    state.store = str(payload.get("store", ""))
    change = Change(position, clean=payload.get("clean") is True)
    for path, mark in files.items():
        if mark is None:
            change.files[path] = None
        elif isinstance(mark, list) and len(mark) == len(FileMark._fields):
            change.files[path] = FileMark(*mark)
    for name, values in streams.items():
        stream = int(name, 16)
        known = state.table.streams.get(stream) or state.table.tombstones.get(stream)
        open_raw = opens.get(name, b"" if known is None else known.open_raw)
        if [type(value) for value in values] == list(_ACCOUNT_TYPES):
            change.accounts.append(StreamState(stream, open_raw, *values))
    state.apply(change)
