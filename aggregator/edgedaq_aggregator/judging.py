"""What the intake does with the frames of one part: decisions without I/O.

A part is judged frame by frame, up to its end or the first frame that cannot be taken; what was accepted
before it is kept. The problem is told to the uplink, which goes back to the begin of the part::

    problem     when                                                           the uplink then sends
    Resend      it is no whole frame: damaged on the way                       the same again
    Refused     the frame is wrong for what it is, or not this node's          a GAP in its place
    Unknown     its stream was never opened here (the journal lost it)         the OPEN first
    Ahead       frames before it never came (lost on the node, or here)        them, or a GAP first

Frames that were accepted and are in no table yet are tracked beside it, so that the journal can take a part
in one go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgedaq.delivery import STREAMS_MAX, StreamTable, Verdict, gap_of
from edgedaq.errors import WireError
from edgedaq.frame import DATA_KINDS, Frame, Kind, decode, unpack_map
from edgedaq.names import matches_any
from edgedaq.open_info import OpenInfo, decode_open
from edgedaq.session_messages import TOPIC, Ahead, Refused, Resend, Unknown
from edgedaq.transport import DataHeader

__all__ = ["STREAMS_PER_NODE_MAX", "Judged", "Problem", "StreamFacts", "StreamOwners", "judge_part"]

STREAMS_PER_NODE_MAX = 4096
"""Streams that one node may have open at once."""

Problem = Resend | Refused | Unknown | Ahead

_CLOSED = -1


class StreamFacts(NamedTuple):
    """What of an OPEN matters here.

    ``row_bytes`` is 0 when the stream has no rows of fixed width; ``stores`` are the keys of its
    store_config. A stream without topics is one whose topics were refused: it may hold GAPs, no data.
    """

    node: str
    job: str
    row_bytes: int
    stores: tuple[str, ...] = ()
    has_topics: bool = True
    life: str = ""


class StreamOwners:
    """Which node every stream belongs to; a stream belongs to the node that opened it, for ever."""

    def __init__(self, table: StreamTable) -> None:
        self.facts: dict[int, StreamFacts] = {}
        self._open_count: dict[str, int] = {}
        for state in [*table.tombstones.values(), *table.streams.values()]:
            try:
                info = decode_open(decode(memoryview(state.open_raw)))
            except WireError:
                continue
            self.add(state.stream, info)
            if state.closed:
                self.closed(state.stream)

    def open_count(self, node: str) -> int:
        """Return how many open streams a node has."""
        return self._open_count.get(node, 0)

    def add(self, stream: int, info: OpenInfo) -> None:
        """Record an OPEN that was accepted."""
        schema = info.schema
        row_bytes = schema.row_bytes if schema is not None and schema.is_packed else 0
        if stream not in self.facts:
            self._open_count[info.node] = self.open_count(info.node) + 1
        self.facts[stream] = StreamFacts(
            info.node, info.job, row_bytes, tuple(info.store_config), bool(info.topics), info.life
        )

    def closed(self, stream: int) -> None:
        """Record that a stream has ended."""
        facts = self.facts.get(stream)
        if facts is not None:
            self._open_count[facts.node] = max(self.open_count(facts.node) - 1, 0)

    def forget_expired(self, table: StreamTable) -> None:
        """Drop what the table does not remember any more either."""
        if len(self.facts) > len(table.streams) + len(table.tombstones):
            gone = self.facts.keys() - table.streams.keys() - table.tombstones.keys()
            for stream in gone:
                del self.facts[stream]
            self._open_count = dict(
                Counter(self.facts[stream].node for stream in table.streams if stream in self.facts)
            )


@dataclass(slots=True)
class Judged:
    """What became of a part. ``problem`` is None when all was judged; ``culprit`` is the refused frame."""

    accepted: list[Frame] = field(default_factory=list)
    duplicate_count: int = 0
    rows: int = 0
    body_bytes: int = 0
    gap_count: int = 0
    dropped_rows: int = 0
    samples: list[tuple[str, int]] = field(default_factory=list)
    """Of each accepted frame of data: the job, and when it was put, by the node's monotonic clock."""
    problem: Problem | None = None
    culprit: memoryview | None = None

    @classmethod
    def of(cls, kept: Sequence[Frame], duplicate_count: int) -> Judged:
        """Return the counts of frames that were accepted and kept, where that was not all of a part."""
        judged = cls(duplicate_count=duplicate_count)
        for frame in kept:
            if frame.kind in DATA_KINDS:
                judged.rows += frame.rows
                judged.body_bytes += len(frame.body)
            elif frame.kind is Kind.GAP:
                judged.gap_count += 1
                judged.dropped_rows += gap_of(frame)[1] or 0
        return judged


