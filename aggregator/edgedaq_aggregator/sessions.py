"""One session as the intake keeps it, and all of them: positions, acknowledgements, credit. No I/O.

::

    acked ............ durable in the journal and told, or about to be told
          ............ in the journal, not durable: one ``Pending`` per part (session position → journal
          position)
    taken ............ the next part must begin here
          ............ may be sent, up to ``credit`` = acked + window

While something is wrong with the part at ``taken``, or the journal has no room, the session *stands still*:
parts that begin further on are ignored until one comes that begins at ``taken``.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgedaq.session_messages import PROTOCOL_VERSION as VERSION
from edgedaq.session_messages import Ack, Hello, Reject
from edgedaq.transport import DataHeader

from edgedaq_aggregator.router import Connection

__all__ = ["NODES_MAX", "Check", "IntakeLane", "Pending", "Session", "Sessions", "Take", "check_hello"]

NODES_MAX = 1024
"""Sessions at a time."""

_PENDING_MAX = 4096
_DISPLACED_LIMIT = 3
_DISPLACED_WITHIN_NS = 60_000_000_000


class Take(enum.Enum):
    """What to do with a part by its position."""

    JUDGE = "judge"
    IGNORE = "ignore"
    VIOLATION = "violation"


class Check(enum.Enum):
    """What a PING's position shows."""

    FINE = "fine"
    LOST = "lost"
    TELL_AGAIN = "tell again"


class Pending(NamedTuple):
    """A part that is durable when the journal is durable up to ``journal_end``."""

    journal_end: int
    position: int
    samples: list[tuple[str, int]]


@dataclass(slots=True)
class IntakeLane:
    """One lane of a session."""

    number: int
    window_bytes: int
    taken: int = 0
    acked: int = 0
    stands_still: bool = False
    waits_for_room: bool = False
    told: tuple[int, int] = (-1, -1)
    pending: deque[Pending] = field(default_factory=deque)
    doubted_at: int = -1
    problem_count: int = 0
    """Problems in a row at ``taken``."""

    @property
    def credit(self) -> int:
        """Position up to which may be sent."""
        return self.acked + self.window_bytes

    def take(self, header: DataHeader) -> Take:
        """Return what to do with a part. Parts of a lane come in order, without holes, within the credit."""
        if header.position == self.taken:
            if self.taken + header.part_bytes > self.credit:
                return Take.VIOLATION
            self.stands_still = self.waits_for_room = False
            return Take.JUDGE
        if header.position > self.taken and self.stands_still:
            return Take.IGNORE
        return Take.VIOLATION

    def keep(self, part_bytes: int, journal_end: int, samples: list[tuple[str, int]]) -> None:
        """Record that the part at ``taken`` is in the journal, which ends at ``journal_end``.

        Also a part of duplicates alone: what it repeats may not be durable yet.
        """
        self.taken += part_bytes
        self.problem_count = 0
        if len(self.pending) >= _PENDING_MAX:
            last = self.pending.pop()
            samples = [*last.samples, *samples]
        self.pending.append(Pending(journal_end, self.taken, samples))

    def check(self, sent: int) -> Check:
        """Compare with how far the peer says it had sent before, in the same connection.

        If these differ for good, the session would wait for ever.``TELL_AGAIN``: it still has not
        gone back to where this lane stands since the last time.
        """
        if sent == self.taken or self.waits_for_room:
            self.doubted_at = -1
            return Check.FINE
        if not self.stands_still:
            return Check.LOST
        if self.doubted_at == self.taken:
            return Check.TELL_AGAIN
        self.doubted_at = self.taken
        return Check.FINE

    def stand_still(self, *, for_room: bool = False) -> None:
        """Take nothing until a part begins at ``taken`` again."""
        self.stands_still = True
        self.waits_for_room = for_room

    def durable(self, journal_position: int) -> list[tuple[str, int]]:
        """Take that the journal is durable up to a position; return the samples of parts that became so."""
        samples: list[tuple[str, int]] = []
        while self.pending and self.pending[0].journal_end <= journal_position:
            done = self.pending.popleft()
            self.acked = done.position
            samples += done.samples
        return samples

    def owed_ack(self) -> Ack | None:
        """Return the ACK to send, None when all was told."""
        if self.told == (self.acked, self.credit):
            return None
        return Ack(lane=self.number, durable=self.acked, credit=self.credit)

    def ack_sent(self) -> None:
        """Record that ``owed_ack`` has left."""
        self.told = (self.acked, self.credit)


@dataclass(slots=True)
class Session:
    """One connection of an uplink."""

    peer: bytes
    node: str
    instance: str
    boot: str
    version: str
    lanes: list[IntakeLane]
    begun_ns: int
    heard_ns: int
    key: str = ""
    """What its connection was let in with; empty where there are no keys."""
    connection: Connection | None = None
    topics: tuple[str, ...] | None = None
    """What it may send; None: everything."""
    features: Sequence[str] = ()
    live_topics: Sequence[str] = ()
    """What was asked for of the node's live plane."""
    outbox: deque[bytes] = field(default_factory=deque)
    """Control messages that the peer did not take yet."""


class Sessions:
    """All sessions, at most one per node."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, Session] = {}
        self.by_node: dict[str, Session] = {}
        self._displaced: dict[str, deque[tuple[int, str]]] = {}

    def begin(self, session: Session) -> Session | None:
        """Add a session of a peer that has none; return the older one of the node, which it displaces."""
        older = self.by_node.get(session.node)
        if older is not None:
            del self.by_peer[older.peer]
        self.by_peer[session.peer] = self.by_node[session.node] = session
        return older

    def end(self, session: Session) -> None:
        """Remove a session."""
        if self.by_peer.get(session.peer) is session:
            del self.by_peer[session.peer]
        if self.by_node.get(session.node) is session:
            del self.by_node[session.node]

    def is_cloned(self, older: Session, newer: Session, now_ns: int) -> bool:
        """Tell, at a displacement, whether two processes keep displacing each other under one name."""
        if older.instance == newer.instance:
            return False
        seen = self._displaced.setdefault(newer.node, deque(maxlen=_DISPLACED_LIMIT))
        seen.append((now_ns, newer.instance))
        return len(seen) == _DISPLACED_LIMIT and (
            now_ns - seen[0][0] < _DISPLACED_WITHIN_NS and seen[0][1] == seen[2][1]
        )

    def silent(self, now_ns: int, limit_ns: int) -> list[Session]:
        """Return the sessions in which nothing was heard for the limit."""
        return [session for session in self.by_peer.values() if now_ns - session.heard_ns > limit_ns]


def check_hello(hello: Hello, sessions: Sessions) -> Reject | None:
    """Return why there can be no session, None when there can."""
    if not hello.protocol_min <= VERSION <= hello.protocol_max:
        text = (
            f"this aggregator speaks protocol {VERSION}, the uplink of version {hello.version} speaks "
            f"{hello.protocol_min} to {hello.protocol_max}: update the older side"
        )
        return Reject(code="protocol", text=text, retry_after_s=30.0)
    if len(sessions.by_node) >= NODES_MAX and hello.node not in sessions.by_node:
        return Reject(code="full", text=f"{NODES_MAX} nodes are connected", retry_after_s=10.0)
    return None
