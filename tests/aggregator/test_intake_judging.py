"""The decisions of the intake, without sockets."""

from __future__ import annotations

import pytest
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import HEADER_BYTES, Kind, decode, encode, pack_map
from edgedaq.schema import OpenInfo, encode_open
from edgedaq.session_messages import Ack, Ping, Refused, Resend
from edgedaq.stats import QuantileSketch
from edgedaq.transport import DataHeader
from edgedaq_aggregator.judging import STREAMS_PER_NODE_MAX, StreamOwners, judge_part
from edgedaq_aggregator.nodes import NodeCounts
from edgedaq_aggregator.sessions import Check, IntakeLane, Take
from hypothesis import given, settings
from hypothesis import strategies as st

S = 1_000_000_000


def open_frame(stream, node="n1"):
    info = OpenInfo(
        node=node, job="j", job_type="J", life="0" * 16, boot="b", topics=("store.X",), form="raw"
    )
    return encode_open(stream, info)


def data(stream, seq, rows=2):
    return encode(Kind.RAW, stream, seq, b"x" * 50, rows=rows, row0=rows * (seq - 1), t_put_ns=S)


def close(stream, seq):
    return encode(Kind.CLOSE, stream, seq, pack_map({"rows": 1, "tail_unknown": False}))


def judge(part, table=None, owners=None, node="n1"):
    table = table if table is not None else StreamTable()
    owners = owners if owners is not None else StreamOwners(table)
    judged = judge_part(table, owners, node, DataHeader(0, 0, 0, 1, len(part)), memoryview(part))
    for frame in judged.accepted:
        table.apply(frame)
    return judged, table, owners


def header(position, size):
    return DataHeader(0, 0, position, 1, size)


def test_frames_of_one_part_are_judged_as_if_those_before_them_were_kept():
    part = [open_frame(7), data(7, 1), data(7, 1), data(7, 2), close(7, 3), data(7, 4), open_frame(7)]
    judged, table, _ = judge(b"".join(part))
    assert [frame.seq for frame in judged.accepted] == [0, 1, 2, 3]
    assert judged.duplicate_count == 3
    assert judged.problem is None
    assert (judged.rows, judged.body_bytes) == (4, 100)
    assert judged.samples == [("j", S), ("j", S)]
    assert table.tombstones[7].rows == 4


def test_what_was_accepted_before_a_problem_is_kept():
    damaged = bytearray(data(7, 2))
    damaged[-1] ^= 1
    judged, _, _ = judge(open_frame(7) + data(7, 1) + bytes(damaged) + data(7, 3))
    assert [frame.seq for frame in judged.accepted] == [0, 1]
    assert isinstance(judged.problem, Resend)


