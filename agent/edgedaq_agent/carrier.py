"""What the uplink does, one step of its poll loop after the other.

All of a ``Carrier`` is used by one thread, except ``report`` and ``take_node_report``, which another may
call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import WireError
from edgedaq.frame import MAX_FRAME_BYTES, Frame, count_rows
from edgedaq.inlet import Inlet, Run
from edgedaq.lane import FromMemory, FromSpool, Lane
from edgedaq.logsetup import get_logger
from edgedaq.session_messages import Ack, Hello, Report
from edgedaq.transport import FLAG_REPLAY, PART_BYTES, pack_data_header

from edgedaq_agent.corrector import Corrector
from edgedaq_agent.ring_entries import entries_of, is_crowded, open_of, pieces_of, release
from edgedaq_agent.session import LaneMessage, Session
from edgedaq_agent.spool import Spool

__all__ = ["Carrier", "CarrierOptions"]

_SCAN_NS = 100_000_000
_SAVE_NS = 1_000_000_000
_REPORT_NS = 500_000_000
_RETRY_NS = 200_000_000
_PARTS_PER_STEP = 16
_STUCK_WAIT_S = 5.0
_ACKS_WITHIN_NS = 2_000_000_000
_DRAIN_WITHIN_NS = 4_500_000_000
_DATA_LANE = 0


@dataclass(frozen=True, slots=True)
class CarrierOptions:
    """What the uplink was configured to."""

    address: str
    topics: Sequence[str]
    spool_after_ns: int
    spool_limit_bytes: int
    spool_reserve_bytes: int


class Carrier:
    """Rings, lane, spool and session of one node. A context manager.

    Raises:
        LogError: The spool cannot be opened.
    """

    def __init__(
        self,
        options: CarrierOptions,
        hello: Hello,
        *,
        rings_dir: Path,
        state_dir: Path,
        context: zmq.Context[Any],
        took: Callable[[int, int], object],
    ) -> None:
        self._took = took
        self._options = options
        self._log = get_logger()
        self._stack = ExitStack()
        self._bad = BadFiles(state_dir / "bad")
        with self._stack:
            self._spool = self._stack.enter_context(
                Spool(
                    state_dir / "spool" / "data",
                    limit_bytes=options.spool_limit_bytes,
                    reserve_bytes=options.spool_reserve_bytes,
                    bad=self._bad,
                    open_of=open_of,
                )
            )
            self._inlet = self._stack.enter_context(
                Inlet(rings_dir, "uplink", options.topics, retire=True, context=context)
            )
            self._session = self._stack.enter_context(Session(options.address, hello, context))
            self._stack = self._stack.pop_all()
        self._lane = Lane(
            self._spool.acked,
            self._spool.end,
            spool_after_ns=options.spool_after_ns,
            crowded_after_ns=options.spool_after_ns // 2,
            part_bytes=PART_BYTES,
        )
        self._note_backlog()
        self._corrector = Corrector(self._bad, self._find_open)
        self._poller = zmq.Poller()
        self._polled: list[Any] = []
        self._wants_room = False
        self._session_number = 0
        self._scan_ns = self._save_ns = self._report_ns = self._retry_ns = 0
        self._report: dict[str, Any] = {}
        self._stop_ns = 0
        self._node_report: dict[str, Any] | None = None
        self.sent_bytes = 0
        self.acked_bytes = 0
        self.sent_count = 0

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
        if now_ns >= self._scan_ns:
            self._inlet.scan()
            self._scan_ns = now_ns + _SCAN_NS
        for run in self._inlet.receive():
            self._arrive(run, now_ns)
        self._spool.clear()
        release(self._lane.durable(self._spool.durable))
        for message in self._session.service(now_ns):
            self._act(message, now_ns)
        if self._session.is_up and self._session.number != self._session_number:
            self._session_number = self._session.number
            self._lane.begin_session()
            self._corrector.begin_session()
            self._session.sent = 0
        self._fill_spool(now_ns)
        self._send(now_ns)
        if now_ns >= self._save_ns:
            self._save_ns = now_ns + _SAVE_NS
            self._spool.save()
            if self._lane.is_empty:
                self._spool.forget_streams()
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
        wanted: list[Any] = [*self._inlet.pollables(), *self._session.pollables(), self._spool.fileno()]
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
        spool_ns = self._lane.due_ns(is_crowded)
        if spool_ns is not None:
            due_ns = min(due_ns, max(spool_ns, self._retry_ns))
        if (
            not self._wants_room
            and self._session.is_up
            and self._lane.next_part(self._session.credit) is not None
        ):
            due_ns = now_ns
        self._poller.poll(max(due_ns - now_ns + 999_999, 0) // 1_000_000)
        if self._wants_room and socket is not None:
            self._poller.register(socket, zmq.POLLIN)
            self._wants_room = False

    def _arrive(self, run: Run, now_ns: int) -> None:
        self._took(count_rows(run.frames), len(run.frames))
        for entry in entries_of(run, now_ns):
            self._lane.arrive(entry)

    def _act(self, message: LaneMessage, now_ns: int) -> None:
        lane = self._lane
        if message.lane != _DATA_LANE:
            self._session.end("protocol", f"lane {message.lane} was never opened", now_ns)
        elif isinstance(message, Ack):
            self._session.credit = max(self._session.credit, message.credit)
            self._take_ack(message.durable, now_ns)
        else:
            sent = lane.sent
            if not lane.go_back(message.position):
                self._session.end("protocol", f"no part began at {message.position}", now_ns)
                return
            self._session.sent = lane.sent
            if not self._corrector.note(message, sent, now_ns):
                text = "too many problems at one position"
                self._session.end("stuck", text, now_ns, retry_after_s=_STUCK_WAIT_S)

    def _take_ack(self, position: int, now_ns: int) -> None:
        before, spool_acked = self._lane.acked, self._lane.spool_acked
        try:
            releases = self._lane.ack(position, now_ns)
        except WireError as e:
            self._session.end("protocol", str(e), now_ns)
            return
        self.acked_bytes += self._lane.acked - before
        if self._lane.spool_acked != spool_acked:
            self._spool.acknowledge(self._lane.spool_acked)
        release(releases)

    def _fill_spool(self, now_ns: int, *, all_of_it: bool = False) -> None:
        if self._spool.has_moved:
            self._move_with_spool(now_ns)
        if now_ns < self._retry_ns and not all_of_it:
            return
        groups = self._lane.plan_spooling(now_ns, is_crowded, all_of_it=all_of_it)
        ends: list[int] = []
        for group in groups:
            end = self._spool.append(group)
            if end is None:
                self._retry_ns = now_ns + _RETRY_NS
                break
            ends.append(end)
        self._lane.spooled(groups, ends)
        release(self._lane.durable(self._spool.durable))

    def _move_with_spool(self, now_ns: int) -> None:
        """The disk failed: what was in the spool and not durable has, or will have, another place there."""
        if not self._spool.settle():
            return
        self._lane.spool_moved(self._spool.end)
        self._session.end("spool", "the disk of the spool failed; all of it is sent again", now_ns)

    def _send(self, now_ns: int) -> None:
        session = self._session
        for _ in range(_PARTS_PER_STEP):
            if not session.is_up:
                return
            part = self._next_part()
            if part is None or not self._send_part(part):
                break
            if self._corrector.is_needed or self._corrector.part_bytes < PART_BYTES:
                self._corrector.passed(self._lane.sent)
        self._send_node_report()
        if self._lane.in_flight_bytes == 0 and self._lane.sent:
            self._take_ack(self._lane.acked, now_ns)  # of parts of which nothing was left to send

    def _send_node_report(self) -> None:
        if self._session.is_up and self._node_report is not None:
            report, self._node_report = self._node_report, None
            self._session.send(Report(report=report))

    def _next_part(self) -> FromMemory | FromSpool | None:
        lane, limit = self._lane, self._corrector.part_bytes
        part = lane.next_part(self._session.credit, limit)
        if isinstance(part, FromMemory) and part.size > limit and part.entries[0].count > 1:
            lane.split_front(list(pieces_of(part.entries[0], limit)))
            part = lane.next_part(self._session.credit, limit)
        return part

    def _send_part(self, part: FromMemory | FromSpool) -> bool:
        """Send one part; False when it has to wait."""
        lane = self._lane
        room = self._session.credit - lane.sent
        frames: list[Frame] | None = None
        upto = 0
        if isinstance(part, FromSpool):
            found = self._spool.read(part.position, part.upto, min(self._corrector.part_bytes, room), room)
            frames, upto = found, found.upto
            if not found and upto == part.position:
                return False
        elif self._corrector.is_needed:
            frames = self._corrector.whole_frames(part.entries)
        if frames is None and isinstance(part, FromMemory):
            entries = part.entries
            count = sum(entry.count for entry in entries)
            data = entries[0].frames if len(entries) == 1 else b"".join([entry.frames for entry in entries])
        else:
            chunks: list[bytes | memoryview] = [frame.raw for frame in frames or ()]
            if self._corrector.is_needed:
                chunks = self._corrector.correct(frames or ())
            data, count = b"".join(chunks), len(chunks)
        size = len(data)
        if size > room:
            return False
        flags = FLAG_REPLAY if isinstance(part, FromSpool) else 0
        if size:
            header = pack_data_header(_DATA_LANE, flags, lane.sent, count, size)
            if not self._session.send_data(header, data):
                self._wants_room = True
                return False
        self.sent_bytes += size
        self.sent_count += count
        if isinstance(part, FromSpool):
            lane.sent_spool(upto, size)
        else:
            lane.sent_memory(part, size)
        self._session.sent = lane.sent
        return True

    def _find_open(self, stream: int) -> bytes | None:
        for ring in self._inlet.rings.values():
            raw = ring.open_frame(stream)
            if raw is not None:
                return raw
        return self._spool.find_open(stream)

    def _make_report(self, now_ns: int) -> dict[str, Any]:
        session, lane, spool = self._session, self._lane, self._spool
        offset = session.offset(now_ns)
        oldest_ns = lane.oldest_ns()
        is_up = session.is_up
        return {
            "link": "up" if is_up else "down",
            "aggregator": self._options.address,
            "reason": "" if is_up else session.reason,
            "session_age_s": (now_ns - session.begun_ns) / 1e9 if is_up else None,
            "sent_bytes": self.sent_bytes,
            "acked_bytes": self.acked_bytes,
            "resent_bytes": lane.resent_bytes,
            "resent": self._corrector.counts["Resend"],
            "refused": self._corrector.counts["Refused"],
            "unknown": self._corrector.counts["Unknown"],
            "ahead": self._corrector.counts["Ahead"],
            "set_aside": self._bad.count,
            "in_flight_bytes": lane.in_flight_bytes if is_up else 0,
            "waiting_bytes": lane.memory_bytes,
            "spool_bytes": max(lane.spool_end - lane.spool_acked, 0),
            "spool_disk_bytes": spool.disk_bytes,
            "spool_limit_bytes": spool.limit_bytes,
            "spool_problem": spool.problem,
            "oldest_unacknowledged_s": 0.0 if oldest_ns is None else max(now_ns - oldest_ns, 0) / 1e9,
            "clock_offset_ms": None if offset is None else offset.offset_ns / 1e6,
            "clock_error_ms": None if offset is None else offset.error_ns / 1e6,
        }

    def _note_backlog(self) -> None:
        """Estimate the age of what the spool held at the start, by the time of its first frame."""
        if self._lane.is_empty:
            return
        for frame in self._spool.read(self._spool.acked, self._spool.end, 1, MAX_FRAME_BYTES)[:1]:
            age_ns = max(utc_ns() - frame.t_first_ns, 0) if frame.t_first_ns else 0
            self._lane.note_backlog(mono_ns() - age_ns)

    def _has_finished(self, now_ns: int) -> bool:
        """Tell whether a stop is complete; empties memory into the spool when that is the way."""
        waited_ns = now_ns - self._stop_ns
        is_over = waited_ns >= _DRAIN_WITHIN_NS
        if self._inlet.all_dead_and_drained and self._lane.is_empty:
            return True
        if self._session.is_up and waited_ns < _ACKS_WITHIN_NS:
            self._scan_ns = min(self._scan_ns, now_ns + _SCAN_NS // 4)
            return False
        self._fill_spool(now_ns, all_of_it=True)
        self._scan_ns = min(self._scan_ns, now_ns + _SCAN_NS // 4)
        return is_over or (self._inlet.all_dead_and_drained and not self._lane.memory_bytes)

    def _end(self) -> None:
        now_ns = mono_ns()
        self._fill_spool(now_ns, all_of_it=True)
        if self._spool.sync():
            release(self._lane.durable(self._spool.durable))
        if self._lane.memory_bytes:
            self._log.error(
                "spool.incomplete", reason=self._spool.problem, waiting_bytes=self._lane.memory_bytes
            )
        self._inlet.scan()
        self._spool.save()
        self._send_node_report()
        self._session.say_goodbye()
