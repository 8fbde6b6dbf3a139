"""What the intake does, one step of its poll loop after the other: the I/O around ``judging`` and ``sessions``.

::

    ROUTER ── parts ──► judge ── accepted ──► Journal ── durable ──► ACK of the sessions whose parts are before it
                          │
                          └── problem ──► told to the uplink, which goes back

Nothing here waits for a peer: what one does not take at once is sent again later (an ACK: the newest), and one that
takes nothing for long loses its session. When the journal has no room the sessions stand still, without credit, and
are asked to send again once there is.

All of it is used by one thread; ``report`` may be read by another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.frame import MAX_FRAME_BYTES
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.segments import LogError
from edgedaq.session_messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Reject,
    Report,
    Resend,
    Welcome,
    decode_from_uplink,
    encode_message,
)
from edgedaq.transport import (
    FLAG_REPLAY,
    MAX_PART_BYTES,
    SILENCE_LIMIT_S,
    WINDOW_BYTES,
    set_router_options,
    unpack_data_header,
)

from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.judging import Judged, StreamOwners, judge_part
from edgedaq_aggregator.nodes import NODES_MAX, NodeCounts
from edgedaq_aggregator.sessions import IntakeLane, Session, Sessions, Take, check_hello

__all__ = ["Reception"]

_MESSAGES_PER_STEP = 64
_TICK_NS = 200_000_000
_REPORT_NS = 500_000_000
_SILENCE_NS = int(SILENCE_LIMIT_S * 1e9)
_OUTBOX_MAX = 64
_STRANGERS_MAX = 256
_LEDGER_MAX = 2000
_ENDED_MAX = 256
_STOP_WITHIN_NS = 1_500_000_000


class Reception:
    """The listening socket and all sessions of one aggregator.

    Args:
        journal: Outlives it.
        take_report: Called with the report of a node.
        take_rows: Called with how many rows and bytes were accepted.

    Must be closed.

    Raises:
        StoreError: The address cannot be listened on, e.g. because another process does.
    """

    def __init__(
        self,
        address: str,
        journal: Journal,
        *,
        version: str,
        bad: BadFiles,
        context: zmq.Context[Any],
        take_report: Callable[[dict[str, Any]], object],
        take_rows: Callable[[int, int], object],
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._address = address
        self._journal = journal
        self._version = version
        self._bad = bad
        self._take_report = take_report
        self._take_rows = take_rows
        self._window_bytes = window_bytes
        self._log = get_logger()
        self._owners = StreamOwners(journal.table)
        self._sessions = Sessions()
        self._nodes: dict[str, NodeCounts] = {}
        self._strangers: deque[bytes] = deque(maxlen=_STRANGERS_MAX)
        self._touched: set[bytes] = set()
        self._durable = -1
        self._journal_end = 0
        self._is_full = False
        self._damaged, self._incomplete = LogLimit(), LogLimit()
        self._next_tick_ns = self._next_report_ns = 0
        self._report: dict[str, Any] = {}
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        set_router_options(self._socket, address)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as e:
            self._socket.close(0)
            text = "another process listens there" if e.errno == zmq.EADDRINUSE else str(e)
            message = f"{address} cannot be listened on: {text}"
            raise StoreError(message) from e
        self._poller = zmq.Poller()
        for item in (self._socket, *journal.pollables()):
            self._poller.register(item, zmq.POLLIN)

    def close(self) -> None:
        """Close the socket; safe to call again."""
        self._socket.close(0)

    def run(self, is_stopping: Callable[[], bool], stop_fd: int) -> None:
        """Receive until asked to stop, and then until what was received is durable and acknowledged."""
        self._poller.register(stop_fd, zmq.POLLIN)
        due_ns = 0
        while not is_stopping():
            self._poller.poll(max(min(due_ns, self._next_tick_ns) - mono_ns() + 999_999, 0) // 1_000_000)
            due_ns = self.step()
        self._poller.unregister(stop_fd)
        self._stop()
        self._report = self._make_report(mono_ns())

    def step(self) -> int:
        """Do everything that can be done now; return when to do so again at the latest (monotonic ns)."""
        self._receive()
        now_ns = mono_ns()
        due_ns = self._journal.service(now_ns)
        self._acknowledge(now_ns)
        if now_ns >= self._next_tick_ns:
            self._next_tick_ns = now_ns + _TICK_NS
            self._tick(now_ns)
        return due_ns

    def report(self) -> dict[str, Any]:
        """Return the intake's own statistics, at most half a second old. From any thread."""
        return self._report

    def _receive(self) -> None:
        socket = self._socket
        for _ in range(_MESSAGES_PER_STEP):
            try:
                peer = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            first = socket.recv() if socket.getsockopt(zmq.RCVMORE) else b""
            if not socket.getsockopt(zmq.RCVMORE):
                self._take_control(peer, first)
                continue
            part = socket.recv(copy=False)
            if part.more:
                while socket.getsockopt(zmq.RCVMORE):
                    socket.recv()
                self._end(self._sessions.by_peer.get(peer), "protocol", "a message of more than two parts")
                continue
            self._take_data(peer, first, part.buffer)

    def _take_control(self, peer: bytes, raw: bytes) -> None:
        now_ns = mono_ns()
        session = self._sessions.by_peer.get(peer)
        try:
            message = decode_from_uplink(raw)
        except WireError as e:
            if session is not None:
                self._end(session, "protocol", str(e))
            return
        if isinstance(message, Hello):
            self._greet(peer, message, now_ns)
            return
        if session is None:
            self._turn_away(peer)
            return
        session.heard_ns = now_ns
        match message:
            case Ping():
                received_ns = utc_ns()
                node = self._nodes[session.node]
                node.last_active_ns = received_ns
                node.offset_ns, node.error_ns = message.offset_ns, message.error_ns
                pong = Pong(
                    t_mono_ns=message.t_mono_ns,
                    t_utc_ns=message.t_utc_ns,
                    received_utc_ns=received_ns,
                    sent_utc_ns=utc_ns(),
                )
                self._send(session, encode_message(pong), keep=False)
            case Report():
                if message.report.get("node") == session.node:
                    self._take_report(message.report)
                else:
                    self._log.warning("report.rejected", node=session.node, reason="it names another node")
            case Bye():
                self._log.info("session.ended", node=session.node, reason=f"{message.code}: {message.text}")
                self._forget(session)

    def _greet(self, peer: bytes, hello: Hello, now_ns: int) -> None:
        reject = check_hello(hello, self._sessions)
        if reject is None and len(self._nodes) >= NODES_MAX and hello.node not in self._nodes:
            reject = Reject(code="full", text=f"{NODES_MAX} nodes are known", retry_after_s=30.0)
        try:
            check_name("node", hello.node)
        except ConfigError as e:
            reject = Reject(code="node", text=str(e), retry_after_s=30.0)
        if reject is not None:
            self._log.warning("session.rejected", node=hello.node, reason=reject.text)
            self._send_to(peer, encode_message(reject))
            return
        lanes = [IntakeLane(number, self._window_bytes) for number in range(len(hello.lanes))]
        session = Session(peer, hello.node, hello.instance, hello.boot, hello.version, lanes, now_ns, now_ns)
        older = self._sessions.begin(session)
        if older is not None:
            self._displace(older, session, now_ns)
        node = self._nodes.setdefault(session.node, NodeCounts())
        node.is_connected = True
        node.last_active_ns = utc_ns()
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            version=self._version,
            credit=self._window_bytes,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_part_bytes=MAX_PART_BYTES,
            t_utc_ns=utc_ns(),
        )
        self._log.info("session.begun", node=session.node, version=session.version)
        self._send(session, encode_message(welcome))

    def _displace(self, older: Session, newer: Session, now_ns: int) -> None:
        if older.peer != newer.peer:
            text = "a newer session of the same node took its place"
            self._send_to(older.peer, encode_message(Bye(code="displaced", text=text)))
        if self._sessions.is_cloned(older, newer, now_ns):
            self._log.error(
                "node.cloned", node=newer.node, reason="two agents use this name and displace each other"
            )

    def _take_data(self, peer: bytes, head: bytes, part: memoryview) -> None:
        session = self._sessions.by_peer.get(peer)
        if session is None:
            self._turn_away(peer)
            return
        session.heard_ns = mono_ns()
        try:
            header = unpack_data_header(head)
        except WireError as e:
            self._end(session, "damaged", str(e))
            return
        if header.lane >= len(session.lanes):
            self._end(session, "protocol", f"lane {header.lane} was never opened")
            return
        lane = session.lanes[header.lane]
        take = lane.take(header)
        if take is Take.VIOLATION:
            text = f"a part of {header.part_bytes} bytes at {header.position}, expected {lane.taken}"
            self._end(session, "protocol", f"{text}, credit {lane.credit}")
            return
        if take is Take.IGNORE:
            return
        if self._is_full or not self._journal.would_fit(len(part) + (len(part) >> 1)):
            self._stand_still_for_room(lane)
            return
        judged = judge_part(self._journal.table, self._owners, session.node, header, part)
        if not self._keep(session, judged):
            self._stand_still_for_room(lane)
            return
        self._touched.add(peer)
        if judged.problem is not None:
            self._tell_problem(session, lane, judged)
            return
        samples = [] if header.flags & FLAG_REPLAY else judged.samples
        self._journal_end = max(self._journal_end, self._journal.end)
        lane.keep(header.part_bytes, self._journal_end, samples)

    def _keep(self, session: Session, judged: Judged) -> bool:
        """Journal what was accepted; False when the journal did not take all of it."""
        node = self._nodes[session.node]
        node.last_active_ns = utc_ns()
        try:
            if judged.accepted:
                self._journal.append(judged.accepted)
        except LogError as e:
            kept = Judged.of(judged.accepted[: e.kept], judged.duplicate_count)
            node.add(kept)
            self._take_rows(kept.rows, kept.body_bytes)
            self._log.error("journal.blocked", reason=str(e))
            return False
        except WireError as e:  # it is in the journal all the same; judging should have found this
            self._log.error("frame.doubted", node=session.node, reason=str(e))
        node.add(judged)
        self._take_rows(judged.rows, judged.body_bytes)
        return True

    def _stand_still_for_room(self, lane: IntakeLane) -> None:
        lane.stand_still(for_room=True)
        if not self._is_full:
            self._is_full = True
            self._log.error("journal.blocked", reason=self._journal_problem())

    def _tell_problem(self, session: Session, lane: IntakeLane, judged: Judged) -> None:
        problem = judged.problem
        assert problem is not None  # noqa: S101  # the caller looked
        node = self._nodes[session.node]
        lane.stand_still()
        if isinstance(problem, Refused):
            node.refused_count += 1
            if judged.culprit is not None:
                reason = f"{session.node}: {problem.code}: {problem.text}"
                self._bad.add(problem.stream, problem.seq, reason, judged.culprit)
        elif isinstance(problem, Resend):
            node.resend_count += 1
            count = self._damaged.note(mono_ns())
            if count:
                self._log.warning("part.damaged", node=session.node, count=count, reason=problem.text)
        else:
            count = self._incomplete.note(mono_ns())
            if count:
                name, stream = type(problem).__name__, f"{problem.stream:016x}"
                self._log.warning(
                    "stream.incomplete", node=session.node, count=count, problem=name, stream=stream
                )
        self._send(session, encode_message(problem))

    def _acknowledge(self, now_ns: int) -> None:
        """Tell sessions what has become durable, and their credit."""
        durable = self._journal.durable
        if durable != self._durable:
            peers = list(self._sessions.by_peer)
        elif self._touched:
            peers = list(self._touched)
        else:
            return
        self._durable = durable
        self._touched.clear()
        t_utc_ns = utc_ns()
        for peer in peers:
            session = self._sessions.by_peer.get(peer)
            if session is None:
                continue
            for lane in session.lanes:
                samples = lane.durable(durable)
                if samples:
                    self._nodes[session.node].add_latencies(samples, t_utc_ns, now_ns)
                self._send_ack(session, lane)

    def _send_ack(self, session: Session, lane: IntakeLane) -> None:
        ack: Ack | None = lane.owed_ack()
        if ack is None:
            return
        if session.outbox:
            self._touched.add(session.peer)
        elif self._send(session, encode_message(ack), keep=False):
            lane.ack_sent()

    def _tick(self, now_ns: int) -> None:
        for session in self._sessions.silent(now_ns, _SILENCE_NS):
            self._log.warning(
                "session.ended", node=session.node, reason=f"nothing was heard for {SILENCE_LIMIT_S:g} s"
            )
            self._forget(session)
        for session in list(self._sessions.by_peer.values()):
            while session.outbox and self._send_to(session.peer, session.outbox[0]):
                session.outbox.popleft()
            for lane in session.lanes:
                self._send_ack(session, lane)
        if self._is_full and self._journal.would_fit(2 * MAX_PART_BYTES):
            self._go_on()
        if now_ns >= self._next_report_ns:
            self._next_report_ns = now_ns + _REPORT_NS
            self._owners.forget_expired(self._journal.table)
            self._report = self._make_report(now_ns)

    def _go_on(self) -> None:
        self._is_full = False
        self._log.info("journal.resumed")
        for session in list(self._sessions.by_peer.values()):
            for lane in session.lanes:
                if lane.waits_for_room:
                    text = "the journal has room again"
                    message = Resend(lane=lane.number, position=lane.taken, text=text)
                    self._send(session, encode_message(message))

    def _send(self, session: Session, raw: bytes, *, keep: bool = True) -> bool:
        """Send to a session; what it does not take now goes to its outbox if it is to be kept."""
        if session.outbox and keep:
            session.outbox.append(raw)
        elif not self._send_to(session.peer, raw):
            if keep:
                session.outbox.append(raw)
            return False
        if len(session.outbox) > _OUTBOX_MAX:
            self._log.warning("session.ended", node=session.node, reason="it takes no messages")
            self._forget(session)
        return True

    def _send_to(self, peer: bytes, raw: bytes) -> bool:
        """Send; False when the peer takes nothing now. One that is gone loses its session."""
        try:
            self._socket.send_multipart([peer, raw], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            session = self._sessions.by_peer.get(peer)
            if session is not None:
                self._log.info("session.ended", node=session.node, reason="the connection was cut")
                self._forget(session)
        return True

    def _turn_away(self, peer: bytes) -> None:
        """Tell one that has no session so, once."""
        if peer not in self._strangers:
            self._strangers.append(peer)
            self._send_to(peer, encode_message(Bye(code="no_session", text="say HELLO first")))

    def _end(self, session: Session | None, code: str, text: str) -> None:
        if session is None:
            return
        self._log.warning("session.ended", node=session.node, reason=f"{code}: {text}")
        self._send_to(session.peer, encode_message(Bye(code=code, text=text[:1000])))
        self._forget(session)

    def _forget(self, session: Session) -> None:
        self._sessions.end(session)
        if session.node not in self._sessions.by_node and session.node in self._nodes:
            self._nodes[session.node].is_connected = False

    def _stop(self) -> None:
        limit_ns = mono_ns() + _STOP_WITHIN_NS
        while mono_ns() < limit_ns and self._journal.durable < self._journal_end:
            self._poller.poll(50)
            now_ns = mono_ns()
            self._journal.service(now_ns)
            self._acknowledge(now_ns)
        for session in list(self._sessions.by_peer.values()):
            self._send_to(session.peer, encode_message(Bye(code="stopped", text="the intake ends")))
        self._socket.close(200)

    def _journal_problem(self) -> str:
        error = self._journal.error
        if error is not None:
            return str(error)
        return "the journal has no room" if self._is_full else ""

    def _make_report(self, now_ns: int) -> dict[str, Any]:
        journal = self._journal
        ledger = {}
        ended = list(journal.table.tombstones.items())[-_ENDED_MAX:]
        for stream, state in [*ended, *list(journal.table.streams.items())[-_LEDGER_MAX:]]:
            facts = self._owners.facts.get(stream)
            if facts is not None:
                ledger[f"{stream:016x}"] = [
                    facts.node,
                    facts.job,
                    state.next_seq,
                    state.rows,
                    state.gap_rows,
                    state.gaps_unknown,
                    state.closed,
                    list(facts.stores),
                ]
        return {
            "listen": self._address,
            "nodes": {name: node.to_map(now_ns) for name, node in self._nodes.items()},
            "journal": {
                "begin": journal.begin,
                "end": journal.end,
                "durable": journal.durable,
                "used_bytes": journal.used_bytes,
                "disk_bytes": journal.disk_bytes,
                "stores": journal.stores,
                "problem": self._journal_problem(),
            },
            "streams": ledger,
            "set_aside": self._bad.count,
        }