def test_any_bit_that_is_flipped_on_the_way_leads_to_a_resend_and_never_to_a_verdict():
    part = open_frame(7) + data(7, 1) + data(7, 2)
    _, table, owners = judge(open_frame(7))
    begin = len(open_frame(7)) + len(data(7, 1))
    for bit in range(8 * begin, 8 * (begin + HEADER_BYTES + 8)):
        flipped = bytearray(part)
        flipped[bit // 8] ^= 1 << bit % 8
        judged = judge_part(table, owners, "n1", header(0, len(flipped)), memoryview(flipped))
        assert isinstance(judged.problem, Resend), bit
        assert [frame.seq for frame in judged.accepted] == [1]


def test_a_part_of_another_length_than_its_header_says_is_damage():
    judged = judge_part(
        StreamTable(), StreamOwners(StreamTable()), "n1", DataHeader(0, 0, 0, 1, 5), memoryview(b"1234")
    )
    assert isinstance(judged.problem, Resend)


def test_one_node_cannot_open_streams_without_end_and_closed_ones_make_room():
    table, owners = StreamTable(), StreamOwners(StreamTable())
    for stream in range(1, STREAMS_PER_NODE_MAX + 1):
        owners.add(stream, _info())
    judged, *_ = judge(open_frame(99_999), table, owners)
    assert isinstance(judged.problem, Refused)
    assert judged.problem.code == "streams"
    judged, *_ = judge(open_frame(99_999, "n2"), table, owners, node="n2")
    assert judged.problem is None
    owners.closed(1)
    judged, *_ = judge(open_frame(88_888), table, owners)
    assert judged.problem is None


def _info():
    return OpenInfo(node="n1", job="j", job_type="J", life="0" * 16, boot="b", topics=(), form="raw")


def test_owners_are_restored_from_the_table_and_forgotten_with_it():
    _, table, _ = judge(open_frame(7) + data(7, 1) + close(7, 2) + open_frame(8))
    owners = StreamOwners(table)
    assert owners.open_count("n1") == 1
    assert {stream: facts.node for stream, facts in owners.facts.items()} == {7: "n1", 8: "n1"}
    table.tombstones.clear()
    owners.forget_expired(table)
    assert list(owners.facts) == [8]
    assert owners.open_count("n1") == 1


@settings(max_examples=150)
@given(st.lists(st.sampled_from([open_frame(7), data(7, 1), data(7, 2), close(7, 3), data(8, 1)])), st.data())
def test_garbled_parts_are_judged_without_another_error_and_what_is_accepted_is_whole(frames, choose):
    part = bytearray(b"".join(frames))
    for _ in range(choose.draw(st.integers(0, 3))):
        if part:
            part[choose.draw(st.integers(0, len(part) - 1))] = choose.draw(st.integers(0, 255))
    del part[choose.draw(st.integers(0, len(part))) :]
    judged, *_ = judge(bytes(part))
    for frame in judged.accepted:
        assert bytes(frame.raw) in frames


def test_parts_are_taken_in_order_within_the_credit_only():
    lane = IntakeLane(0, 1000)
    assert lane.take(header(0, 1001)) is Take.VIOLATION
    assert lane.take(header(8, 10)) is Take.VIOLATION
    assert lane.take(header(0, 1000)) is Take.JUDGE
    lane.keep(1000, 5000, [])
    assert lane.take(header(1000, 8)) is Take.VIOLATION
    assert lane.take(header(0, 8)) is Take.VIOLATION


def test_while_it_stands_still_only_the_position_it_stands_at_is_taken():
    lane = IntakeLane(0, 1000)
    lane.stand_still()
    assert lane.take(header(100, 10)) is Take.IGNORE
    assert lane.take(header(0, 10)) is Take.JUDGE
    assert lane.take(header(100, 10)) is Take.VIOLATION


def test_what_a_ping_says_was_sent_shows_a_loss_and_a_peer_that_did_not_go_back():
    lane = IntakeLane(0, 1000)
    lane.keep(100, 5000, [])
    assert lane.check(100) is Check.FINE
    assert lane.check(200) is Check.LOST
    lane.stand_still()
    assert [lane.check(200) for _ in range(3)] == [Check.FINE, Check.TELL_AGAIN, Check.TELL_AGAIN]
    assert lane.check(100) is Check.FINE
    assert lane.check(200) is Check.FINE
    lane.stand_still(for_room=True)
    assert [lane.check(200) for _ in range(3)] == [Check.FINE] * 3


def test_a_part_is_acknowledged_when_the_journal_is_durable_behind_it_and_not_before():
    lane = IntakeLane(0, 1000)
    lane.keep(100, 5000, [("j", 1)])
    lane.keep(50, 5000, [])  # of duplicates alone: what it repeats is not durable either
    assert lane.durable(4999) == []
    assert lane.owed_ack() == Ack(lane=0, durable=0, credit=1000)
    lane.ack_sent()
    assert lane.owed_ack() is None
    assert lane.durable(5000) == [("j", 1)]
    assert lane.owed_ack() == Ack(lane=0, durable=150, credit=1150)


def test_what_waits_to_be_durable_is_bounded_and_merging_never_acknowledges_early():
    lane = IntakeLane(0, 1 << 40)
    for number in range(1, 10_000):
        lane.keep(8, 100 * number, [])
    assert len(lane.pending) <= 4096
    for number in range(1, 10_000, 50):
        lane.durable(100 * number)
        assert lane.acked <= 8 * number
    lane.durable(10**9)
    assert lane.acked == 8 * 9999


def test_latency_is_corrected_by_the_clock_offset_and_unknown_before_it_is_measured():
    counts = NodeCounts()
    counts.add_latencies([("j", 10 * S)], 105 * S, 0)
    assert counts.to_map(0)["latency"] == []
    # The aggregator's clock is 6 s behind the node's, which reads 100 s more than its monotonic clock.
    counts.take_clock(Ping(t_mono_ns=3 * S, t_utc_ns=103 * S, offset_ns=-6 * S, error_ns=1))
    counts.add_latencies([("j", 10 * S)], 105 * S, 0)
    sketch = QuantileSketch.from_list(counts.to_map(0)["latency"])
    assert sketch.quantile(0.5) == pytest.approx(1.0, rel=0.03)
    assert list(counts.to_map(0)["latency_by_job"]) == ["j"]
    # The node's clock steps by an hour, and has not measured its offset again.
    counts.take_clock(Ping(t_mono_ns=4 * S, t_utc_ns=3704 * S))
    counts.add_latencies([("j", 11 * S)], 106 * S, 0)
    counts.take_clock(Ping(t_mono_ns=5 * S, t_utc_ns=3705 * S, offset_ns=-3606 * S, error_ns=1))
    counts.add_latencies([("j", 12 * S)], 107 * S, 0)
    sketch = QuantileSketch.from_list(counts.to_map(0)["latency"])
    assert sketch.quantile(0.99) == pytest.approx(1.0, rel=0.03)


def test_an_open_whose_frame_is_not_valid_never_reaches_the_owners():
    table = StreamTable()
    owners = StreamOwners(table)
    judged, *_ = judge(encode(Kind.OPEN, 9, 0, b"\x80"), table, owners)
    assert isinstance(judged.problem, Refused)
    assert not owners.facts
    with pytest.raises(WireError):
        decode(memoryview(b""))
