"""The journal: all that was accepted, in one log; acknowledged means durable here.

It belongs to the intake, which appends and polls; a committer makes it durable in a thread of its own;
stores follow it from their own processes (``journal_client.py``), told how far on ``<runtime>/journal.sock``.
Segments go when every registered store is through with them and ``keep_bytes`` lie behind them. A store that
is further behind than ``store_bytes``, or than another one when no room is left, is left behind: what it
misses becomes a mark when it comes to read it. Where all are as far behind, nodes keep their data.

The journal is cut at a hole that nobody was told to be durable (``resends``): agents still have what was in
it. A new journal begins at a position taken from the clock, so that a store that followed an earlier one in
its place finds that out: its position is before the begin, not somewhere in the middle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.committer import Committer
from edgedaq.delivery import StreamTable
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.frame import Frame
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.segment_recovery import RecoveryReport
from edgedaq.segments import LogFull, SegmentLog
from edgedaq.storage import Storage

from edgedaq_aggregator.journal_messages import (
    MESSAGE_BYTES_MAX,
    Forget,
    FromFollower,
    Position,
    Register,
    Tail,
    decode_request,
    encode,
    socket_address,
)
from edgedaq_aggregator.journal_registry import StoreRegistry

__all__ = ["Journal"]

_SECOND_NS = 1_000_000_000
_TRIM_EVERY_NS = _SECOND_NS // 5  # a few segments at a time: they are used again, not removed
_SAVE_EVERY_NS = 10 * _SECOND_NS
_DAMAGED_HOLD_NS = 600 * _SECOND_NS
_REQUESTS_MAX = 1000
_FOLLOWERS_MAX = 256


class Journal:
    """The one writer of the journal, and the server of those who follow it.

    Args:
        directory: Of the log; made if absent.
        runtime_dir: Where ``journal.sock`` is bound.
        limit_bytes: What the files may take.
        keep_bytes: What is kept although no registered store needs it, for stores that come later; gives way
            when the limit is reached.
        store_bytes: How far a store may be behind; None: as far as there is room.
        stores: Stores that are configured: waited for from now on, although they may not have started yet.

    All of it is used by one thread. Must be closed.

    Raises:
        ConfigError: The limits contradict each other.
        StoreError: Another process has the journal, or its directory or socket cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        runtime_dir: Path,
        *,
        limit_bytes: int,
        segment_bytes: int = 64 << 20,
        reserve_bytes: int = 0,
        keep_bytes: int = 0,
        store_bytes: int | None = None,
        stores: Sequence[str] = (),
        context: zmq.Context[Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        """What the files may take."""
        self._keep_bytes = keep_bytes
        self._store_bytes = store_bytes
        self._left_behind: dict[str, int] = {}
        self._complaints: dict[str, LogLimit] = {}
        self._context = context if context is not None else zmq.Context.instance()
        self._logger = get_logger(journal=str(directory))
        self._followers: dict[bytes, str] = {}
        self._told = -1
        self._next_trim_ns = 0
        self._next_save_ns = mono_ns() + _SAVE_EVERY_NS
        with contextlib.ExitStack() as undo:
            self._log = undo.enter_context(
                SegmentLog(
                    directory,
                    limit_bytes=limit_bytes,
                    segment_bytes=segment_bytes,
                    reserve_bytes=reserve_bytes,
                    resends=True,
                    first_position=utc_ns() & ~4095,
                    storage=storage,
                )
            )
            self._registry = StoreRegistry(directory, storage=storage)
            self._hold_until_ns = mono_ns() + _DAMAGED_HOLD_NS if self._registry.was_damaged else 0
            for store in stores:
                if store not in self._registry.positions:
                    self._registry.add(check_name("store", store), self._log.begin)
            self._socket = self._bind(runtime_dir)
            undo.callback(self._socket.close, 0)
            self._committer = undo.enter_context(Committer(self._log))
            self._undo = undo.pop_all()
        self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    @property
    def table(self) -> StreamTable:
        """The account of all streams, at ``end``: what the intake judges frames by."""
        return self._log.table

    @property
    def begin(self) -> int:
        """Position from which it can be read."""
        return self._log.begin

    @property
    def end(self) -> int:
        """Position behind the last record."""
        return self._log.end

    @property
    def durable(self) -> int:
        """Position before which everything may be acknowledged."""
        return self._log.durable

    @property
    def used_bytes(self) -> int:
        """What its records take."""
        return sum(size for _, size in self._log.sizes())

    @property
    def disk_bytes(self) -> int:
        """What its files take."""
        return self._log.disk_bytes

    @property
    def error(self) -> StoreError | None:
        """Why the disk does not take what was appended, as long as that is so."""
        return self._committer.error

    @property
    def recovery(self) -> RecoveryReport:
        """What was found at start."""
        return self._log.recovery

    @property
    def stores(self) -> dict[str, int]:
        """The registered stores, and up to where each is done."""
        return dict(self._registry.positions)

    @property
    def left_behind(self) -> dict[str, int]:
        """Stores that were left behind since the start, and how many bytes of the journal each has missed."""
        return dict(self._left_behind)

    def would_fit(self, size_bytes: int) -> bool:
        """Tell whether frames of that many bytes can be appended now."""
        if self._log.would_fit(size_bytes):
            return True
        if self._log.is_behind(size_bytes):
            return False  # it will fit soon, and no store has to give anything up for it
        return self._make_room() and self._log.would_fit(size_bytes)

    def append(self, frames: Sequence[Frame]) -> int:
        """Write frames judged ``ACCEPT`` by ``table``; returns the end that ``durable`` has to reach.

        Raises:
            LogFull, LogError, WireError: See ``SegmentLog.append``.
        """
        try:
            return self._log.append(frames)
        except LogFull as e:
            if not self._make_room():
                raise
            kept = e.kept
        finally:
            self._committer.wake()
        try:
            return self._log.append(frames[kept:])
        except LogFull as e:
            e.kept += kept
            raise
        finally:
            self._committer.wake()

    def pollables(self) -> list[Any]:
        """Return what to poll for reading: then call ``service``."""
        return [self._socket, self._committer.fileno()]

    def service(self, now_ns: int) -> int:
        """Answer followers, tell them what became durable, trim; never blocks for long.

        Args:
            now_ns: Monotonic.

        Returns:
            When to call again at the latest, although nothing became readable; monotonic ns.
        """
        self._committer.clear()
        self._receive()
        self._tell_all()
        if now_ns >= self._next_trim_ns:
            self._next_trim_ns = now_ns + _TRIM_EVERY_NS
            if now_ns >= self._hold_until_ns:
                self._trim(self._keep_bytes)
        if now_ns >= self._next_save_ns:
            self._next_save_ns = now_ns + _SAVE_EVERY_NS
            self._registry.save_if_changed()
        return self._next_trim_ns

    def forget(self, store: str) -> bool:
        """Wait no longer for a store; returns whether it was known.

        Raises:
            StoreError: That could not be written down.
        """
        return self._registry.forget(store)

    def close(self) -> None:
        """Make everything durable and end; safe to call again.

        Raises:
            LogError: Not everything could be made durable.
        """
        with contextlib.suppress(zmq.ZMQError):
            self._receive()
        self._registry.save_if_changed()
        self._undo.close()

    def _bind(self, runtime_dir: Path) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        try:
            socket.bind(socket_address(runtime_dir))
        except zmq.ZMQError as e:
            socket.close(0)
            message = f"{runtime_dir}/journal.sock: cannot be bound: {e}"
            raise StoreError(message) from e
        return socket

    def _receive(self) -> None:
        for _ in range(_REQUESTS_MAX):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(parts[0], decode_request(parts[1:]))
            except (WireError, ConfigError, StoreError) as e:
                self._logger.warning("journal.follower_refused", reason=str(e))

    def _take(self, route: bytes, request: FromFollower) -> None:
        store = check_name("store", request.store)
        if isinstance(request, Forget):
            self._logger.info("journal.store_forgotten", store=store, was_known=self.forget(store))
            self._send(route, Tail(self._log.begin, self._log.durable))
            return
        if isinstance(request, Position) and self._followers.get(route) == store:
            if request.position <= self._log.durable:
                self._registry.advance(store, request.position)
            self._send(route, Tail(self._log.begin, self._log.durable))
            return
        if len(self._followers) >= _FOLLOWERS_MAX and route not in self._followers:
            message = f"at most {_FOLLOWERS_MAX} can follow the journal, {store} is one more"
            raise StoreError(message)
        start = self._start_of(store, request)
        is_new = store not in self._registry.positions
        self._registry.add(store, start)
        self._followers[route] = store
        self._logger.info("journal.store_registered", store=store, position=start, is_new=is_new)
        self._send(route, Tail(self._log.begin, self._log.durable, start))

    def _start_of(self, store: str, request: Register | Position) -> int:
        begin, durable = self._log.begin, self._log.durable
        if request.position is not None:
            return request.position if request.position <= durable else begin
        known = self._registry.positions.get(store)
        if known is not None:
            return known if known <= durable else begin
        from_begin = request.from_begin if isinstance(request, Register) else True
        return begin if from_begin else durable

    def _tell_all(self) -> None:
        durable = self._log.durable
        if durable != self._told:
            self._told = durable
            for route in list(self._followers):
                self._send(route, Tail(self._log.begin, durable))

    def _send(self, route: bytes, tail: Tail) -> None:
        try:
            self._socket.send_multipart([route, encode(tail)], zmq.NOBLOCK)
        except zmq.Again:
            pass  # it gets the next one, and asks once a second
        except zmq.ZMQError:
            self._followers.pop(route, None)

    def _trim(self, keep_bytes: int) -> bool:
        """Give back what no store needs but for ``keep_bytes``; returns whether that was anything."""
        before = self._log.begin
        needed = min(self._registry.positions.values(), default=self._log.durable)
        if self._store_bytes is not None:
            needed = max(needed, self._log.durable - self._store_bytes)
        begin = self._log.trim(min(needed, self._kept_from(keep_bytes)))
        self._tell_left_behind(before, begin)
        return begin > before

    def _make_room(self) -> bool:
        """Give back what no store needs; if that is nothing, what the one that is furthest has; a segment."""
        if self._trim(0):
            return True
        before, sizes = self._log.begin, self._log.sizes()
        furthest = max(self._registry.positions.values(), default=0)
        if len(sizes) < 2 or furthest < sizes[1][0]:
            return False
        begin = self._log.trim(sizes[1][0])
        self._tell_left_behind(before, begin)
        return begin > before

    def _tell_left_behind(self, before: int, begin: int) -> None:
        for store, position in self._registry.positions.items():
            missed = begin - max(position, before)
            if missed <= 0:
                continue
            self._left_behind[store] = self._left_behind.get(store, 0) + missed
            count = self._complaints.setdefault(store, LogLimit()).note(mono_ns())
            if count:
                missed_bytes = self._left_behind[store]
                reason = "it is too far behind, and gets a gap"
                self._logger.error(
                    "journal.store_left_behind", store=store, missed_bytes=missed_bytes, reason=reason
                )

    def _kept_from(self, keep_bytes: int) -> int:
        """Return where the newest segments begin that together have ``keep_bytes``."""
        first = self._log.end
        for first, size in reversed(self._log.sizes()):  # noqa: B007
            keep_bytes -= size
            if keep_bytes <= 0:
                break
        return first

    def _report(self) -> None:
        found = self._log.recovery
        tell = self._logger.error if found.holes else self._logger.info
        tell(
            "journal.recovered",
            records_count=found.kept_records,
            holes_count=len(found.holes),
            cut_bytes=found.cut_bytes,
            bad_files=[path.name for path in found.bad_files],
        )
        for problem in found.problems:
            self._logger.error("journal.damaged", reason=problem)
