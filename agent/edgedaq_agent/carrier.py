"""What the uplink does, one step of its poll loop after the other: lanes that share one session.

Lanes share the link by weight: whose turn it is has sent the least for its weight of those with something to
send. How much is on its way at all is bounded by ``LinkWindow``, so that a lane with little to say is not
held up by what another one has put into the buffers of the link.

All of a ``Carrier`` is used by one thread, except ``report`` and ``take_node_report``, which another may
call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns
from edgedaq.lane_options import LaneSpec
from edgedaq.logsetup import get_logger
from edgedaq.session_messages import Ack, Hello, Lives, Report
from edgedaq.transport import PART_BYTES, PART_BYTES_MIN

from edgedaq_agent.dialling import Dialling
from edgedaq_agent.lane_carrier import LaneCarrier
from edgedaq_agent.link_window import LinkWindow
from edgedaq_agent.live_relay import LiveRelay
from edgedaq_agent.session import LaneMessage, Session

__all__ = ["Carrier"]

_SCAN_NS = 100_000_000
_SAVE_NS = 1_000_000_000
_REPORT_NS = 500_000_000
_PARTS_PER_STEP = 16
_STUCK_WAIT_S = 5.0
_LIVES_MAX = 4096
_COMMIT_S = 1.0
"""More than a commit of a spool takes."""
_ACKS_WITHIN_NS = 2_000_000_000
_DRAIN_WITHIN_NS = 4_500_000_000
_SUMMED = (
    "sent_bytes",
    "acked_bytes",
    "resent_bytes",
    "resent",
    "refused",
    "unknown",
    "ahead",
    "in_flight_bytes",
    "waiting_bytes",
    "spool_bytes",
    "spool_disk_bytes",
    "spool_limit_bytes",
    "spool_bytes_per_day",
    "dropped_rows",
)


class Carrier:
    """Rings, lanes and session of one node. A context manager.

    Args:
        lanes: In the order of ``hello.lanes``.
        took: Called with the rows and bytes of what arrives.
        lives_after_s: Age of a session, and pause, after which it tells which lives there are: long enough
            that two nodes of one name, which displace each other, never do.
        stored: Where the data of each job is to be stored: keys in ``store_config``.

    Raises:
        LogError: A spool cannot be opened.
    """

    def __init__(
        self,
        dialling: Dialling,
        lanes: Sequence[LaneSpec],
        hello: Hello,
        *,
        rings_dir: Path,
        state_dir: Path,
        context: zmq.Context[Any],
        took: Callable[[int, int], object],
        lives_after_s: float,
        stored: Mapping[str, Sequence[str]],
    ) -> None:
        self._stored = stored
        self._unstored = ""
        self._bad = BadFiles(state_dir / "bad")
        self._rings_dir = rings_dir
        self._lives_after_ns = int(lives_after_s * 1e9)
        waits_s = [spec.options.spool_after + spec.options.commit_after for spec in lanes]
        self._bound_s = max(waits_s) + _COMMIT_S
        self._stack = ExitStack()
        with self._stack:
            self._lanes = [
                self._stack.enter_context(
                    LaneCarrier(
                        number,
                        spec,
                        rings_dir=rings_dir,
                        state_dir=state_dir,
                        bad=self._bad,
                        context=context,
                        took=took,
                    )
                )
                for number, spec in enumerate(lanes)
            ]
            self._session = self._stack.enter_context(Session(dialling, hello, context))
            self._live = self._stack.enter_context(LiveRelay(rings_dir.parent, context))
            self._stack = self._stack.pop_all()
        self._credit = [0] * len(self._lanes)
        self._turns = [0.0] * len(self._lanes)
        self._window = LinkWindow()
        self._poller = zmq.Poller()
        self._polled: list[Any] = []
        self._wants_room = False
        self._session_number = 0
        self._scan_ns = self._save_ns = self._report_ns = self._lives_ns = 0
        self._report: dict[str, Any] = {}
        self._stop_ns = 0
        self._node_report: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, is_stopping: Callable[[], bool], stop_fd: int) -> None:
        """Carry until asked to stop, and then until everything is safe somewhere, or 4.5 s have passed."""
        while True:
            self._poll(stop_fd if not self._stop_ns else None)
            now_ns = mono_ns()
            self.step(now_ns)
            if is_stopping():
                self._stop_ns = self._stop_ns or now_ns
                if self._has_finished(now_ns):
                    break
        self._end()

    def step(self, now_ns: int) -> None:
        """Do everything that can be done now, without waiting."""
        is_scan_due = now_ns >= self._scan_ns
        if is_scan_due:
            self._scan_ns = now_ns + _SCAN_NS
        for lane in reversed(self._lanes):  # the first one removes rings: it looks when all others have
            if is_scan_due:
                lane.inlet.scan()
            lane.take(now_ns)
        for message in self._session.service(now_ns):
            self._act(message, now_ns)
        if self._session.is_up and self._session.number != self._session_number:
            self._begin_session()
        for lane in self._lanes:
            reason = lane.keep(now_ns)
            if reason:
                self._session.end("spool", reason, now_ns)
        self._send(now_ns)
        if not self._wants_room:
            self._live.serve(self._session, now_ns)
        if now_ns >= self._save_ns:
            self._save_ns = now_ns + _SAVE_NS
            for lane in self._lanes:
                lane.save()
        if self._session.is_up and now_ns >= self._lives_ns:
            self._tell_lives(now_ns)
        if now_ns >= self._report_ns:
            self._report_ns = now_ns + _REPORT_NS
            self._report = self._make_report(now_ns)

    def take_node_report(self, report: dict[str, Any]) -> None:
        """Send a report of the node when there is a session; a newer one replaces it. From any thread."""
        self._node_report = report

    def report(self) -> dict[str, Any]:
        """Return the uplink's own statistics, at most half a second old. From any thread."""
        return self._report

    def _poll(self, stop_fd: int | None) -> None:
        wanted = [item for lane in self._lanes for item in lane.pollables()]
        wanted += [*self._session.pollables(), *self._live.pollables()]
        if stop_fd is not None:
            wanted.append(stop_fd)
        if wanted != self._polled:
            self._poller = zmq.Poller()
            for item in wanted:
                self._poller.register(item, zmq.POLLIN)
            self._polled = wanted
        socket = self._session.socket
        if self._wants_room and socket is not None:
            self._poller.register(socket, zmq.POLLIN | zmq.POLLOUT)
        now_ns = mono_ns()
        due_ns = min(self._scan_ns, self._session.due_ns, self._save_ns)
        for lane in self._lanes:
            lane_ns = lane.due_ns()
            if lane_ns is not None:
                due_ns = min(due_ns, lane_ns)
        if not self._wants_room and self._session.is_up and self._ready(now_ns):
            due_ns = now_ns
        self._poller.poll(max(due_ns - now_ns + 999_999, 0) // 1_000_000)
        if self._wants_room and socket is not None:
            self._poller.register(socket, zmq.POLLIN)
            self._wants_room = False

    def _begin_session(self) -> None:
        self._session_number = self._session.number
        self._window = LinkWindow()
        self._lives_ns = self._session.begun_ns + self._lives_after_ns
        self._credit = [self._session.credit] * len(self._lanes)
        for lane in self._lanes:
            lane.begin_session()
        self._note_sent()
        self._look_for_stores()

    def _look_for_stores(self) -> None:
        """Tell of jobs whose data goes to stores that the aggregator does not have."""
        known = self._session.stores
        missing = [
            f"{key} (of {job})"
            for job, keys in self._stored.items()
            for key in keys
            if known is not None and key not in known
        ]
        text = (
            f"the aggregator has no store for {', '.join(missing)}; kept for a while only" if missing else ""
        )
        if text and text != self._unstored:
            get_logger().warning("store.missing", reason=text)
        self._unstored = text

    def _note_sent(self) -> None:
        self._session.sent = [lane.lane.sent for lane in self._lanes]

    def _act(self, message: LaneMessage, now_ns: int) -> None:
        if message.lane >= len(self._lanes):
            self._session.end("protocol", f"lane {message.lane} was never opened", now_ns)
            return
        lane = self._lanes[message.lane]
        before = lane.lane.acked
        problem = lane.act(message, now_ns)
        if problem is not None:
            code, text = problem
            retry_after_s = _STUCK_WAIT_S if code == "stuck" else 0.0
            self._session.end(code, text, now_ns, retry_after_s=retry_after_s)
            return
        if isinstance(message, Ack):
            self._credit[lane.number] = max(self._credit[lane.number], message.credit)
            self._window.acked(lane.number, lane.lane.acked, lane.lane.acked - before, now_ns)
        else:
            self._note_sent()

    def _ready(self, now_ns: int) -> list[LaneCarrier]:
        """Return the lanes that may send now, whose turn it is first."""
        limit_bytes = self._window.limit_bytes(now_ns)
        in_flight = [lane.lane.in_flight_bytes for lane in self._lanes]
        share_bytes = limit_bytes / sum(lane.weight for lane in self._lanes)
        has_room = sum(in_flight) < limit_bytes
        found = [
            lane
            for lane in self._lanes
            if (has_room or in_flight[lane.number] < share_bytes * lane.weight)
            and lane.lane.may_send(self._credit[lane.number])
        ]
        return sorted(found, key=lambda lane: self._turns[lane.number])

    def _send(self, now_ns: int) -> None:
        for _ in range(_PARTS_PER_STEP):
            if not self._session.is_up:
                return
            if not any(self._send_part(lane, now_ns) for lane in self._ready(now_ns)):
                break
        self._note_sent()
        if self._session.is_up and self._node_report is not None:
            report, self._node_report = self._node_report, None
            self._session.send(Report(report=report))
        for lane in self._lanes:
            lane.settle(now_ns)

    def _send_part(self, lane: LaneCarrier, now_ns: int) -> bool:
        """Send one part of a lane; False when it has to wait."""
        window_bytes = self._window.limit_bytes(now_ns)
        part_bytes = max(min(PART_BYTES, window_bytes // 4), PART_BYTES_MIN)
        part = lane.next_part(self._credit[lane.number], part_bytes)
        if part is None:
            return False
        if len(part.data) and not self._session.send_data(part.header, part.data):
            self._wants_room = True
            return False
        lane.was_sent(part)
        others = [self._turns[one.number] for one in self._lanes if one is not lane and one.lane.has_unsent]
        # A lane that was silent does not catch up what it might have sent.
        turn = max(self._turns[lane.number], min(others, default=0.0))
        self._turns[lane.number] = turn + len(part.data) / lane.weight
        self._window.sent(lane.number, lane.lane.sent, now_ns)
        return True

    def _tell_lives(self, now_ns: int) -> None:
        """Say which lives can still bring something, once all else is acknowledged."""
        self._lives_ns = now_ns + self._lives_after_ns
        if not all(lane.has_only_rings() for lane in self._lanes):
            return
        lives = [path.stem for path in self._rings_dir.glob("*.ring")]
        if len(lives) <= _LIVES_MAX:
            self._session.send(Lives(lives=lives, bound_s=self._bound_s))

    def _make_report(self, now_ns: int) -> dict[str, Any]:
        session, is_up = self._session, self._session.is_up
        offset = session.offset(now_ns)
        lanes = {lane.name: lane.facts(now_ns, is_up=is_up) for lane in self._lanes}
        problems = [f"lane {name}: {facts['spool_problem']}" for name, facts in lanes.items()]
        return {
            "link": "up" if is_up else "down",
            "aggregator": session.address,
            "reason": "" if is_up else session.reason,
            "session_age_s": (now_ns - session.begun_ns) / 1e9 if is_up else None,
            **{key: sum(facts[key] for facts in lanes.values()) for key in _SUMMED},
            "spool_problem": "; ".join(text for text in problems if not text.endswith(": ")),
            "store_problem": self._unstored,
            "oldest_unacknowledged_s": max(facts["oldest_unacknowledged_s"] for facts in lanes.values()),
            "set_aside": self._bad.count,
            "window_bytes": self._window.limit_bytes(now_ns),
            "lanes": lanes,
            "clock_offset_ms": None if offset is None else offset.offset_ns / 1e6,
            "clock_error_ms": None if offset is None else offset.error_ns / 1e6,
        }

    def _has_finished(self, now_ns: int) -> bool:
        """Tell whether a stop is complete; empties memory into the spools when that is the way."""
        waited_ns = now_ns - self._stop_ns
        is_over = waited_ns >= _DRAIN_WITHIN_NS
        are_drained = all(lane.inlet.all_dead_and_drained for lane in self._lanes)
        if are_drained and all(lane.lane.is_empty for lane in self._lanes):
            return True
        self._scan_ns = min(self._scan_ns, now_ns + _SCAN_NS // 4)
        if self._session.is_up and waited_ns < _ACKS_WITHIN_NS:
            return False
        for lane in self._lanes:
            lane.keep(now_ns, all_of_it=True)
        return is_over or (are_drained and all(lane.has_all_safe() for lane in self._lanes))

    def _end(self) -> None:
        now_ns = mono_ns()
        for lane in self._lanes:
            lane.end(now_ns)
        if self._session.is_up and self._node_report is not None:
            self._session.send(Report(report=self._node_report))
        self._session.say_goodbye()
