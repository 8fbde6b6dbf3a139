"""One lane of the uplink: its consumer of the rings, its spool, what is owed, and what the intake said of it.

::

    rings ── Inlet ──► Lane (pure) ──► next part ──► session
                        │    ▲
              spool_after    └── ACK, spool durable ──► rings are released
                        ▼
                      Spool

What is dropped when there is no room (``policy``) is decided here; that it leaves a GAP is the work of who
reads across it: the spool's reader behind trimmed segments, ``Repair`` where the intake sees a seq jump.
All of it is used by one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import WireError
from edgedaq.frame import DATA_KINDS, MAX_FRAME_BYTES, Frame, count_rows
from edgedaq.inlet import Inlet
from edgedaq.lane import Lane
from edgedaq.lane_options import LaneSpec
from edgedaq.lane_parts import Entry, FromMemory, FromSpool
from edgedaq.logsetup import get_logger
from edgedaq.session_messages import Ack, Ahead, Refused, Resend, Unknown
from edgedaq.transport import FLAG_REPLAY, PART_BYTES, pack_data_header

from edgedaq_agent.corrector import Corrector, whole_frames
from edgedaq_agent.ring_entries import entries_of, is_crowded, open_of, pieces_of, release
from edgedaq_agent.spool import Spool

__all__ = ["LaneCarrier", "Part"]

_RETRY_NS = 200_000_000
_NEVER_NS = 1 << 62


@dataclass(slots=True)
class Part:
    """What to send next, made ready: one header, and whole frames back to back."""

    header: bytes
    data: bytes | memoryview
    count: int
    source: FromMemory | FromSpool
    upto: int = 0


class LaneCarrier:
    """See the module. A context manager.

    Args:
        number: Of the lane in HELLO; lane 0 removes rings that all are through with.
        took: Called with the rows and bytes of what arrives.

    Raises:
        LogError: The spool cannot be opened.
    """

    def __init__(
        self,
        number: int,
        spec: LaneSpec,
        *,
        rings_dir: Path,
        state_dir: Path,
        bad: BadFiles,
        context: zmq.Context[Any],
        took: Callable[[int, int], object],
    ) -> None:
        self.number = number
        self.name = spec.name
        self.weight = spec.options.weight
        self.dropped_rows = 0
        self.sent_bytes = self.acked_bytes = self.sent_count = 0
        self._spec = spec
        self._took = took
        self._bad = bad
        self._log = get_logger(lane=spec.name)
        self._retry_ns = 0
        self._lost = f"dropped: lane {spec.name} was full ({spec.options.policy})"
        self._stack = ExitStack()
        is_on_disk = spec.options.durability == "disk"
        with self._stack:
            self._spool = None
            if is_on_disk:
                self._spool = self._stack.enter_context(
                    Spool(
                        state_dir / "spool" / spec.name,
                        limit_bytes=spec.limit,
                        reserve_bytes=spec.reserve,
                        gather_s=spec.options.commit_after,
                        drops=self._lost if spec.options.policy == "drop_oldest" else "",
                        bad=bad,
                        open_of=open_of,
                    )
                )
            self.inlet = self._stack.enter_context(
                Inlet(rings_dir, spec.claim, spec.topics, retire=number == 0, context=context)
            )
            self._stack = self._stack.pop_all()
        spool_after_ns = int(spec.options.spool_after * 1e9) if is_on_disk else _NEVER_NS
        self.lane = Lane(
            0 if self._spool is None else self._spool.acked,
            0 if self._spool is None else self._spool.end,
            spool_after_ns=spool_after_ns,
            crowded_after_ns=spool_after_ns // 2,
            part_bytes=PART_BYTES,
        )
        self._note_backlog()
        self.corrector = Corrector(bad, self._find_open)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def pollables(self) -> list[Any]:
        """Return what to poll for reading; it changes with each scan."""
        return [*self.inlet.pollables(), *([] if self._spool is None else [self._spool.fileno()])]

    def due_ns(self) -> int | None:
        """Return when ``keep`` is to be called at the latest; None while nothing waits."""
        due_ns = self.lane.due_ns(is_crowded)
        if due_ns is None or due_ns >= _NEVER_NS // 2:
            return None
        return max(due_ns, self._retry_ns)

    def take(self, now_ns: int) -> None:
        """Take what has arrived in the rings, and what has become durable in the spool."""
        for run in self.inlet.receive():
            self._took(count_rows(run.frames), len(run.frames))
            for entry in entries_of(run, now_ns):
                self.lane.arrive(entry)
        if self._spool is not None:
            self._spool.clear()
            release(self.lane.durable(self._spool.durable))

    def keep(self, now_ns: int, *, all_of_it: bool = False) -> str:
        """Spool what is due, drop what the policy says; return why the session must end, if it must."""
        reason = ""
        if self._spool is None:
            self._drop_if_crowded()
            return reason
        if self._spool.has_moved and self._spool.settle():
            # The disk failed: what was in the spool and not durable has another place there.
            self.lane.spool_moved(self._spool.end)
            reason = "the disk of the spool failed; all of it is sent again"
        if now_ns < self._retry_ns and not all_of_it:
            return reason
        groups = self.lane.plan_spooling(now_ns, is_crowded, all_of_it=all_of_it)
        ends: list[int] = []
        for group in groups:
            end = self._spool.append(group)
            while end is None and self._spec.options.policy == "drop_oldest" and self._spool.drop_oldest():
                end = self._spool.append(group)
            if end is None:
                self._retry_ns = now_ns + _RETRY_NS
                break
            ends.append(end)
        self.lane.spooled(groups, ends)
        release(self.lane.durable(self._spool.durable))
        if len(ends) < len(groups) and self._spec.options.policy == "drop_newest":
            self._drop_if_crowded()
        return reason

    def begin_session(self) -> None:
        """Start anew at position 0."""
        self.lane.begin_session()
        self.corrector.begin_session()

    def act(self, message: Ack | Resend | Refused | Unknown | Ahead, now_ns: int) -> tuple[str, str] | None:
        """Take what the intake said; return code and reason to end the session with, if so."""
        if isinstance(message, Ack):
            return self.take_ack(message.durable, now_ns)
        sent = self.lane.sent
        if not self.lane.go_back(message.position):
            return "protocol", f"no part began at {message.position}"
        if not self.corrector.note(message, sent, now_ns):
            return "stuck", "too many problems at one position"
        return None

    def take_ack(self, position: int, now_ns: int) -> tuple[str, str] | None:
        """Take that all before a position of the session is durable at the intake."""
        lane, before, spool_acked = self.lane, self.lane.acked, self.lane.spool_acked
        try:
            releases = lane.ack(position, now_ns)
        except WireError as e:
            return "protocol", str(e)
        self.acked_bytes += lane.acked - before
        if lane.spool_acked != spool_acked and self._spool is not None:
            self._spool.acknowledge(lane.spool_acked)
        release(releases)
        return None

    def settle(self, now_ns: int) -> None:
        """Take as acknowledged the parts of which nothing was left to send."""
        if self.lane.in_flight_bytes == 0 and self.lane.sent:
            self.take_ack(self.lane.acked, now_ns)

    def next_part(self, credit: int, part_bytes: int) -> Part | None:
        """Return what to send now; None when there is nothing, or not enough credit for it.

        Args:
            credit: Position of the session up to which may be sent.
            part_bytes: Frames are joined up to this.
        """
        lane = self.lane
        limit = min(self.corrector.part_bytes, part_bytes)
        room = credit - lane.sent
        source = lane.next_part(credit, limit)
        if isinstance(source, FromMemory) and source.size > limit and source.entries[0].count > 1:
            lane.split_front(list(pieces_of(source.entries[0], limit)))
            source = lane.next_part(credit, limit)
        if source is None:
            return None
        part = Part(b"", b"", 0, source)
        frames: list[Frame] | None = None
        if isinstance(source, FromSpool):
            assert self._spool is not None  # noqa: S101  # a lane without a spool has no address there
            found = self._spool.read(source.position, source.upto, min(limit, room), room)
            frames, part.upto = found, found.upto
            if not found and part.upto == source.position:
                return None
        elif self.corrector.is_needed:
            frames = self.corrector.whole_frames(source.entries)
        if frames is None and isinstance(source, FromMemory):
            entries = source.entries
            part.count = sum(entry.count for entry in entries)
            part.data = entries[0].frames if len(entries) == 1 else b"".join([e.frames for e in entries])
        else:
            chunks: list[bytes | memoryview] = [frame.raw for frame in frames or ()]
            if self.corrector.is_needed:
                chunks = self.corrector.correct(frames or ())
            part.data, part.count = b"".join(chunks), len(chunks)
        size = len(part.data)
        if size > room:
            return None
        flags = FLAG_REPLAY if isinstance(source, FromSpool) else 0
        part.header = pack_data_header(self.number, flags, lane.sent, part.count, size)
        return part

    def was_sent(self, part: Part) -> None:
        """Record that a part has left, or had nothing in it."""
        size = len(part.data)
        self.sent_bytes += size
        self.sent_count += part.count
        if isinstance(part.source, FromSpool):
            self.lane.sent_spool(part.upto, size)
        else:
            self.lane.sent_memory(part.source, size)
        if self.corrector.is_needed or self.corrector.part_bytes < PART_BYTES:
            self.corrector.passed(self.lane.sent)

    def save(self) -> None:
        """Write down how far the aggregator is."""
        if self._spool is not None:
            self._spool.save()
            if self.lane.is_empty:
                self._spool.forget_streams()

    def has_only_rings(self) -> bool:
        """Tell whether all that is still owed lies in rings that are there."""
        return self.lane.spool_acked >= self.lane.spool_end and not self.lane.held_bytes(None)

    def has_all_safe(self) -> bool:
        """Tell whether nothing is in memory that could be in the spool."""
        return not self.lane.memory_bytes or self._spool is None

    def end(self, now_ns: int) -> None:
        """Bring everything into the spool, as far as it takes it."""
        self.keep(now_ns, all_of_it=True)
        if self._spool is not None and self._spool.sync():
            release(self.lane.durable(self._spool.durable))
        if self.lane.memory_bytes:
            reason = "the lane is kept in memory" if self._spool is None else self._spool.problem
            self._log.error("spool.incomplete", reason=reason, waiting_bytes=self.lane.memory_bytes)
        self.inlet.scan()
        self.save()

    def facts(self, now_ns: int, *, is_up: bool) -> dict[str, Any]:
        """Return the lane's own statistics."""
        lane, spool, counts = self.lane, self._spool, self.corrector.counts
        oldest_ns = lane.oldest_ns()
        return {
            "sent_bytes": self.sent_bytes,
            "acked_bytes": self.acked_bytes,
            "resent_bytes": lane.resent_bytes,
            "resent": counts["Resend"],
            "refused": counts["Refused"],
            "unknown": counts["Unknown"],
            "ahead": counts["Ahead"],
            "in_flight_bytes": lane.in_flight_bytes if is_up else 0,
            "waiting_bytes": lane.memory_bytes,
            "spool_bytes": max(lane.spool_end - lane.spool_acked, 0),
            "spool_disk_bytes": 0 if spool is None else spool.disk_bytes,
            "spool_limit_bytes": 0 if spool is None else spool.limit_bytes,
            "spool_problem": "" if spool is None else spool.problem,
            "spool_bytes_per_day": 0 if spool is None else spool.bytes_per_day(now_ns),
            "dropped_rows": self.dropped_rows + (0 if spool is None else spool.dropped_rows),
            "oldest_unacknowledged_s": 0.0 if oldest_ns is None else max(now_ns - oldest_ns, 0) / 1e9,
        }

    def _find_open(self, stream: int) -> bytes | None:
        """Return the OPEN frame of a stream that a ring or the spool of this lane has."""
        for ring in self.inlet.rings.values():
            raw = ring.open_frame(stream)
            if raw is not None:
                return raw
        return None if self._spool is None else self._spool.find_open(stream)

    def _drop_if_crowded(self) -> None:
        """Drop the oldest in memory while a ring, or the lane, is short of room, if the policy says so."""
        lane, limit_bytes = self.lane, self._spec.limit

        def is_enough() -> bool:
            is_small = self._spool is not None or lane.memory_bytes <= limit_bytes
            return is_small and not lane.is_crowded(is_crowded)

        if self._spec.options.policy == "wait" or is_enough():
            return
        dropped, releases = lane.drop_front(self._unlosable, is_enough)
        if dropped:
            self.corrector.lost_reason = self._lost
            self.dropped_rows += sum(count_rows(entry.frames) for entry in dropped)
        release(releases)

    def _unlosable(self, entry: Entry) -> Entry | None:
        """Return the frames of an entry that are no data: without them nobody could tell what was dropped."""
        kept = [frame.raw for frame in whole_frames(entry.frames, self._bad) if frame.kind not in DATA_KINDS]
        return Entry(None, memoryview(b"".join(kept)), len(kept), None) if kept else None

    def _note_backlog(self) -> None:
        """Estimate the age of what the spool held at the start, by the time of its first frame."""
        spool = self._spool
        if spool is None or self.lane.is_empty:
            return
        for frame in spool.read(spool.acked, spool.end, 1, MAX_FRAME_BYTES)[:1]:
            age_ns = max(utc_ns() - frame.t_first_ns, 0) if frame.t_first_ns else 0
            self.lane.note_backlog(mono_ns() - age_ns)
