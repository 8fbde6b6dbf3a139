"""Following the journal from another process: what a store reads.

A follower reads the journal's files by itself, but only as far as the journal has said that it is durable. It
outlives the intake: when that is gone it has nothing new to read, and when it is back it registers again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.clock import mono_ns
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.logsetup import get_logger
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_reader import SegmentReader
from edgedaq.storage import Storage

from edgedaq_aggregator.journal_messages import (
    MESSAGE_BYTES_MAX,
    Position,
    Register,
    Tail,
    decode_tail,
    encode,
    socket_address,
)

__all__ = ["JournalFollower"]

_SECOND_NS = 1_000_000_000
_REPORT_EVERY_NS = 100_000_000
_SILENT_NS = 3 * _SECOND_NS
_KNOCK_EVERY_NS = 20_000_000
_CHUNK_BYTES = 1 << 20


class JournalFollower:
    """Yields what the journal holds from a position on, in order, as it becomes durable.

    Args:
        journal_dir: Of the journal.
        runtime_dir: Of the aggregator.
        store: Name under which the journal waits for it.
        start: Where to go on: what was last reported; None when nothing was ever stored.
        from_begin: Whether a store that the journal does not know begins with what is retained; else with
            what comes from now on.
        wants: Which streams matter; frames of others are passed over cheaply, but for their OPEN.

    All of it is used by one thread. Must be closed.
    """

    def __init__(
        self,
        journal_dir: Path,
        runtime_dir: Path,
        store: str,
        start: int | None,
        *,
        from_begin: bool = True,
        wants: Callable[[int], bool] | None = None,
        context: zmq.Context[Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.tail = 0
        """What the journal has last said to be durable."""
        self._dir = journal_dir
        self._store = store
        self._from_begin = from_begin
        self._wants = wants
        self._storage = storage
        self._reported = start
        self._sent: int | None = None
        self._next_speech_ns = 0
        self._earliest_ns = 0
        self._heard_ns: int | None = None
        self._reader: SegmentReader | None = None
        self._reader_start = 0
        self._logger = get_logger(store=store)
        context = context if context is not None else zmq.Context.instance()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 100)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.SNDHWM, 100)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(socket_address(runtime_dir))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    @property
    def position(self) -> int | None:
        """Everything before it was returned by ``read``; None until the journal has said where to begin."""
        return None if self._reader is None else self._reader.position

    @property
    def waiting_bytes(self) -> int:
        """How much lies between what was read and the tail."""
        return 0 if self._reader is None else max(0, self.tail - self._reader.position)

    @property
    def is_connected(self) -> bool:
        """Whether the journal was heard in the last seconds."""
        return self._heard_ns is not None and mono_ns() - self._heard_ns < _SILENT_NS

    def pollables(self) -> list[Any]:
        """Return what becomes readable when there may be more to read."""
        return [self._socket]

    def read(self, timeout_ms: int, max_bytes: int = _CHUNK_BYTES) -> list[Record | Hole]:
        """Return what comes next; waits for it up to ``timeout_ms``, and returns nothing then.

        A ``Hole`` that says ``trimmed`` bears the account of all streams behind it; GAPs follow others.

        Raises:
            OSError: The disk failed in a way that is not damage.
        """
        deadline_ns = mono_ns() + timeout_ms * 1_000_000
        while True:
            self._listen()
            self._speak()
            found = self._read(max_bytes)
            now = mono_ns()
            if found or now >= deadline_ns:
                return found
            self._socket.poll(max(1, (min(deadline_ns, self._next_speech_ns) - now) // 1_000_000))

    def report(self, position: int) -> None:
        """Say that all before ``position`` is durable in the store; told to the journal within a second.

        ``read`` repeats it as long as it is called.
        """
        self._reported = position
        self._speak()

    def table_at_start(self) -> StreamTable:
        """Return the account of all streams where reading began; empty before that is known."""
        return StreamTable() if self._reader is None else self._reader.table_at_start()

    def close(self) -> None:
        """Tell the last position and end; safe to call again."""
        if self._socket.closed:
            return
        self._next_speech_ns = 0
        self._speak()
        self._socket.close()
        if self._reader is not None:
            self._reader.close()

    def _read(self, max_bytes: int) -> list[Record | Hole]:
        if self._reader is None or self._reader.position >= self.tail:
            return []
        return self._reader.read(self.tail, max_bytes)

    def _speak(self) -> None:
        now = mono_ns()
        is_news = self._reported != self._sent and now >= self._earliest_ns
        if now < self._next_speech_ns and not is_news:
            return
        message: Register | Position
        if self._reader is None:
            message = Register(self._store, self._reported, self._from_begin)
        elif self._reported is not None:
            message = Position(self._store, self._reported)
        else:
            message = Position(self._store, self._reader_start)
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the journal is not there now
            self._next_speech_ns = now + _KNOCK_EVERY_NS
            return
        self._sent = self._reported
        self._earliest_ns = now + _REPORT_EVERY_NS
        self._next_speech_ns = now + (_SECOND_NS if self._reader is not None else _REPORT_EVERY_NS)

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(decode_tail(data))
            except WireError as e:
                self._logger.warning("journal.message_refused", reason=str(e))

    def _take(self, tail: Tail) -> None:
        self._heard_ns = mono_ns()
        self.tail = tail.durable
        if tail.start is None:
            return
        if self._reader is not None:
            if tail.start in {self._reported, self._reader_start}:
                return
            self._logger.warning("journal.replaced", position=self._reader.position, start=tail.start)
            self._reader.close()
            self._reported = tail.start
        self._reader_start = tail.start
        self._reader = SegmentReader(self._dir, tail.start, storage=self._storage, wants=self._wants)
