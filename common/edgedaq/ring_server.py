"""The producer's answer to its consumers: the socket of a ring, and when its open frames are sealed.

``service`` is called by one thread, the service thread; ``on_publish`` by whoever seals, with the lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import zmq

from edgedaq.claim_files import ClaimFile, claim_path, read_wants
from edgedaq.claims import Claims
from edgedaq.clock import utc_ns
from edgedaq.errors import WireError
from edgedaq.gate import Gate
from edgedaq.logsetup import get_logger
from edgedaq.ring import ProducedRing
from edgedaq.ring_control import RingBegin, Runs, Subscribe, decode_from_consumer, encode_control
from edgedaq.ring_frames import walk
from edgedaq.ring_layout import FORM_RAW, W_FORM, W_T_FIRST, W_T_PUT
from edgedaq.sealing import Account, Sealer

__all__ = ["RingServer"]

_RUNS_MAX = 1000
_CLAIMS_EVERY_NS = 1_000_000_000


class RingServer:
    """Tells consumers of frames, takes their releases, and seals open frames when they are due.

    ``observe`` is told (account, position, length) of each frame, with the lock held.
    """

    def __init__(
        self, ring: ProducedRing, gate: Gate, *, linger_s: float, context: zmq.Context[Any] | None
    ) -> None:
        identity = ring.layout.identity
        self.sealer = Sealer(ring, self._on_publish)
        self._gate = gate
        self._linger_ns = int(linger_s * 1e9)
        self._context = context
        self._own_context: zmq.Context[Any] | None = None
        self._claims = Claims(identity.claims, ring.layout.ring_bytes)
        for consumer, topics in read_wants(ring.path.parent).items():
            ClaimFile(ring.path.parent, identity.life, consumer).close()
            self._claims.add(consumer, topics)
        self._claims_due_ns = self._sealed_ns = 0
        self._socket: zmq.Socket[bytes] | None = None
        self.observe: Callable[[Account, int, int], None] | None = None
        self._queued: deque[tuple[int, int]] = deque()
        self.queued_rows = 0
        self._log = get_logger(job=identity.job, life=identity.life)

    @property
    def has_claims(self) -> bool:
        """Some consumer holds the ring, connected or not."""
        return bool(self._claims.claims)

    def pollables(self) -> list[Any]:
        """Return what to poll for reading."""
        return [self._gate.wake_fd] if self._socket is None else [self._gate.wake_fd, self._socket]

    def service(self, now: int) -> int | None:
        """Do all that is due; return when to be called at the latest, or None."""
        gate = self._gate
        gate.woken()
        if self._socket is None:
            self._bind()
        self._receive()
        if now >= self._claims_due_ns:
            self._claims_due_ns = now + _CLAIMS_EVERY_NS
            self._check_claims()
        with gate.condition:
            self._advance()
            due = self._seal_due(now)
            # From here on a first row wakes this thread, if nothing else is due to.
            gate.is_hot = due is None
            gate.is_asleep = True
        self.tell()
        return due

    def tell(self) -> None:
        """Tell the consumers of what was published."""
        with self._gate.condition:
            pending = self._claims.take_pending()
        for claim, route, runs in pending:
            for at in range(0, len(runs), _RUNS_MAX):
                part = [(run[0], run[1], run[2]) for run in runs[at : at + _RUNS_MAX]]
                self._send(claim.name, route, Runs(part, self.sealer.opens_used))

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._own_context is not None:
            self._own_context.destroy(linger=0)
            self._own_context = None

    @property
    def context(self) -> zmq.Context[Any]:
        """Where the sockets of the service thread are made."""
        if self._context is None:
            self._context = self._own_context = zmq.Context()
        return self._context

    def _bind(self) -> None:
        socket = self.context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0  # bounded by the ring: no region is told of twice
        socket.router_mandatory = True
        socket.maxmsgsize = 1 << 20
        socket.bind(f"ipc://{self.sealer.ring.path.with_suffix('.sock')}")
        self._socket = socket

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(parts[0], decode_from_consumer(parts[-1]))
            except WireError as e:
                self._log.warning("ring.message_refused", reason=str(e))

    def _on_message(self, route: bytes, message: Any) -> None:
        with self._gate.condition:
            if not isinstance(message, Subscribe):
                self._claims.release(route, message.position)
                return
            claim = self._claims.subscribe(
                message.consumer, message.topics, route, self.sealer.released, self._walk
            )
            claim.has_file = self._has_file(claim.name)
            begin = RingBegin(begin=claim.released, opens_bytes=self.sealer.opens_used)
        self._log.debug("consumer.connected", consumer=message.consumer)
        self._send(message.consumer, route, begin)

    def _walk(self, begin: int) -> Iterable[tuple[int, int, int, Sequence[str]]]:
        ring = self.sealer.ring
        topics = {account.stream: account.info.topics for account in self.sealer.accounts}
        for position, frame in walk(ring.buffer, ring.layout, begin, self.sealer.head):
            if frame is not None:  # what is damaged is missed by who takes the next frame of its stream
                yield position, len(frame.raw), frame.stream, topics.get(frame.stream, ())

    def _has_file(self, name: str) -> bool:
        path = self.sealer.ring.path
        return claim_path(path.parent, path.stem, name).exists()

    def _send(self, consumer: str, route: bytes, message: RingBegin | Runs) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send_multipart([route, encode_control(message)], zmq.NOBLOCK)
        except zmq.ZMQError as e:
            # Its process is gone; its claim stays until it comes back or is withdrawn.
            self._log.debug("consumer.disconnected", consumer=consumer, reason=str(e))
            with self._gate.condition:
                self._claims.disconnect(route)

    def _check_claims(self) -> None:
        with self._gate.condition:
            ended = self._claims.withdraw(self._has_file)
        for name in ended:
            self._log.warning("claim.withdrawn", consumer=name)

    def _advance(self) -> None:
        floor = self._claims.floor(self.sealer.head)
        if floor > self.sealer.released:
            self._release(floor)
            self._gate.condition.notify_all()

    def _seal_due(self, now: int) -> int | None:
        """Seal the slots that are due; return when to look again, None when the next put will tell.

        Messages are sealed at once while nothing is in flight. So is the first row of a table after a quiet
        moment; the next ones follow the linger time after it: a steady trickle of rows then costs twenty
        wake-ups a second of all that are behind, not one for each row.
        """
        sealer = self.sealer
        has_peer = self._claims.is_anyone_there
        is_idle = has_peer and sealer.released >= sealer.head
        due: int | None = None
        for slot in sealer.slots:
            if slot.account is None or not slot.account.unsealed()[0]:
                continue
            words = slot.words
            if not words[W_T_PUT]:
                words[W_T_FIRST], words[W_T_PUT] = utc_ns(), now
            at = words[W_T_PUT] + self._linger_ns
            is_table = words[W_FORM] != FORM_RAW
            if has_peer and is_table:
                at = min(at, self._sealed_ns + self._linger_ns)
            elif is_idle:
                at = now
            if at <= now and sealer.seal(slot):
                if is_table:
                    self._sealed_ns = now
                continue
            at = max(at, now + self._linger_ns // 2) if at <= now else at
            due = at if due is None else min(due, at)
        if not self._claims.claims:
            self._advance()
        if due is None and has_peer and (self._sealed_ns == now or sealer.released < sealer.head):
            due = now + self._linger_ns
        return due

    def _on_publish(self, account: Account, position: int, length: int, rows: int) -> None:
        self._queued.append((position + length, rows))
        self.queued_rows += rows
        self._claims.on_publish(account.stream, account.info.topics, position, length)
        if self.observe is not None:
            self.observe(account, position, length)
        if not self._claims.claims:
            self._release(position + length)

    def _release(self, position: int) -> None:
        self.sealer.release(position)
        while self._queued and self._queued[0][0] <= position:
            self.queued_rows -= self._queued.popleft()[1]
