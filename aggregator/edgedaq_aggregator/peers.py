"""The uplinks that are connected: how their sessions begin and end, and what they are sent.

Nothing waits for a peer. What one does not take at once is kept for it, within a bound (an ACK or PONG is
not: a newer one follows); one that takes nothing for long loses its session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import ConfigError, WireError
from edgedaq.frame import MAX_FRAME_BYTES
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.session_messages import (
    PROTOCOL_VERSION,
    Bye,
    FromIntake,
    Hello,
    Ping,
    Pong,
    Reject,
    Report,
    Resend,
    Welcome,
    decode_from_uplink,
    encode_message,
)
from edgedaq.transport import MAX_PART_BYTES, SILENCE_LIMIT_S

from edgedaq_aggregator.nodes import NODES_MAX, NodeCounts
from edgedaq_aggregator.router import Router
from edgedaq_aggregator.sessions import Check, IntakeLane, Session, Sessions, check_hello

__all__ = ["Peers"]

_SILENCE_NS = int(SILENCE_LIMIT_S * 1e9)
_OUTBOX_MAX = 64


class Peers:
    """All sessions of one intake, and what is counted of their nodes. Used by one thread.

    Args:
        take_report: Called with the report of a node.
    """

    def __init__(
        self,
        router: Router,
        *,
        version: str,
        window_bytes: int,
        take_report: Callable[[dict[str, Any]], object],
    ) -> None:
        self.sessions = Sessions()
        self.nodes: dict[str, NodeCounts] = {}
        self._router = router
        self._version = version
        self._window_bytes = window_bytes
        self._take_report = take_report
        self._rejected = LogLimit()
        self._log = get_logger()

    def take(self, peer: bytes, raw: bytes) -> None:
        """Act on a control message."""
        now_ns = mono_ns()
        session = self.sessions.by_peer.get(peer)
        try:
            message = decode_from_uplink(raw)
        except WireError as e:
            if session is not None:
                self.end(session, "protocol", str(e))
            return
        if isinstance(message, Hello):
            self._greet(peer, message, now_ns)
            return
        if session is None:
            self._router.turn_away(peer)
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
            case Bye():
                self._log.info("session.ended", node=session.node, reason=f"{message.code}: {message.text}")
                self._forget(session)

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
            self._log.warning("session.ended", node=session.node, reason="it takes no messages")
            self._forget(session)
        return False

    def send_ack(self, session: Session, lane: IntakeLane) -> None:
        """Tell a session what it may know and do now, if that is news and it takes it."""
        ack = lane.owed_ack()
        if ack is not None and not session.outbox and self.send(session, ack, keep=False):
            lane.ack_sent()

    def tick(self, now_ns: int) -> None:
        """End sessions that are silent, and send the others what they are owed."""
        for session in self.sessions.silent(now_ns, _SILENCE_NS):
            reason = f"nothing was heard for {SILENCE_LIMIT_S:g} s"
            self._log.warning("session.ended", node=session.node, reason=reason)
            self._forget(session)
        for session in list(self.sessions.by_peer.values()):
            while session.outbox and self._send(session, session.outbox[0]):
                session.outbox.popleft()
            for lane in session.lanes:
                self.send_ack(session, lane)

    def end(self, session: Session, code: str, text: str) -> None:
        """End a session, and say why."""
        self._log.warning("session.ended", node=session.node, reason=f"{code}: {text}")
        self._router.send_once(session.peer, encode_message(Bye(code=code, text=text[:1000])))
        self._forget(session)

    def say_goodbye(self) -> None:
        """Tell all that the intake ends."""
        goodbye = encode_message(Bye(code="stopped", text="the intake ends"))
        for session in list(self.sessions.by_peer.values()):
            self._router.send_once(session.peer, goodbye)

    def _greet(self, peer: bytes, hello: Hello, now_ns: int) -> None:
        known = self.sessions.by_peer.get(peer)
        if known is not None:
            self.end(known, "protocol", "a second HELLO in one session")
            return
        reject = self._reject(hello)
        if reject is not None:
            count = self._rejected.note(now_ns)
            if count:
                self._log.warning("session.rejected", node=hello.node, count=count, reason=reject.text)
            self._router.send_once(peer, encode_message(reject))
            return
        lanes = [IntakeLane(number, self._window_bytes) for number in range(len(hello.lanes))]
        session = Session(peer, hello.node, hello.instance, hello.boot, hello.version, lanes, now_ns, now_ns)
        older = self.sessions.begin(session)
        if older is not None:
            self._displace(older, session, now_ns)
        node = self.nodes.setdefault(session.node, NodeCounts())
        node.is_connected = True
        node.last_active_ns = utc_ns()
        self._log.info("session.begun", node=session.node, version=session.version)
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            version=self._version,
            credit=self._window_bytes,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_part_bytes=MAX_PART_BYTES,
            t_utc_ns=utc_ns(),
        )
        self.send(session, welcome)

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
        if self.sessions.is_cloned(older, newer, now_ns):
            reason = "two agents use this name and displace each other"
            self._log.error("node.cloned", node=newer.node, reason=reason)

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
                self._log.info("session.ended", node=session.node, reason=str(e))
                self._forget(session)
            return True

    def _forget(self, session: Session) -> None:
        self.sessions.end(session)
        if session.node not in self.sessions.by_node:
            self.nodes[session.node].is_connected = False
