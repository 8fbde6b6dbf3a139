"""What stores that write to a server share: rows wait encoded, and one transaction per commit takes them.

::

    loop's thread     write ─► encode ─► Load, Load, ...         (memory only, never waits for the server)
                                          │ commit
    commit's thread                       ▼
                      Server.commit(Work): begin ─► watermark ─► loads ─► marks ─► accounts ─► commit

Data, marks and watermarks are in one transaction, so that whatever ends there ends whole. After any error
``recover`` reads from the server what it has. A server that refuses rows for what they are gets them one
frame at a time when they come again; the frame that it refuses then is refused for good, so that nothing
poisons the queue.

The state directory has a copy of the accounts (``commits.py``), for the ledger, which reads files alone.
Nothing is recovered from it, so nobody waits for it to be on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.frame import Frame, decode
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo, decode_open
from edgedaq.storage import OsStorage

from edgedaq_aggregator.stores.backend import Recovered, Refusal
from edgedaq_aggregator.stores.commits import LOG_NAME, Change, CommitLog
from edgedaq_aggregator.stores.marks import Mark
from edgedaq_aggregator.stores.tables import each_or_refused, units_of

__all__ = [
    "Load",
    "LoadRefusedError",
    "Server",
    "ServerBackend",
    "Suspects",
    "Work",
    "known_store_id",
    "store_id",
]

_ID_NAME = "store_id"


@dataclass(slots=True)
class Load:
    """Rows of one stream, as its server takes them; ``payload`` is the server's own."""

    stream: int
    first_seq: int
    last_seq: int
    rows: int
    payload: Any


@dataclass(slots=True)
class Work:
    """One commit.

    ``infos`` has the streams that are in no commit yet; ``before`` is the position of the commit before, as
    the server must have it.
    """

    position: int | None
    before: int | None
    loads: list[Load] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    accounts: list[StreamState] = field(default_factory=list)
    infos: dict[int, OpenInfo] = field(default_factory=dict)


class LoadRefusedError(StoreError):
    """The server does not take rows for what they are; the transaction is rolled back."""

    def __init__(self, load: Load, reason: str) -> None:
        super().__init__(reason)
        self.load = load


class Server(Protocol):
    """One kind of server. Errors of its connection are ``StoreError``."""

    key: str
    """Its name in ``store_config``."""

    def connect(self, store: str) -> Recovered:
        """Connect anew, keep any earlier process of this store out, and return what it has committed."""

    def destination(self, stream: int, info: OpenInfo) -> Any:
        """Return where the rows of a stream go.

        Raises:
            ConfigError: Its store_config asks for what cannot be.
        """

    def refuge(self, stream: int, info: OpenInfo) -> tuple[Any, str]:
        """Return where they go instead, and its name."""

    def encode(self, destination: Any, frames: Sequence[Frame]) -> list[tuple[int, Any]]:
        """Return frames as numbers of rows and payloads.

        Raises:
            WireError: A body is not what OPEN says.
        """

    def commit(self, work: Work) -> None:
        """Do all of it in one transaction.

        Raises:
            LoadRefusedError: Rows are refused for what they are.
            StoreError: Anything else.
        """

    def durable_position(self) -> int | None:
        """Return up to where commits are on the server's disk."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth telling."""

    def close(self) -> None:
        """End the connection."""


class Suspects:
    """Frames that were in a load which a server refused. Outlives the backends of one store."""

    def __init__(self) -> None:
        self._spans: dict[int, tuple[int, int]] = {}

    def add(self, load: Load) -> None:
        """Suspect what a load has; the span that is narrowest counts."""
        self._spans[load.stream] = (load.first_seq, load.last_seq)

    def span(self, stream: int) -> tuple[int, int]:
        """Return first and last suspected seq of a stream; an empty span when there is none."""
        return self._spans.get(stream, (1, 0))

    def forget(self, stream: int) -> None:
        """Forget a stream."""
        self._spans.pop(stream, None)


