"""What the intake does, one step of its poll loop after the other: the I/O around ``judging``.

::

    ROUTER ── parts ──► judge ── accepted ──► Journal ── durable ──► ACK of the parts that lie before it
                          │
                          └── problem ──► told to the uplink, which goes back

When the journal has no room the sessions stand still, without credit, and are asked to send again once there
is. What is said to the peers, and how their sessions begin and end, is in ``peers``.

All of it is used by one thread; ``report`` may be read by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import WireError
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.segments import LogError
from edgedaq.session_messages import Lives, Refused, Resend
from edgedaq.transport import FLAG_REPLAY, MAX_PART_BYTES, WINDOW_BYTES, unpack_data_header

from edgedaq_aggregator.gatekeeper import Gatekeeper
from edgedaq_aggregator.intake_report import (
    Unstored,
    journal_facts,
    note_fill,
    security_facts,
    stream_accounts,
)
from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.judging import Judged, Problem, StreamOwners, judge_part
from edgedaq_aggregator.lag import JournalFill
from edgedaq_aggregator.live_relay import LiveRelay
from edgedaq_aggregator.orphans import closing_frames
from edgedaq_aggregator.peers import Peers
from edgedaq_aggregator.refusals import Refusals
from edgedaq_aggregator.router import Received, Router
from edgedaq_aggregator.sessions import IntakeLane, Session, Take

__all__ = ["Reception"]

_MESSAGES_PER_STEP = 64
_TICK_NS = 200_000_000
_REPORT_NS = 500_000_000
_PATIENT_NS = 2_000_000_000
_STOP_WITHIN_NS = 1_500_000_000
_PROBLEMS_MAX = 50
"""At one position of a session; an uplink of ours gives up sooner."""


class Reception:
    """The listening socket and all sessions of one aggregator.

    Args:
        journal: Outlives it.
        gatekeeper: Lets nodes in by their keys, and outlives it; None: there are no keys.
        take_report: Called with the report of a node.
        take_rows: Called with how many rows and bytes were accepted.
        live: For the nodes' live topics; outlives it.
        stores: Keys in ``store_config`` that there are stores for; None: unknown.

    Must be closed.

    Raises:
        StoreError: The address cannot be listened on, e.g. because another process does.
    """

    def __init__(
        self,
        address: str,
        journal: Journal,
        refusals: Refusals,
        gatekeeper: Gatekeeper | None,
        *,
        version: str,
        bad: BadFiles,
        context: zmq.Context[Any],
        take_report: Callable[[dict[str, Any]], object],
        take_rows: Callable[[int, int], object],
        window_bytes: int = WINDOW_BYTES,
        live: LiveRelay | None = None,
        stores: Sequence[str] | None = None,
    ) -> None:
        self._unstored = Unstored(stores)
        self._address = address
        self._journal = journal
        self._bad = bad
        self._take_rows = take_rows
        self._log = get_logger()
        self._owners = StreamOwners(journal.table)
        self._fill = JournalFill()
        self._touched: set[bytes] = set()
        """Sessions that sent something since the last acknowledgements."""
        self._awaited: set[bytes] = set()
        """Sessions with parts in the journal that are not durable."""
        self._durable = -1
        self._journal_end = 0
        self._is_full = False
        self._need_bytes = self._full_ns = 0
        self._damaged, self._incomplete = LogLimit(), LogLimit()
        self._next_tick_ns = self._next_report_ns = 0
        self._report: dict[str, Any] = {}
        self._refusals, self._gatekeeper = refusals, gatekeeper
        self._router = Router(address, context, "" if gatekeeper is None else gatekeeper.keys.secret)
        self._peers = Peers(
            self._router,
            gatekeeper,
            refusals,
            version=version,
            window_bytes=window_bytes,
            take_report=take_report,
            take_lives=self._take_lives,
            live=live,
            stores=stores,
        )
        self._poller = zmq.Poller()
        for item in (self._router.socket, self._router.monitor, *journal.pollables()):
            self._poller.register(item, zmq.POLLIN)
        if gatekeeper is not None:
            self._poller.register(gatekeeper.socket, zmq.POLLIN)

    def close(self) -> None:
        """Close the socket; safe to call again."""
        self._router.close()

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
        if self._gatekeeper is not None:
            self._gatekeeper.service()
        for reason in self._router.failed_handshakes():
            self._refusals.note(reason, mono_ns())
        for received in self._router.receive(_MESSAGES_PER_STEP):
            if not received.is_sound:
                session = self._peers.session_of(received)
                self._peers.refuse(received, session, "a message of more than two parts")
            elif received.part is None:
                self._peers.take(received)
            else:
                self._take_data(received, received.part)

    def _take_data(self, received: Received, part: memoryview) -> None:
        session = self._peers.session_of(received)
        if session is None:
            self._peers.turn_away(received)
            return
        session.heard_ns = mono_ns()
        try:
            header = unpack_data_header(received.head)
        except WireError as e:
            self._peers.end(session, "damaged", str(e))
            return
        if header.lane >= len(session.lanes):
            self._peers.end(session, "protocol", f"lane {header.lane} was never opened")
            return
        lane = session.lanes[header.lane]
        take = lane.take(header)
        if take is Take.VIOLATION:
            text = f"a part of {header.part_bytes} bytes at {header.position}, expected {lane.taken}"
            self._peers.end(session, "protocol", f"{text}, credit {lane.credit}")
            return
        if take is Take.IGNORE:
            return
        need_bytes = len(part) + (len(part) >> 1)
        if self._is_full or not self._journal.would_fit(need_bytes):
            self._stand_still_for_room(lane, need_bytes)
            return
        judged = judge_part(
            self._journal.table, self._owners, session.node, header, part, topics=session.topics
        )
        if not self._keep(session, judged):
            self._stand_still_for_room(lane, need_bytes)
            return
        self._touched.add(session.peer)
        if judged.problem is not None:
            self._tell_problem(session, lane, judged.problem, judged.culprit)
            return
        samples = [] if header.flags & FLAG_REPLAY else judged.samples
        self._journal_end = max(self._journal_end, self._journal.end)
        lane.keep(header.part_bytes, self._journal_end, samples)

    def _keep(self, session: Session, judged: Judged) -> bool:
        """Journal what was accepted; False when the journal did not take all of it."""
        node = self._peers.nodes[session.node]
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
        self._unstored.note(judged.accepted, self._owners, self._log)
        return True

    def _take_lives(self, session: Session, message: Lives) -> None:
        """Close the streams that their node can say nothing more of."""
        table, owners = self._journal.table, self._owners
        frames = closing_frames(table, owners, session.node, set(message.lives), message.bound_s)
        if not frames or not self._journal.would_fit(sum(len(frame.raw) for frame in frames)):
            return  # it is said again
        if self._keep(session, Judged(accepted=frames)):
            for frame in frames:
                owners.closed(frame.stream)
            self._log.warning("stream.closed", node=session.node, count=len(frames), reason="tail unknown")

    def _stand_still_for_room(self, lane: IntakeLane, need_bytes: int) -> None:
        lane.stand_still(for_room=True)
        self._need_bytes = max(self._need_bytes, need_bytes)
        if not self._is_full:
            self._is_full = True
            self._full_ns = mono_ns()
            self._log.error("journal.blocked", reason=self._journal_problem())

    def _tell_problem(
        self, session: Session, lane: IntakeLane, problem: Problem, culprit: memoryview | None
    ) -> None:
        node = self._peers.nodes[session.node]
        lane.stand_still()
        lane.problem_count += 1
        if lane.problem_count > _PROBLEMS_MAX:
            self._peers.end(session, "stuck", f"{_PROBLEMS_MAX} problems in a row at {problem.position}")
            return
        if isinstance(problem, Refused):
            node.refused_count += 1
            if culprit is not None:
                reason = f"{session.node}: {problem.code}: {problem.text}"
                self._bad.add(problem.stream, problem.seq, reason, culprit)
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
        self._peers.send(session, problem)

    def _acknowledge(self, now_ns: int) -> None:
        """Tell sessions what has become durable, and their credit."""
        durable = self._journal.durable
        if durable != self._durable:
            self._touched |= self._awaited
        elif not self._touched:
            return
        self._durable = durable
        peers, self._touched = self._touched, set()
        t_utc_ns = utc_ns()
        for peer in peers:
            session = self._peers.sessions.by_peer.get(peer)
            if session is None:
                self._awaited.discard(peer)
                continue
            for lane in session.lanes:
                samples = lane.durable(durable)
                if samples:
                    self._peers.nodes[session.node].add_latencies(samples, t_utc_ns, now_ns)
                self._peers.send_ack(session, lane)
            if any(lane.pending for lane in session.lanes):
                self._awaited.add(peer)
            else:
                self._awaited.discard(peer)

    def _tick(self, now_ns: int) -> None:
        self._peers.tick(now_ns)
        if self._is_full and self._journal.would_fit(self._bytes_to_go_on(now_ns)):
            self._go_on()
        if now_ns >= self._next_report_ns:
            self._next_report_ns = now_ns + _REPORT_NS
            self._owners.forget_expired(self._journal.table)
            note_fill(self._journal, self._fill, self._log)
            self._report = self._make_report(now_ns)

    def _bytes_to_go_on(self, now_ns: int) -> int:
        """Return the room to wait for: some for more than one part, unless that does not come."""
        if now_ns - self._full_ns > _PATIENT_NS:
            return self._need_bytes
        return max(self._need_bytes, 2 * MAX_PART_BYTES)

    def _go_on(self) -> None:
        self._is_full = False
        self._need_bytes = 0
        self._log.info("journal.resumed")
        for session in list(self._peers.sessions.by_peer.values()):
            for lane in session.lanes:
                if lane.waits_for_room:
                    text = "the journal has room again"
                    message = Resend(lane=lane.number, position=lane.taken, text=text)
                    self._peers.send(session, message)

    def _stop(self) -> None:
        limit_ns = mono_ns() + _STOP_WITHIN_NS
        while mono_ns() < limit_ns and self._journal.durable < self._journal_end:
            self._poller.poll(50)
            now_ns = mono_ns()
            self._journal.service(now_ns)
            self._acknowledge(now_ns)
        self._peers.say_goodbye()
        self._router.close(200)

    def _journal_problem(self) -> str:
        error = self._journal.error
        if error is not None:
            return str(error)
        return "the journal has no room" if self._is_full else ""

    def _make_report(self, now_ns: int) -> dict[str, Any]:
        return {
            "listen": self._address,
            "nodes": {name: node.to_map(now_ns) for name, node in self._peers.nodes.items()},
            "journal": journal_facts(self._journal, self._journal_problem(), self._fill.full_in_s),
            "streams": stream_accounts(self._journal.table, self._owners),
            "set_aside": self._bad.count,
            "security": security_facts(self._gatekeeper, self._refusals, self._peers.nodes),
            "store_problem": self._unstored.problem,
        }
