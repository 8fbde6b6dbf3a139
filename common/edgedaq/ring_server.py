"""The producer's answer to its consumers: the socket of a ring, and when its open frames are sealed.

``service`` is called by one thread, the service thread; ``on_publish`` by whoever seals, with the lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from edgedaq.claim_files import ClaimFile, claim_path, read_wants
from edgedaq.claims import Account as SeqsAndRows
from edgedaq.claims import Claims
from edgedaq.clock import utc_ns
from edgedaq.errors import WireError
from edgedaq.followers import Copies, Followers
from edgedaq.frame import Kind
from edgedaq.gate import Gate
from edgedaq.logsetup import get_logger
from edgedaq.ring import ProducedRing
from edgedaq.ring_control import CopiesTold, RingBegin, Runs, Subscribe, decode_from_consumer, encode_control
from edgedaq.ring_frames import walk
from edgedaq.ring_layout import FORM_RAW, W_FORM, W_T_FIRST, W_T_PUT
from edgedaq.sealing import Account, Sealer

__all__ = ["RingServer"]

_RUNS_MAX = 1000
_COPIED_BYTES = 16 << 10  # smaller messages are copied by zmq, which costs less than sharing them
_CLAIMS_EVERY_NS = 1_000_000_000
_BLOCKED_TOLD_S = 1.0


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
        self._followers = Followers(self.sealer.data)
        for consumer, wants in read_wants(ring.path.parent).items():
            if wants.policy == "wait":
                ClaimFile(ring.path.parent, identity.life, consumer).close()
                self._claims.add(consumer, wants.topics)
            else:
                self._followers.add(consumer, wants.topics, wants.policy, wants.limit_bytes)
        self._claims_due_ns = self._sealed_ns = 0
        self._is_blocked_told = False
        self._socket: zmq.Socket[bytes] | None = None
        self.observe: Callable[[Account, int, int], None] | None = None
        self._queued: deque[tuple[int, int]] = deque()
        self.queued_rows = 0
        self._log = get_logger(job=identity.job, life=identity.life)

    @property
    def has_claims(self) -> bool:
        """Some consumer holds the ring, connected or not."""
        return bool(self._claims.claims)

    @property
    def held_by(self) -> str:
        """Name of the consumer that holds the ring's oldest frames; empty if none does."""
        with self._gate.condition:
            holder = self._claims.holder(self.sealer.head)
        if holder is None:
            return ""
        return holder.name if holder.route is not None else f"{holder.name} (away)"

    def consumers(self) -> list[dict[str, Any]]:
        """Return what is known of each consumer, as plain data."""
        with self._gate.condition:
            head = self.sealer.head
            found: list[dict[str, Any]] = [
                {
                    "consumer": claim.name,
                    "policy": "wait",
                    "is_connected": claim.route is not None,
                    "waiting_bytes": head - claim.floor(head),
                }
                for claim in self._claims.claims.values()
            ]
            found += [
                {
                    "consumer": follower.name,
                    "policy": follower.policy,
                    "is_connected": follower.route is not None,
                    "waiting_bytes": follower.waiting_bytes + follower.in_flight_bytes,
                    "dropped_count": follower.dropped_rows,
                }
                for follower in self._followers.held.values()
            ]
        return found

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
            self._name_who_blocks()
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
            copied = self._followers.take()
        for claim, route, runs in pending:
            for at in range(0, len(runs), _RUNS_MAX):
                part = [(run[0], run[1], run[2]) for run in runs[at : at + _RUNS_MAX]]
                self._send(claim.name, route, [encode_control(Runs(part, self.sealer.opens_used))])
        for follower, route, copies in copied:
            self._send(follower.name, route, self._message_of(copies))

    def _message_of(self, copies: Copies) -> list[bytes]:
        told = CopiesTold(copies.end, len(copies.frames), self.sealer.opens_used)
        return [encode_control(told), b"".join(copies.parts)]

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
                if not self._followers.release(route, message.position):
                    self._claims.release(route, message.position)
                return
            begin = self._follow(route, message) if message.policy != "wait" else self._claim(route, message)
        self._log.debug("consumer.connected", consumer=message.consumer, policy=message.policy)
        self._send(message.consumer, route, [encode_control(begin)])

    def _claim(self, route: bytes, message: Subscribe) -> RingBegin:
        name = message.consumer
        firsts: SeqsAndRows = {}
        claim = self._claims.subscribe(
            name, message.topics, route, self.sealer.released, lambda begin: self._walk(begin, firsts)
        )
        claim.has_file = self._has_file(name)
        account = self._claims.withdrawn.pop(name, None)
        if name in self._followers.held:
            account = self._followers.held[name].had
            self._followers.forget(name)
        return self._begin(claim.released, self._account(firsts) if account is None else account)

    def _follow(self, route: bytes, message: Subscribe) -> RingBegin:
        name, released = message.consumer, self.sealer.released
        is_new = name not in self._followers.held
        follower = self._followers.add(name, message.topics, message.policy, message.limit_bytes)
        former = self._claims.claims.get(name)
        if former is not None and not former.is_lasting:
            del self._claims.claims[name]
        if is_new:
            firsts: SeqsAndRows = {}
            for position, length, stream, topics, rows in self._frames(released, firsts):
                self._followers.on_publish(stream, topics, position, length, rows, only=follower)
            account = self._claims.withdrawn.pop(name, None)
            follower.had = self._account(firsts) if account is None else account
        begin = self._followers.connect(follower, route)
        return self._begin(self.sealer.head if begin is None else begin, follower.had)

    def _begin(self, position: int, account: SeqsAndRows) -> RingBegin:
        return RingBegin(begin=position, opens_bytes=self.sealer.opens_used, next=account)

    def _account(self, firsts: SeqsAndRows) -> SeqsAndRows:
        """Return what comes next of each stream where ``firsts`` are the first frames, by stream."""
        return {account.stream: (account.next_seq, account.rows) for account in self.sealer.accounts} | firsts

    def _account_at(self, begin: int) -> SeqsAndRows:
        firsts: SeqsAndRows = {}
        for _ in self._walk(begin, firsts):
            pass
        return self._account(firsts)

    def _walk(self, begin: int, firsts: SeqsAndRows) -> Iterator[tuple[int, int, int, Sequence[str]]]:
        for position, length, stream, topics, _ in self._frames(begin, firsts):
            yield position, length, stream, topics

    def _frames(self, begin: int, firsts: SeqsAndRows) -> Iterator[tuple[int, int, int, Sequence[str], int]]:
        """Yield position, length, stream, topics, rows of what lies in the ring; note each stream's first."""
        ring = self.sealer.ring
        topics = {account.stream: account.info.topics for account in self.sealer.accounts}
        for position, frame in walk(ring.buffer, ring.layout, begin, self.sealer.head):
            if frame is not None:  # what is damaged is missed by who takes the next frame of its stream
                firsts.setdefault(
                    frame.stream, (1, 0) if frame.kind is Kind.OPEN else (frame.seq, frame.row0)
                )
                yield position, len(frame.raw), frame.stream, topics.get(frame.stream, ()), frame.rows

    def _has_file(self, name: str) -> bool:
        path = self.sealer.ring.path
        return claim_path(path.parent, path.stem, name).exists()

    def _send(self, consumer: str, route: bytes, parts: list[bytes]) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send_multipart([route, *parts], zmq.NOBLOCK, copy=len(parts[-1]) < _COPIED_BYTES)
        except zmq.ZMQError as e:
            # Its process is gone; its claim stays until it comes back or is withdrawn.
            self._log.debug("consumer.disconnected", consumer=consumer, reason=str(e))
            with self._gate.condition:
                self._claims.disconnect(route)
                self._followers.disconnect(route)

    def _check_claims(self) -> None:
        wanted = read_wants(self.sealer.ring.path.parent)
        with self._gate.condition:
            ended = self._claims.withdraw(self._has_file, self._account_at, self.sealer.head)
            for name, follower in list(self._followers.held.items()):
                if follower.route is None and name not in wanted:
                    self._claims.remember(name, follower.had)
                    self._followers.forget(name)
        for name in ended:
            self._log.warning("claim.withdrawn", consumer=name)

    def _name_who_blocks(self) -> None:
        """Say once who holds a put that has waited for a while."""
        blocked_s = self._gate.blocked_for_s
        if not blocked_s:
            self._is_blocked_told = False
        elif blocked_s > _BLOCKED_TOLD_S and not self._is_blocked_told:
            self._is_blocked_told = True
            self._log.warning("put.blocked", consumer=self.held_by, blocked_s=round(blocked_s, 1))

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
        has_peer = self._claims.is_anyone_there or self._followers.is_anyone_there
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
        if self._followers.held:
            self._followers.on_publish(account.stream, account.info.topics, position, length, rows)
        if self.observe is not None:
            self.observe(account, position, length)
        if not self._claims.claims:
            self._release(position + length)

    def _release(self, position: int) -> None:
        self.sealer.release(position)
        while self._queued and self._queued[0][0] <= position:
            self.queued_rows -= self._queued.popleft()[1]