class ServerBackend:
    """See ``backend.Backend`` for the contract.

    Args:
        state_dir: Of this store alone; keeps the id under which the server knows it.
    """

    def __init__(self, server: Server, state_dir: Path, suspects: Suspects) -> None:
        self._server = server
        self._state_dir = state_dir
        self._suspects = suspects
        self._destinations: dict[int, Any] = {}
        self._work = Work(None, None)
        self._position: int | None = None
        self._copy: CommitLog | None = None
        self._log = get_logger().bind(store=server.key)

    def recover(self) -> Recovered:
        """See ``Backend``."""
        self.close()
        self._copy = self._opened_copy()  # has the lock: no other process of this machine is kept out below
        found = self._server.connect(store_id(self._state_dir))
        self._position = found.position
        table = StreamTable.restore(found.table.snapshot())
        self._copy_all(found)
        for account in list(table.streams.values()):
            try:
                self._open(account.stream, decode_open(decode(memoryview(account.open_raw))))
            except WireError as e:
                self._log.error("stream.unreadable", stream=f"{account.stream:016x}", reason=str(e))
                del table.streams[account.stream]
        return Recovered(table, found.position)

    def open(self, stream: int, info: OpenInfo) -> None:
        """See ``Backend``."""
        self._work.infos[stream] = info
        redirected = self._open(stream, info)
        if redirected:
            self.write_mark(Mark(info, stream, "redirected", info.t_open_ns, 0, 0, 0, redirected))

    def write(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        """See ``Backend``."""
        first, last = self._suspects.span(stream)
        if not any(first <= frame.seq <= last for frame in frames):
            return self._encode(stream, frames)
        refused: list[Refusal] = []
        for unit in units_of(frames):
            if (unit[0].seq, unit[-1].seq) == (first, last):
                refused += [Refusal(frame, f"{self._server.key} does not take it") for frame in unit]
            else:
                refused += self._encode(stream, unit)
        return refused

    def write_mark(self, mark: Mark) -> None:
        """See ``Backend``."""
        self._work.marks.append(mark)

    def end(self, stream: int) -> None:
        """See ``Backend``."""
        self._destinations.pop(stream, None)

    def commit(self, change: Change) -> Callable[[], None]:
        """See ``Backend``."""
        work, self._work = self._work, Work(None, None)
        work.position, work.before, work.accounts = change.position, self._position, change.accounts
        self._position = change.position
        copy = self._copy

        def make_durable() -> None:
            try:
                self._server.commit(work)
            except LoadRefusedError as e:
                self._suspects.add(e.load)
                raise
            if copy is not None:
                copy.append(change)

        return make_durable

    def committed(self) -> None:
        """See ``Backend``."""

    def durable_position(self) -> int | None:
        """See ``SettlingBackend``."""
        return self._server.durable_position()

    def facts(self) -> dict[str, Any]:
        """See ``Backend``."""
        return self._server.facts()

    def close(self) -> None:
        """See ``Backend``."""
        self._server.close()
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        self._destinations.clear()
        self._work = Work(None, None)

    def _open(self, stream: int, info: OpenInfo) -> str:
        """Find where a stream goes; return why it goes elsewhere than asked, or nothing."""
        try:
            self._destinations[stream] = self._server.destination(stream, info)
        except ConfigError as e:
            self._destinations[stream], name = self._server.refuge(stream, info)
            self._log.error("stream.redirected", node=info.node, job=info.job, path=name, reason=str(e))
            return f"{e}; see {name}"
        return ""

    def _opened_copy(self) -> CommitLog:
        return CommitLog(self._state_dir, self._server.key, _UnsyncedStorage())

    def _copy_all(self, found: Recovered) -> None:
        """Make the copy anew: the server may have been set back."""
        if self._copy is not None:
            self._copy.close()
        (self._state_dir / LOG_NAME).unlink(missing_ok=True)
        self._copy = self._opened_copy()
        accounts = [*found.table.tombstones.values(), *found.table.streams.values()]
        self._copy.append(Change(found.position, accounts=[replace(account) for account in accounts]))

    def _encode(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        destination = self._destinations[stream]

        def loads_of(group: Sequence[Frame]) -> list[Load]:
            encoded = self._server.encode(destination, group)
            return [Load(stream, group[0].seq, group[-1].seq, rows, payload) for rows, payload in encoded]

        refused: list[Refusal] = []
        self._work.loads += each_or_refused(loads_of, frames, refused)
        return refused


class _UnsyncedStorage(OsStorage):
    """Leaves it to the system when something is on the disk."""

    def fdatasync(self, fd: int) -> None:
        """Do nothing."""

    def sync_directory(self, path: Path) -> None:
        """Do nothing."""


def known_store_id(state_dir: Path) -> str:
    """Return the id under which a server knows this store, empty before its first start."""
    try:
        found = (state_dir / _ID_NAME).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
    return found if len(found) == 16 and not set(found) - set("0123456789abcdef") else ""


def store_id(state_dir: Path) -> str:
    """Return the id under which a server knows this store: 16 hex digits, random at its first start."""
    found = known_store_id(state_dir)
    if found:
        return found
    path = state_dir / _ID_NAME
    state_dir.mkdir(parents=True, exist_ok=True)
    fresh = state_dir / f"{_ID_NAME}.new"
    with fresh.open("w", encoding="ascii") as file:
        found = os.urandom(8).hex()
        file.write(found + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    directory = os.open(state_dir, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return found
