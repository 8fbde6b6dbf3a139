"""The uplinks that are connected: how their sessions begin and end, and what they are sent.

With keys, a session is the key's: the gatekeeper says which node that is, and HELLO must say the same. A
message that comes by another connection than its session began with is nobody's.

Nothing waits for a peer. What one does not take at once is kept for it, within a bound (an ACK or PONG is
not: a newer one follows); one that takes nothing for long loses its session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import ConfigError, WireError
from edgedaq.frame import MAX_FRAME_BYTES
from edgedaq.log_limit import LogBudget, LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.session_messages import (
    PROTOCOL_VERSION,
    Bye,
    FromIntake,
    Hello,
    Join,
    Joined,
    Live,
    Lives,
    Ping,
    Pong,
    Reject,
    Report,
    Resend,
    Subscribe,
    Welcome,
    decode_from_uplink,
    encode_message,
)
from edgedaq.transport import MAX_PART_BYTES, SILENCE_LIMIT_S

from edgedaq_aggregator.gatekeeper import Gatekeeper
from edgedaq_aggregator.live_relay import LiveRelay
from edgedaq_aggregator.nodes import NODES_MAX, NodeCounts
from edgedaq_aggregator.refusals import GARBAGE, STRAY, Refusals
from edgedaq_aggregator.router import Received, Router
from edgedaq_aggregator.sessions import Check, IntakeLane, Session, Sessions, check_hello

__all__ = ["Peers"]

_SILENCE_NS = int(SILENCE_LIMIT_S * 1e9)
_OUTBOX_MAX = 64
_OTHERS_NAME = "another node's name"
_LINES_MAX = 100
"""About sessions that begin and end, per 10 s."""


class Peers:
    """All sessions of one intake, and what is counted of their nodes. Used by one thread.

    Args:
        gatekeeper: Knows the keys; None where sessions have none.
        take_report: Called with the report of a node.
        take_lives: Called with what a node says of the lives that it still has something of.
        live: Says what to ask of the nodes' live topics, and shows it.
        stores: Keys in ``store_config`` that there are stores for; None: unknown.
    """

    def __init__(
        self,
        router: Router,
        gatekeeper: Gatekeeper | None,
        refusals: Refusals,
        *,
        version: str,
        window_bytes: int,
        take_report: Callable[[dict[str, Any]], object],
        take_lives: Callable[[Session, Lives], object],
        live: LiveRelay | None = None,
        stores: Sequence[str] | None = None,
    ) -> None:
        self._live = live
        self._stores = stores
        self.sessions = Sessions()
        self.nodes: dict[str, NodeCounts] = {}
        self._router = router
        self._gatekeeper = gatekeeper
        self._refusals = refusals
        self._version = version
        self._window_bytes = window_bytes
        self._take_report = take_report
        self._take_lives = take_lives
        self._rejected, self._cloned = LogLimit(), LogLimit()
        self._budget = LogBudget(_LINES_MAX)
        self._log = get_logger()

    def session_of(self, received: Received) -> Session | None:
        """Return the session that a message belongs to."""
        session = self.sessions.by_peer.get(received.peer)
        return session if session is not None and session.key == received.key else None

    def take(self, received: Received) -> None:
        """Act on a control message."""
        now_ns = mono_ns()
        session = self.session_of(received)
        try:
            message = decode_from_uplink(received.head)
        except WireError as e:
            self.refuse(received, session, str(e))
            return
        if isinstance(message, Join):
            self._take_in(received, message, now_ns)
            return
        if isinstance(message, Hello):
            self._greet(received, message, now_ns)
            return
        if session is None:
            self.turn_away(received)
            return
        session.heard_ns = now_ns
        match message:
            case Ping():
                self._answer(session, message)
            case Report():
                if message.report.get("node") == session.node:
                    self._take_report(message.report)
                else:
                    self._log.warning("report.rejected", node=session.node, reason="it names another node")
            case Lives():
                self._take_lives(session, message)
            case Live():
                if self._live is not None:
                    self._live.show(session.node, message, session.topics)
            case Bye():
                self._say(
                    "info", "session.ended", node=session.node, reason=f"{message.code}: {message.text}"
                )
                self._forget(session)

    def refuse(self, received: Received, session: Session | None, text: str) -> None:
        """Refuse what no version of ours sends; who repeats that is cut off."""
        now_ns = mono_ns()
        node = "" if session is None else session.node
        if session is not None:
            self.end(session, "protocol", text)
        self._count(received, GARBAGE, now_ns, "not a message of ours", node, text)

    def turn_away(self, received: Received) -> None:
        """Refuse what comes outside of a session, as happens for a moment after its end."""
        self._router.turn_away(received.peer)
        self._count(received, STRAY, mono_ns(), "outside of a session", "", "")

    def send(self, session: Session, message: FromIntake, *, keep: bool = True) -> bool:
        """Send to a session; what it does not take now is kept for later, if it is to be."""
        raw = encode_message(message)
        if not session.outbox or not keep:
            if self._send(session, raw):
                return True
            if not keep:
                return False
        session.outbox.append(raw)
        if len(session.outbox) > _OUTBOX_MAX:
            self._say("warning", "session.ended", node=session.node, reason="it takes no messages")
            self._forget(session)
        return False

    def send_ack(self, session: Session, lane: IntakeLane) -> None:
        """Tell a session what it may know and do now, if that is news and it takes it."""
        ack = lane.owed_ack()
        if ack is not None and not session.outbox and self.send(session, ack, keep=False):
            lane.ack_sent()

    def tick(self, now_ns: int) -> None:
        """End sessions that are silent or not allowed any more, and send the others what they are owed."""
        self._router.tick(now_ns)
        self._end_revoked(now_ns)
        for session in self.sessions.silent(now_ns, _SILENCE_NS):
            reason = f"nothing was heard for {SILENCE_LIMIT_S:g} s"
            self._say("warning", "session.ended", node=session.node, reason=reason)
            self._forget(session)
        for session in list(self.sessions.by_peer.values()):
            while session.outbox and self._send(session, session.outbox[0]):
                session.outbox.popleft()
            for lane in session.lanes:
                self.send_ack(session, lane)
            self._ask_for_live(session)

    def _ask_for_live(self, session: Session) -> None:
        """Tell a session what somebody looks at of its node, if that has changed."""
        if self._live is None or "live" not in session.features:
            return
        topics = self._live.wanted(session.node)
        if topics != session.live_topics and self.send(session, Subscribe(topics=list(topics)), keep=False):
            session.live_topics = topics

    def end(self, session: Session, code: str, text: str) -> None:
        """End a session, and say why."""
        self._say("warning", "session.ended", node=session.node, reason=f"{code}: {text}")
        self._router.send_once(session.peer, encode_message(Bye(code=code, text=text[:1000])))
        self._forget(session)

    def say_goodbye(self) -> None:
        """Tell all that the intake ends."""
        goodbye = encode_message(Bye(code="stopped", text="the intake ends"))
        for session in list(self.sessions.by_peer.values()):
            self._router.send_once(session.peer, goodbye)

    def _end_revoked(self, now_ns: int) -> None:
        if self._gatekeeper is None:
            return
        self._gatekeeper.look(now_ns)
        for session in list(self.sessions.by_peer.values()):
            standing = self._gatekeeper.standing(session.key)
            if not standing.is_allowed or standing.node != session.node:
                reason = standing.reason or _OTHERS_NAME
                self._refusals.note(reason, now_ns, node=session.node, detail="its session is ended")
                self._router.cut_soon(session.connection, now_ns)
                self.end(session, "revoked", f"this node is not let in any more: {reason}")
            else:
                session.topics = standing.topics

    def _count(
        self, received: Received, weight: int, now_ns: int, reason: str, node: str, detail: str
    ) -> None:
        """Count what was refused, and cut off who has sent too much of that."""
        connection = received.connection()
        address = "" if connection is None else connection.address
        self._refusals.note(reason, now_ns, node=node, address=address, detail=detail)
        who = received.key or address or repr(received.peer)
        if not self._refusals.is_barred(who, now_ns) and self._refusals.strike(who, weight, now_ns):
            self._refusals.bar(who, now_ns, node=node, address=address, detail=detail)
            self._router.cut(connection)

    def _take_in(self, received: Received, join: Join, now_ns: int) -> None:
        """Answer one that has an invitation, or says so; its connection has no other use."""
        if self._gatekeeper is None:
            text = "this aggregator listens for its own machine alone and has no keys; see `listen`"
        else:
            text = self._gatekeeper.enrol(join.node, join.secret, received.key)
        connection = received.connection()
        address = "" if connection is None else connection.address
        if text:
            self._refusals.note("no such invitation", now_ns, node=join.node, address=address)
            self._router.send_once(received.peer, encode_message(Reject(code="token", text=text)))
        else:
            self._log.info("node.joined", node=join.node, address=address)
            self._router.send_once(received.peer, encode_message(Joined(node=join.node)))
        self._router.cut_soon(connection, now_ns)

    def _greet(self, received: Received, hello: Hello, now_ns: int) -> None:
        peer = received.peer
        known = self.sessions.by_peer.get(peer)
        if known is not None and known.key == received.key:
            self.refuse(received, known, "a second HELLO in one session")
            return
        if known is not None:  # its connection is gone, and somebody took its routing id
            self._forget(known)
        reject = self._not_allowed(received, hello, now_ns) or self._reject(hello)
        if reject is not None:
            count = self._rejected.note(now_ns)
            if count:
                self._log.warning("session.rejected", node=hello.node, count=count, reason=reject.text)
            self._router.send_once(peer, encode_message(reject))
            return
        lanes = [IntakeLane(number, self._window_bytes) for number in range(len(hello.lanes))]
        session = Session(
            peer,
            hello.node,
            hello.instance,
            hello.boot,
            hello.version,
            lanes,
            now_ns,
            now_ns,
            key=received.key,
            connection=received.connection(),
            features=hello.features,
        )
        if self._gatekeeper is not None:
            session.topics = self._gatekeeper.standing(session.key).topics
        older = self.sessions.begin(session)
        if older is not None:
            self._displace(older, session, now_ns)
        node = self.nodes.setdefault(session.node, NodeCounts())
        node.is_connected = True
        node.last_active_ns = utc_ns()
        self._say("info", "session.begun", node=session.node, version=session.version)
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            version=self._version,
            credit=self._window_bytes,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_part_bytes=MAX_PART_BYTES,
            t_utc_ns=utc_ns(),
            stores=None if self._stores is None else list(self._stores),
        )
        self.send(session, welcome)

    def _not_allowed(self, received: Received, hello: Hello, now_ns: int) -> Reject | None:
        """Return why a key may not have this session."""
        if self._gatekeeper is None:
            return None
        standing = self._gatekeeper.standing(received.key)
        if standing.is_allowed and standing.node == hello.node:
            return None
        if standing.is_allowed:
            text = f"the key is that of node {standing.node!r}, not of {hello.node!r}: see supervisor_id"
            reason = _OTHERS_NAME
        else:
            reason, text = standing.reason, f"this node is not let in: {standing.reason}"
        connection = received.connection()
        address = "" if connection is None else connection.address
        self._refusals.note(reason, now_ns, node=standing.node, address=address, detail=f"says {hello.node}")
        self._router.cut_soon(connection, now_ns)
        return Reject(code="key", text=text, retry_after_s=5.0)

    def _reject(self, hello: Hello) -> Reject | None:
        try:
            check_name("node", hello.node)
        except ConfigError as e:
            return Reject(code="node", text=str(e), retry_after_s=30.0)
        if len(self.nodes) >= NODES_MAX and hello.node not in self.nodes:
            self._forget_idle_nodes()
        if len(self.nodes) >= NODES_MAX and hello.node not in self.nodes:
            return Reject(code="full", text=f"{NODES_MAX} nodes are known", retry_after_s=30.0)
        return check_hello(hello, self.sessions)

    def _forget_idle_nodes(self) -> None:
        """Drop the names under which nothing ever came."""
        for name in [name for name, node in self.nodes.items() if node.is_idle]:
            del self.nodes[name]

    def _displace(self, older: Session, newer: Session, now_ns: int) -> None:
        text = "a newer session of the same node took its place"
        self._router.send_once(older.peer, encode_message(Bye(code="displaced", text=text)))
        self._router.cut_soon(older.connection, now_ns)
        if self.sessions.is_cloned(older, newer, now_ns):
            self.nodes[newer.node].cloned_ns = utc_ns()
            count = self._cloned.note(now_ns)
            if count:
                reason = "two agents are this node and displace each other: one is a copy"
                self._log.error("node.cloned", node=newer.node, count=count, reason=reason)

    def _answer(self, session: Session, ping: Ping) -> None:
        received_ns = utc_ns()
        node = self.nodes[session.node]
        node.last_active_ns = received_ns
        node.take_clock(ping)
        pong = Pong(
            t_mono_ns=ping.t_mono_ns,
            t_utc_ns=ping.t_utc_ns,
            received_utc_ns=received_ns,
            sent_utc_ns=utc_ns(),
        )
        self.send(session, pong, keep=False)
        for lane, sent in zip(session.lanes, ping.sent, strict=False):
            check = lane.check(sent)
            if check is Check.LOST:
                self.end(session, "protocol", f"sent up to {sent}, received up to {lane.taken}")
                return
            if check is Check.TELL_AGAIN:
                text = "waiting for it"
                self.send(session, Resend(lane=lane.number, position=lane.taken, text=text))

    def _send(self, session: Session, raw: bytes) -> bool:
        try:
            return self._router.send(session.peer, raw)
        except ConnectionError as e:
            if self.sessions.by_peer.get(session.peer) is session:
                self._say("info", "session.ended", node=session.node, reason=str(e))
                self._forget(session)
            return True

    def _say(self, level: str, event: str, **facts: str) -> None:
        """Log what others can make happen as often as they like."""
        may_say, unsaid = self._budget.take(mono_ns())
        if may_say:
            getattr(self._log, level)(event, **facts, **({"unsaid_count": unsaid} if unsaid else {}))

    def _forget(self, session: Session) -> None:
        self.sessions.end(session)
        if session.node not in self.sessions.by_node:
            self.nodes[session.node].is_connected = False
