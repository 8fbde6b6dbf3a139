"""Lane, link, intake and journal as pure parts, with crashes of either side at any moment: exactly once.

What is real: ``Lane``, ``Repair``, ``IntakeLane``, ``judge_part``, ``StreamTable``, frames. What is
modelled, as simply as
possible: a ring, a spool and a journal as lists with a durable length; a link as two queues.
"""

from __future__ import annotations

from collections import deque

from edgedaq.delivery import StreamTable, gap_of
from edgedaq.frame import Kind, decode, encode, pack_map, split
from edgedaq.lane import Lane
from edgedaq.lane_parts import Entry, FromMemory, FromSpool, Release
from edgedaq.schema import OpenInfo, encode_open
from edgedaq.session_messages import Ack, Resend
from edgedaq.transport import DataHeader, pack_data_header, unpack_data_header
from edgedaq_agent.repair import Repair
from edgedaq_aggregator.judging import Problem, StreamOwners, judge_part
from edgedaq_aggregator.sessions import Check, IntakeLane, Take
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.model.holders import Log, Ring, check_account, name_of

NODE = "n1"
WINDOW = 4000
PART = 900


class Delivery(RuleBasedStateMachine):
    """The model. What a safety is when it is removed is passed in by a subclass."""

    table_type = StreamTable
    acks_before_durable = False
    credit: int
    careful_until: int

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring()
        self.closed_rings: list[Ring] = []
        self.put: dict[int, list[bytes]] = {}
        self.rows: dict[int, int] = {}
        self.next_stream = 1
        self.spool = Log()
        self.saved_acked = 0
        self.journal = Log()
        self.lost_by_restore = False
        self.now = 0
        self._start_uplink()
        self._start_intake()

    # The node.

    @initialize()
    def first_stream(self):
        self.open_stream()

    @rule()
    @precondition(lambda self: len(self.put) < 6)
    def open_stream(self):
        stream, self.next_stream = self.next_stream, self.next_stream + 1
        info = OpenInfo(
            node=NODE, job="j", job_type="J", life="0" * 16, boot="b", topics=("store.X",), form="raw"
        )
        raw = encode_open(stream, info)
        self.ring.opens[stream] = raw
        self.put[stream] = [raw]
        self.rows[stream] = 0
        self.ring.put(raw)

    @rule(which=st.integers(0, 5), size=st.sampled_from([8, 100, 400, 1500]), rows=st.integers(1, 9))
    def put_data(self, which, size, rows):
        streams = [s for s in self.ring.opens if decode(memoryview(self.put[s][-1])).kind is not Kind.CLOSE]
        if not streams:
            return
        stream = streams[which % len(streams)]
        seq, row0 = len(self.put[stream]), self.rows[stream]
        raw = encode(Kind.RAW, stream, seq, bytes([seq % 256]) * size, rows=rows, row0=row0, t_first_ns=1)
        self.rows[stream] += rows
        self.put[stream].append(raw)
        self.ring.put(raw)

    @rule()
    def job_ends(self):
        for stream in self.ring.opens:
            if decode(memoryview(self.put[stream][-1])).kind is not Kind.CLOSE:
                body = pack_map({"rows": self.rows[stream], "tail_unknown": False, "bound_s": 0.0})
                raw = encode(Kind.CLOSE, stream, len(self.put[stream]), body, row0=self.rows[stream])
                self.put[stream].append(raw)
                self.ring.put(raw)
        self.closed_rings.append(self.ring)
        self.ring = Ring()

    # The uplink.

    def _start_uplink(self) -> None:
        self.lane = Lane(self.saved_acked, self.spool.end, spool_after_ns=100, part_bytes=PART)
        self.repair = Repair()
        self.taken = {id(ring): ring.released for ring in self._rings()}
        self._cut_link()

    def _rings(self) -> list[Ring]:
        return [*self.closed_rings, self.ring]

    @rule()
    def take_runs(self):
        for ring in self._rings():
            start = self.taken.get(id(ring), 0)
            for end, raw in ring.runs:
                if end > start:
                    self.lane.arrive(Entry(ring, memoryview(raw), 1, end, self.now))
                    self.taken[id(ring)] = end

    @rule(count=st.integers(1, 5))
    def send(self, count):
        for _ in range(count):
            if self.session is None or not self._send_part():
                return

    def _send_part(self) -> bool:
        part = self.lane.next_part(self.credit)
        if part is None:
            return False
        if isinstance(part, FromSpool):
            found: list[tuple[int, bytes]] = []
            size = 0
            for item in self.spool.after(part.position):
                if found and size + len(item[1]) > PART:
                    break
                found.append(item)
                size += len(item[1])
            frames = [decode(memoryview(raw)) for _, raw in found]
            upto = found[-1][0] if found else part.upto
        else:
            frames = [frame for entry in part.entries for frame in split(entry.frames)]
        chunks, aside = self.repair.apply(frames, self._find_open)
        assert not aside
        data = b"".join(chunks)
        if len(data) > self.credit - self.lane.sent:
            return False
        if data:
            self.to_intake.append((pack_data_header(0, 0, self.lane.sent, len(chunks), len(data)), data))
        if isinstance(part, FromMemory):
            self.lane.sent_memory(part, len(data))
        else:
            self.lane.sent_spool(upto, len(data))
        if self.repair.is_needed and self.lane.sent >= self.careful_until:
            self.repair.forget()
        return True

    def _find_open(self, stream: int) -> bytes | None:
        return self.put[stream][0]

    @rule(everything=st.booleans())
    def move_to_spool(self, everything):
        groups = self.lane.plan_spooling(self.now, lambda *_: False, all_of_it=everything)
        ends: list[int] = []
        for group in groups:
            for entry in group:
                for frame in split(entry.frames):
                    self.spool.append(bytes(frame.raw))
            ends.append(self.spool.end)
        self.lane.spooled(groups, ends)

    @rule(ns=st.integers(1, 150))
    def time_passes(self, ns):
        self.now += ns

    @rule()
    def spool_syncs(self):
        self.spool.durable = self.spool.end
        self._release(self.lane.durable(self.spool.durable))

    def _release(self, releases: list[Release]) -> None:
        for ring, up_to in releases:
            assert isinstance(ring, Ring)
            ring.release(up_to)

    @rule()
    @precondition(lambda self: self.session is not None)
    def hear_intake(self):
        while self.to_uplink:
            message = self.to_uplink.popleft()
            if isinstance(message, Ack):
                self.credit = max(self.credit, message.credit)
                self._release(self.lane.ack(message.durable, self.now))
            else:
                sent = self.lane.sent
                if not self.lane.go_back(message.position):
                    self._cut_link()
                    return
                self.careful_until = sent + PART
                if isinstance(message, Resend):
                    self.repair.check_all()
                else:
                    self.repair.note(message)
        if self.lane.in_flight_bytes == 0:
            self._release(self.lane.ack(self.lane.acked, self.now))
        if self.lane.spool_acked <= self.spool.durable:
            self.saved_acked = self.lane.spool_acked

    @rule(power_cut=st.booleans())
    def uplink_dies(self, power_cut):
        """A power cut would take the rings with it; the data that were only there are not promised then."""
        if not power_cut:
            self.spool.durable = self.spool.end  # the kernel has it; it is as good as on disk for a process
        self.spool.cut(self.spool.durable)
        self._start_uplink()

    # The link.

    def _cut_link(self) -> None:
        self.session: IntakeLane | None = None
        self.to_intake: deque[tuple[bytes, bytes]] = deque()
        self.to_uplink: deque[Ack | Problem] = deque()
        self.credit = 0
        self.careful_until = 0

    @rule()
    def cut_link(self):
        self._cut_link()

    @rule()
    @precondition(lambda self: self.session is None)
    def connect(self):
        self.session = IntakeLane(0, WINDOW)
        self.lane.begin_session()
        self.repair.forget()
        self.credit = WINDOW

    @rule(at=st.integers(0, 9))
    @precondition(lambda self: len(self.to_intake) > 0)
    def lose_a_part(self, at):
        del self.to_intake[at % len(self.to_intake)]

    @rule(at=st.integers(0, 9))
    @precondition(lambda self: len(self.to_intake) > 0)
    def repeat_a_part(self, at):
        self.to_intake.append(self.to_intake[at % len(self.to_intake)])

    @rule(at=st.integers(0, 9), byte=st.integers(0, 10_000))
    @precondition(lambda self: len(self.to_intake) > 0)
    def damage_a_part(self, at, byte):
        head, data = self.to_intake[at % len(self.to_intake)]
        damaged = bytearray(data)
        damaged[byte % len(data)] ^= 0x10
        self.to_intake[at % len(self.to_intake)] = (head, bytes(damaged))

    @rule(at=st.integers(0, 9))
    @precondition(lambda self: len(self.to_uplink) > 0)
    def lose_or_repeat_an_answer(self, at):
        message = self.to_uplink[at % len(self.to_uplink)]
        if isinstance(message, Ack):
            self.to_uplink.append(message)
        else:
            self._cut_link()  # within a connection, nothing but the connection itself is lost

    # The intake.

    def _start_intake(self) -> None:
        self.table = self.table_type()
        for _, raw in self.journal.frames:
            self.table.apply(decode(memoryview(raw)))
        self.owners = StreamOwners(self.table)
        self._cut_link()

    @rule()
    @precondition(lambda self: self.session is not None)
    def intake_receives(self):
        while self.to_intake and self.session is not None:
            head, data = self.to_intake.popleft()
            self._receive(unpack_data_header(head), data)

    def _receive(self, header: DataHeader, data: bytes) -> None:
        lane = self.session
        assert lane is not None
        take = lane.take(header)
        if take is Take.VIOLATION:
            self._cut_link()
        if take is not Take.JUDGE:
            return
        judged = judge_part(self.table, self.owners, NODE, header, memoryview(data))
        for frame in judged.accepted:
            self.table.apply(frame)
            self.journal.append(bytes(frame.raw))
        if judged.problem is None:
            lane.keep(header.part_bytes, self.journal.end, [])
            if self.acks_before_durable:
                lane.durable(self.journal.end)
        else:
            lane.stand_still()
            self.to_uplink.append(judged.problem)

    @rule()
    def journal_syncs(self):
        self.journal.durable = self.journal.end

    @rule()
    @precondition(lambda self: self.session is not None)
    def intake_answers(self):
        lane = self.session
        assert lane is not None
        lane.durable(self.journal.durable)
        ack = lane.owed_ack()
        if ack is not None:
            self.to_uplink.append(ack)
            lane.ack_sent()

    @rule()
    @precondition(lambda self: self.session is not None and not self.to_intake)
    def ping(self):
        """A PING arrives behind all parts."""
        if self.session is None or self.to_intake:
            return
        match self.session.check(self.lane.sent):
            case Check.LOST:
                self._cut_link()
            case Check.TELL_AGAIN:
                self.to_uplink.append(Resend(lane=0, position=self.session.taken, text=""))

    @rule(syncs=st.booleans())
    def exchange(self, syncs):
        """Everything goes well for a while."""
        if self.session is None:
            self.connect()
        self.take_runs()
        self.send(5)
        self.intake_receives()
        self.ping()
        if syncs:
            self.journal_syncs()
        if self.session is not None:
            self.intake_answers()
            self.hear_intake()

    @rule(keeps=st.booleans())
    def intake_dies(self, keeps):
        if not keeps:
            self.journal.cut(self.journal.durable)
        self.journal.durable = self.journal.end
        self._start_intake()

    # What must hold.

    @invariant()
    def nothing_is_lost(self):
        """Every frame that was put is in the journal, on the disk of the node, or still in its ring."""
        if self.lost_by_restore:
            return
        held = {raw for end, raw in self.journal.frames if end <= self.journal.durable}
        held |= {raw for _, raw in self.spool.after(self.saved_acked)}
        held |= {raw for ring in self._rings() for _, raw in ring.runs}
        for frames in self.put.values():
            for raw in frames:
                assert raw in held, f"lost {name_of(decode(memoryview(raw)))}"

    @invariant()
    def nothing_is_twice(self):
        seen: dict[int, int] = {}
        for _, raw in self.journal.frames:
            frame = decode(memoryview(raw))
            expected = seen.get(frame.stream, 0)
            assert frame.seq == expected or (frame.kind is Kind.GAP and frame.seq < expected), name_of(frame)
            seen[frame.stream] = (gap_of(frame)[0] if frame.kind is Kind.GAP else frame.seq) + 1

    def teardown(self):
        for _ in range(400):
            if self._is_delivered():
                break
            self.exchange(syncs=True)
            self.spool_syncs()
            self.nothing_is_lost()
            self.nothing_is_twice()
        assert self._is_delivered(), "delivery got stuck"
        assert not any(ring.runs for ring in self._rings()), "a ring was never released"
        for stream, frames in self.put.items():
            check_account(
                self.journal, stream, len(frames), self.rows[stream], may_have_gaps=self.lost_by_restore
            )

    def _is_delivered(self) -> bool:
        untaken = any(end > self.taken.get(id(ring), 0) for ring in self._rings() for end, _ in ring.runs)
        return self.lane.is_empty and not untaken


class DeliveryAfterRestore(Delivery):
    """The same with an aggregator whose journal is put back to an earlier state: GAPs, and no livelock."""

    @rule(keep=st.integers(0, 10))
    def journal_is_restored(self, keep):
        self.lost_by_restore = True
        frames = self.journal.frames
        position = frames[len(frames) * keep // 10 - 1][0] if len(frames) * keep // 10 else 0
        self.journal.cut(position)
        self._start_intake()