class _Refusal(Exception):  # noqa: N818  # a verdict inside this module
    def __init__(self, code: str, text: str, *, is_of_stream: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.is_of_stream = is_of_stream
        """No frame of the stream can be taken any more."""


def judge_part(
    table: StreamTable,
    owners: StreamOwners,
    node: str,
    header: DataHeader,
    part: memoryview,
    *,
    topics: Sequence[str] | None = None,
) -> Judged:
    """Judge the frames of one part of a node, in order.

    Args:
        topics: What the node may open streams of; None: all.

    Changes ``owners`` by the streams that are opened and closed, ``table`` not at all: the caller applies
    ``accepted`` to it, in order, before the next part is judged.
    """
    judged = Judged()
    expected: dict[int, int] = {}
    lane, start = header.lane, header.position
    if len(part) != header.part_bytes:
        text = f"the part has {len(part)} bytes, its header says {header.part_bytes}"
        judged.problem = Resend(lane=lane, position=start, text=text)
        return judged
    offset, size = 0, len(part)
    while offset < size:
        try:
            frame = decode(part, offset)
        except WireError as e:
            # Where it is no frame for the uplink either, that one sets it aside.
            judged.problem = Resend(lane=lane, position=start, text=str(e)[:1000])
            return judged
        offset += len(frame.raw)
        stream = frame.stream
        facts = owners.facts.get(stream)
        try:
            verdict = _judge(table, expected, frame, facts, node)
            if verdict is Verdict.DUPLICATE:
                _check_closed(table, frame)
                judged.duplicate_count += 1
                continue
            if verdict is Verdict.UNKNOWN:
                judged.problem = Unknown(lane=lane, position=start, stream=stream)
                return judged
            if verdict is Verdict.AHEAD:
                judged.problem = _ahead(table, judged.accepted, expected, frame, lane, start)
                return judged
            _accept(table, owners, expected, node, frame, facts, judged, topics)
        except _Refusal as e:
            judged.problem = Refused(
                lane=lane,
                position=start,
                stream=stream,
                seq=0 if e.is_of_stream else frame.seq,
                code=e.code,
                text=str(e)[:1000],
            )
            judged.culprit = frame.raw
            return judged
    return judged


def _judge(
    table: StreamTable, expected: dict[int, int], frame: Frame, facts: StreamFacts | None, node: str
) -> Verdict:
    """Like ``StreamTable.judge``, as if what was accepted of this part had been applied."""
    if facts is not None and facts.node != node:
        raise _Refusal("node", f"stream {frame.stream:016x} belongs to node {facts.node!r}, not {node!r}")
    ahead = expected.get(frame.stream)
    try:
        if ahead is None:
            return table.judge(frame)
        if ahead == _CLOSED:
            return Verdict.DUPLICATE
        if frame.seq == ahead:
            return Verdict.ACCEPT
        if frame.seq > ahead:
            return Verdict.AHEAD
        if frame.kind is Kind.GAP and gap_of(frame)[0] >= ahead:
            return Verdict.ACCEPT
    except WireError as e:
        raise _Refusal("body", str(e)) from e
    return Verdict.DUPLICATE


def _check_closed(table: StreamTable, frame: Frame) -> None:
    """Refuse what comes of a stream after the intake itself has closed it: it was never here before."""
    state = table.tombstones.get(frame.stream)
    if state is not None and state.tail_unknown and frame.seq >= state.next_seq:
        text = f"stream {frame.stream:016x} was closed: its node had said that nothing of it is left"
        raise _Refusal("closed", text, is_of_stream=True)


def _ahead(
    table: StreamTable,
    accepted: Iterable[Frame],
    expected: dict[int, int],
    frame: Frame,
    lane: int,
    start: int,
) -> Ahead:
    state = table.streams.get(frame.stream)
    next_seq = expected.get(frame.stream, table.expected(frame.stream))
    next_row: int | None = 0 if state is None else state.next_row
    for earlier in accepted:
        if earlier.stream == frame.stream and earlier.kind is not Kind.OPEN:
            rows = gap_of(earlier)[1] if earlier.kind is Kind.GAP else earlier.rows
            next_row = None if rows is None else earlier.row0 + rows
    missing = None if next_row is None or frame.row0 < next_row else frame.row0 - next_row
    return Ahead(
        lane=lane, position=start, stream=frame.stream, expected=next_seq, seq=frame.seq, rows=missing
    )


def _accept(
    table: StreamTable,
    owners: StreamOwners,
    expected: dict[int, int],
    node: str,
    frame: Frame,
    facts: StreamFacts | None,
    judged: Judged,
    topics: Sequence[str] | None,
) -> None:
    kind, stream = frame.kind, frame.stream
    if kind in DATA_KINDS:
        if facts is not None and not facts.has_topics:
            raise _Refusal(TOPIC, f"stream {stream:016x} was opened without topics")
        if kind is Kind.PACKED and facts is not None:
            _check_packed(frame, facts)
        expected[stream] = frame.seq + 1
        judged.rows += frame.rows
        judged.body_bytes += len(frame.body)
        if facts is not None and frame.t_put_ns:
            judged.samples.append((facts.job, frame.t_put_ns))
    else:
        try:
            if kind is Kind.OPEN:
                _open(table, owners, node, frame, len(expected), topics)
                expected[stream] = 1
            elif kind is Kind.GAP:
                last, rows, _ = gap_of(frame)
                expected[stream] = last + 1
                judged.gap_count += 1
                judged.dropped_rows += rows or 0
            else:
                unpack_map(frame.body)
                expected[stream] = _CLOSED if kind is Kind.CLOSE else frame.seq + 1
                if kind is Kind.CLOSE:
                    owners.closed(stream)
        except WireError as e:
            raise _Refusal("body", str(e)) from e
    judged.accepted.append(frame)


def _open(
    table: StreamTable,
    owners: StreamOwners,
    node: str,
    frame: Frame,
    pending: int,
    topics: Sequence[str] | None,
) -> None:
    info = decode_open(frame)
    if info.node != node:
        raise _Refusal("node", f"stream {frame.stream:016x} names node {info.node!r}, sent by {node!r}")
    if topics is not None:
        for topic in info.topics:
            if not matches_any(topics, (topic,)):
                allowed = ", ".join(topics) or "nothing"
                raise _Refusal(TOPIC, f"node {node!r} may not send {topic!r}, only {allowed}")
    if owners.open_count(node) >= STREAMS_PER_NODE_MAX or len(table.streams) + pending >= STREAMS_MAX:
        raise _Refusal("streams", f"node {node!r} has too many open streams")
    owners.add(frame.stream, info)


def _check_packed(frame: Frame, facts: StreamFacts) -> None:
    if not facts.row_bytes or len(frame.body) != frame.rows * facts.row_bytes:
        text = f"{frame.rows} packed rows need {frame.rows * facts.row_bytes} bytes, got {len(frame.body)}"
        raise _Refusal("body", text)
