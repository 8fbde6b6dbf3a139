"""The commit record log of one store: what is committed, in one file that replaces a two-file transaction.

Data files and watermarks commit together by one append here: first the data is fdatasynced, then a record
is appended and fdatasynced. What a record does not cover does not exist: recovery cuts each file back to it.
The file ``commits.log`` is a log as drawn in ``records.py``, magic ``b"EDQCMT01"``, numbers from 0, with its
full length from the start. The first record is the whole state, each later one what changed. Payload::

    store     str         its key in store_config
    position  int | nil   the journal is consumed up to here (exclusive)
    clean     bool        written at an orderly end: a longer file was then made longer by someone else
    files     {path below out_dir: [end, start, digest, header, owner, sealed]}
                          the file holds rows up to ``end``; digest is the xxh3-64 of start .. end, which
                          the last commits wrote; header is the xxh3-64 of its first line (0: none); owner
                          the stream of a file that holds only one (0: shared); sealed: it is left alone
    blocks    {path: [turns, {16 hex: [first, last, rows]}]}
                          whose rows start .. end are, while that is a block (``ranges.py``)
    ranges    int         how many numbers ``ranges.log`` had given before this record
    streams   {16 hex: account}   the fields of ``StreamState`` from next_seq on
    opens     {16 hex: frame}     OPEN of streams that are new in this record

A file that has no mark is declared, with what it holds already, before the first byte is written to it.

When the file is full, or is opened, the state is written to a new file, which replaces it by rename. A valid
record behind a damaged one makes ``damage`` say so: watermarks may then be older than the files, and nothing
is cut.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.storage import Storage

from edgedaq_aggregator.stores.ranges import Block, BlockStreams, RangeLog
from edgedaq_aggregator.stores.records import RecordFile, read_image, scan

__all__ = ["LOG_NAME", "Change", "CommitLog", "CommitState", "FileMark", "read_commits"]

LOG_NAME = "commits.log"
LOG_BYTES = 1 << 20
FILES_MAX = 4096
"""Beyond this, marks of the files written longest ago are forgotten; needed again, such a file is adopted."""

_MAGIC = b"EDQCMT01"
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
    """What one commit changes; ``files`` has None where a mark is forgotten, ``blocks`` those that grew."""

    position: int | None
    files: dict[str, FileMark | None] = field(default_factory=dict)
    accounts: list[StreamState] = field(default_factory=list)
    clean: bool = False
    blocks: dict[str, BlockStreams] = field(default_factory=dict)


@dataclass(slots=True)
class CommitState:
    """Everything that is committed."""

    store: str = ""
    position: int | None = None
    clean: bool = True
    files: dict[str, FileMark] = field(default_factory=dict)
    blocks: dict[str, BlockStreams] = field(default_factory=dict)
    ranges: int = 0
    table: StreamTable = field(default_factory=StreamTable)

    def open_blocks(self) -> Iterator[Block]:
        """Yield the blocks that are not in ``ranges.log``."""
        for path, held in self.blocks.items():
            mark = self.files[path]
            yield Block(path, mark.start, mark.end, mark.digest, held)

    def over_by(self, change: Change) -> list[Block]:
        """Return the open blocks that a change no longer speaks of."""
        idle = [path for path in self.files if path not in change.files]
        evicted = set(idle[: max(len(idle) + len(change.files) - FILES_MAX, 0)])
        return [
            block
            for block in self.open_blocks()
            if block.file in evicted or _is_over(block, self.files[block.file], change)
        ]

    def apply(self, change: Change) -> None:
        """Take over a change."""
        self.position, self.clean = change.position, change.clean
        for path, mark in change.files.items():
            self.files.pop(path, None)
            held = self.blocks.pop(path, None)
            if mark is not None:
                self.files[path] = mark
                held = held if mark.sealed else None
                held = change.blocks.get(path, held)
                if held is not None:
                    self.blocks[path] = held
        while len(self.files) > FILES_MAX:
            self.blocks.pop(next(iter(self.files)), None)
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
        self._file = RecordFile(directory / LOG_NAME, _MAGIC, storage)
        self._ranges: RangeLog | None = None
        self._turn = threading.Lock()
        self._lock = storage.lock(directory / "lock")
        try:
            self.state, self.damage = read_commits(directory, storage)
            self.state.store = store
            if self.damage:
                storage.rename(directory / LOG_NAME, directory / f"{LOG_NAME}.bad")
            self._ranges = RangeLog(directory, storage, first_number=self.state.ranges)
            self._end_blocks(self._ranges, list(self.state.open_blocks()))
            self.state.blocks.clear()
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
        self._file.close()
        if self._ranges is not None:
            self._ranges.close()
        if self._lock >= 0:
            self._storage.close(self._lock)
        self._lock = -1

    def _append(self, change: Change) -> None:
        if self._ranges is not None:
            self._end_blocks(self._ranges, self.state.over_by(change))
        record = self._file.bytes_of([self._payload(change, self._known)])
        if self._file.end + len(record) > self._file.size:
            self.state.apply(change)
            self._rewrite()
            return
        self._file.append(record, 1)
        self.state.apply(change)
        self._known.update(account.stream for account in change.accounts)

    def _end_blocks(self, ranges: RangeLog, blocks: list[Block]) -> None:
        if blocks:
            ranges.append(blocks)
        self.state.ranges = ranges.next_number

    def _payload(self, change: Change, known: set[int]) -> dict[str, object]:
        return {
            "store": self.state.store,
            "position": change.position,
            "clean": change.clean,
            "files": {path: None if mark is None else list(mark) for path, mark in change.files.items()},
            "blocks": {path: held.to_plain() for path, held in change.blocks.items()},
            "ranges": self.state.ranges,
            "streams": {
                f"{account.stream:016x}": [getattr(account, name) for name in _ACCOUNT]
                for account in change.accounts
            },
            "opens": {
                f"{account.stream:016x}": account.open_raw
                for account in change.accounts
                if account.stream not in known
            },
        }

    def _rewrite(self) -> None:
        """Replace the log by one that holds the whole state."""
        state = self.state
        accounts = [*state.table.tombstones.values(), *state.table.streams.values()]
        whole = Change(state.position, dict(state.files), accounts, state.clean, dict(state.blocks))
        self._file.begin([self._payload(whole, set())], 0, LOG_BYTES)
        self._known = {account.stream for account in accounts}


def read_commits(directory: Path, storage: Storage) -> tuple[CommitState, str]:
    """Return what a store has committed, and what is damaged in its log (empty: nothing).

    For readers: takes no lock and changes nothing; the store may be running.
    """
    state = CommitState()
    image = read_image(directory / LOG_NAME, storage)
    if image is None:
        return state, ""
    found = scan(image, _MAGIC)
    for _, payload in found.records:
        _apply_payload(state, payload)
    return state, found.damage


def _is_over(block: Block, mark: FileMark, change: Change) -> bool:
    """Tell whether a change ends a block, of which ``mark`` is the mark."""
    if block.file not in change.files:
        return False
    now = change.files[block.file]
    return now is None or now.start != block.start or now.end < block.end or now.owner != mark.owner


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
    ranges, blocks = payload.get("ranges"), payload.get("blocks")
    state.ranges = ranges if type(ranges) is int else state.ranges
    change = Change(position, clean=payload.get("clean") is True)
    for path, plain in blocks.items() if isinstance(blocks, dict) else ():
        held = BlockStreams.from_plain(plain)
        if held is not None and files.get(path) is not None:
            change.blocks[path] = held
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
