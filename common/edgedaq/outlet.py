"""The producer's side of hop 1: what a job puts becomes frames in its ring, and consumers are told of them.

Two threads: its owner puts (a job's main thread), another one calls ``service``. To put is to
append to an open frame without a lock; see ``stream_writer``. Open frames are sealed when they are full, at
once while everything published was released (so a lone row travels at once, and rows gather while others are
on their way, or come within 10 ms of the last), and at the latest ``linger_s`` after their first row.

Other threads than the owner may put too, inside ``side()``: they share streams and slots
of their own under a lock, so their rows are in order among each other, but not against the main thread's.

A full ring makes ``put`` wait, before it takes the row or message, until a consumer releases. What ``put``
has returned for is in shared memory and survives the process. ``close`` waits for nobody: what finds no room
in the ring stays in the slots, from where ``salvage`` takes it.

Sockets belong to the thread that calls ``service``, and after its end to the one that calls ``close``.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import zmq

from edgedaq.arrow_writer import ArrowWriter
from edgedaq.claim_files import is_claimed, sweep_rings
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import JobError
from edgedaq.frame import pack_map
from edgedaq.gate import Gate, PutTimeout
from edgedaq.live_messages import live_topics_of
from edgedaq.live_tap import LiveTap
from edgedaq.raw_writer import EventWriter, RawWriter
from edgedaq.ring import Identity, ProducedRing
from edgedaq.ring_server import RingServer
from edgedaq.schema import OpenInfo, Schema
from edgedaq.stream_writer import Lane, StreamWriter
from edgedaq.table_writer import TableWriter

__all__ = ["ArrowWriter", "EventWriter", "Outlet", "PutTimeout", "RawWriter", "TableWriter"]

W = TypeVar("W", bound=StreamWriter)

_SIDE_SLOTS = 4
_SIDE_WAIT_S = 1.0


class Outlet:
    """One ring with its streams and consumers. A context manager.

    Args:
        rings_dir: On tmpfs; made if need be. Rings of the dead that nobody needs are removed from it.
        identity: Whose data it is, and which consumers hold it from birth.
        owner: The thread (``threading.get_ident()``) that puts without locks; by default the one that calls.
        versions: Told in each OPEN.
        context: For the sockets; one of its own by default.
        live_dir: Runtime directory of the broker that live topics go to (``live_tap``), if there is one.

    Raises:
        JobError: The ring cannot be created, with the reason.
    """

    def __init__(
        self,
        rings_dir: Path,
        identity: Identity,
        *,
        ring_bytes: int = 16 << 20,
        slot_bytes: int = 64 << 10,
        slots: int = 8,
        linger_s: float = 0.05,
        owner: int | None = None,
        versions: Mapping[str, str] | None = None,
        context: zmq.Context[Any] | None = None,
        live_dir: Path | None = None,
    ) -> None:
        sweep_rings(rings_dir)
        self.identity = identity
        self.gate = Gate()
        self._dir = rings_dir
        self._versions = dict(versions or {})
        self._owner = threading.get_ident() if owner is None else owner
        self._side_lock = threading.RLock()
        try:
            self._ring = ProducedRing(
                rings_dir, identity, ring_bytes=ring_bytes, slot_bytes=slot_bytes, slots=slots + _SIDE_SLOTS
            )
        except JobError:
            self.gate.close()
            raise
        self._server = RingServer(self._ring, self.gate, linger_s=linger_s, context=context)
        self._sealer = self._server.sealer
        self._live_dir = live_dir
        self._tap: LiveTap | None = None
        self._lanes = (
            Lane(self._sealer, self._sealer.slots[:slots]),
            Lane(self._sealer, self._sealer.slots[slots:]),
        )
        self._writers: dict[Any, StreamWriter] = {}
        self._counted = 0
        self._last_out_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Writers: asking twice for the same stream gives the same writer.

    def table(
        self,
        schema: Schema,
        *,
        topics: Sequence[str] = (),
        tag: str = "",
        store_config: Mapping[str, Any] | None = None,
    ) -> TableWriter:
        """Return the writer of a table of rows."""
        return self._writer(TableWriter, schema, b"", topics, tag, store_config)

    def arrow(
        self,
        arrow_schema: bytes,
        *,
        topics: Sequence[str] = (),
        tag: str = "",
        store_config: Mapping[str, Any] | None = None,
    ) -> ArrowWriter:
        """Return the writer of a table of record batches, whose schema is an Arrow IPC schema message."""
        return self._writer(ArrowWriter, None, arrow_schema, topics, tag, store_config)

    def raw(
        self, *, topics: Sequence[str] = (), tag: str = "", store_config: Mapping[str, Any] | None = None
    ) -> RawWriter:
        """Return the writer of a stream of messages."""
        return self._writer(RawWriter, None, b"", topics, tag, store_config)

    def event(
        self, *, topics: Sequence[str] = (), tag: str = "", store_config: Mapping[str, Any] | None = None
    ) -> EventWriter:
        """Return the writer of a stream of events."""
        return self._writer(EventWriter, None, b"", topics, tag, store_config)

    def report_loss(self, writer: StreamWriter, count: int | None, reason: str) -> None:
        """Write down that ``count`` rows or messages of a stream (None: nobody knows) could not be put.

        Raises:
            JobError: The count is negative.
        """
        if count is not None and count < 0:
            message = f"job {self.identity.job}: a loss must be at least 0, got {count}"
            raise JobError(message)
        writer.append_gap(count, reason)

    def side(self) -> AbstractContextManager[Any]:
        """Return what a thread must be in while it gets and uses writers; nothing for the main one."""
        return nullcontext() if threading.get_ident() == self._owner else self._side_lock

    # What the service thread does.

    def pollables(self) -> list[Any]:
        """Return what to poll for reading: a descriptor and, once ``service`` was called, a socket."""
        return [*self._server.pollables(), *([] if self._tap is None else [self._tap.socket])]

    def service(self, now_ns: int | None = None) -> int | None:
        """Take what consumers say, seal what is due, tell what was published, show it to who looks.

        Call it whenever a pollable is ready, at the time it returns, and once a second.

        Returns:
            When it wants to be called at the latest (``mono_ns``); None when a pollable will tell.
        """
        now = mono_ns() if now_ns is None else now_ns
        due = self._server.service(now)
        if self._live_dir is None:
            return due
        if self._tap is None:
            self._tap = LiveTap(self._live_dir, self._sealer, self.gate, self._server.context)
        live_due = self._tap.service(now)
        self._server.observe = self._tap.note if self._tap.is_wanted else None
        return min((at for at in (due, live_due) if at is not None), default=None)

    # Counts, from any thread.

    @property
    def out_count(self) -> int:
        """Rows and messages that were put."""
        with self.gate.condition:
            return sum(account.put_rows() for account in self._sealer.accounts)

    @property
    def out_bytes(self) -> int:
        """Bytes of the bodies that were sealed so far."""
        return sum(account.sealed_bytes for account in self._sealer.accounts)

    @property
    def last_out_ns(self) -> int:
        """UTC ns of the newest put, as far as the calls of this property tell; 0 before the first."""
        count = self.out_count
        if count != self._counted:
            self._counted, self._last_out_ns = count, utc_ns()
        return self._last_out_ns

    @property
    def dropped_count(self) -> int:
        """Rows and messages reported as lost."""
        return sum(account.dropped_rows for account in self._sealer.accounts)

    @property
    def queued_count(self) -> int:
        """Rows and messages that were put and that some consumer still holds, or that are not sealed."""
        with self.gate.condition:
            unsealed = sum(account.unsealed()[0] for account in self._sealer.accounts)
            return self._server.queued_rows + unsealed

    @property
    def put_blocked_s(self) -> float:
        """Seconds for which puts waited for room."""
        return self.gate.blocked_s

    @property
    def is_blocked(self) -> bool:
        """A put waits for room now."""
        return self.gate.is_blocked

    def live_topics(self) -> list[str]:
        """Return under which topics what was put is shown to who looks."""
        with self.gate.condition:
            infos = [account.info for account in self._sealer.accounts]
        return sorted({topic for info in infos for topic in live_topics_of(info)})

    @property
    def blocked_by(self) -> str:
        """Name of the consumer that a put waits for now; empty if none waits."""
        return self._server.held_by if self.gate.is_blocked else ""

    def consumers(self) -> list[dict[str, Any]]:
        """Return what is known of each consumer, as plain data."""
        return self._server.consumers()

    def stream_rows(self) -> dict[str, int]:
        """Return rows put by stream, as 16 hex digits."""
        with self.gate.condition:
            return {f"{account.stream:016x}": account.put_rows() for account in self._sealer.accounts}

    # The end.

    def close(self) -> None:
        """Seal and close all streams as far as there is room, tell the consumers, and give the ring up.

        What another thread puts from now on is refused. The ring stays for its consumers; when it has none it
        is removed.
        """
        self.gate.shut(f"job {self.identity.job}: has ended, nothing can be put any more")
        # Nobody is within a put any more: the owner calls this, and who waited for room was refused.
        is_alone = self._side_lock.acquire(timeout=_SIDE_WAIT_S)
        with self.gate.condition:
            self._finish()
            self._sealer.let_go()
        if is_alone:
            self._side_lock.release()
        self._server.tell()
        if self._tap is not None:
            self._tap.close()
        self._server.close()
        is_needed = self._server.has_claims or is_claimed(self._dir, self.identity.life)
        self._ring.close(unlink=not is_needed)
        self.gate.close()

    def abandon(self, reason: str) -> None:
        """Refuse all puts in a process that was forked off: the memory is its parent's."""
        self.gate.shut(reason)
        self._side_lock = threading.RLock()  # nobody is left who could give the inherited one back
        self._sealer.let_go()

    def _finish(self) -> None:
        for slot in self._sealer.slots:
            if slot.account is not None and not self._sealer.seal(slot):
                return
        for account in self._sealer.accounts:
            if not self._sealer.close_stream(account):
                return

    def _writer(
        self,
        kind: type[W],
        schema: Schema | None,
        arrow_schema: bytes,
        topics: Sequence[str],
        tag: str,
        store_config: Mapping[str, Any] | None,
    ) -> W:
        lane = 0 if threading.get_ident() == self._owner else 1
        config = pack_map(dict(store_config or {}))
        key = (kind, lane, schema, arrow_schema, tuple(topics), tag, config)
        writer = self._writers.get(key)
        if writer is None:
            info = OpenInfo(
                node=self.identity.node,
                job=self.identity.job,
                job_type=self.identity.job_type,
                life=self.identity.life,
                boot=self.identity.boot,
                topics=tuple(topics),
                tag=tag,
                form=_form_of(kind),
                schema=schema,
                store_config=dict(store_config or {}),
                versions=self._versions,
                t_open_ns=utc_ns(),
                arrow_schema=arrow_schema,
            )
            stream = secrets.randbits(63) + 1
            writer = self._writers[key] = kind(self.gate, self._sealer, self._lanes[lane], stream, info)
        return writer  # type: ignore[return-value]


def _form_of(kind: type[StreamWriter]) -> Literal["table", "raw", "event"]:
    if kind is RawWriter:
        return "raw"
    return "event" if kind is EventWriter else "table"
