"""The intake as a process, against a peer that says anything: what it takes, and acknowledges when."""

from __future__ import annotations

import os
import time

import msgspec
import pytest
import zmq
from edgedaq.frame import HEADER_BYTES, Kind, decode, encode, pack_map
from edgedaq.keys import set_client_keys
from edgedaq.schema import Column, OpenInfo, Schema, encode_open
from edgedaq.session_messages import (
    Ack,
    Ahead,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Reject,
    Resend,
    Unknown,
    Welcome,
    decode_from_intake,
    encode_message,
)
from edgedaq.transport import WINDOW_BYTES, pack_data_header
from edgedaq_aggregator.journal_client import JournalFollower

from tests.agent.hop2 import Hop2, wait_for

HELLO = Hello(protocol_min=1, protocol_max=1, version="1", node="n1", boot="b", instance="i", lanes=["data"])
ROWS = Schema((Column("a", "i4"),))


def open_frame(stream, node="n1", schema=None, topics=("store.X",)):
    info = OpenInfo(
        node=node,
        job="j",
        job_type="J",
        life="0" * 16,
        boot="b",
        topics=topics,
        form="table" if schema else "raw",
        schema=schema,
    )
    return encode_open(stream, info)


def data(stream, seq, *, rows=1, size=100, row0=None):
    body = bytes([seq % 256]) * size
    return encode(
        Kind.RAW, stream, seq, body, rows=rows, row0=seq - 1 if row0 is None else row0, t_first_ns=1
    )


def gap(stream, first, last, rows=None, row0=0):
    body = pack_map({"last": last, "rows": rows, "reason": "test"})
    return encode(Kind.GAP, stream, first, body, row0=row0)


class Talker:
    """A DEALER that says what the test wants."""

    def __init__(self, address, context, enrolment=None):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = -1
        if enrolment is not None:
            set_client_keys(self.socket, enrolment.keys, enrolment.aggregator_key)
        self.socket.connect(address)
        self.sent = 0
        self.credit = WINDOW_BYTES

    def say(self, message):
        self.socket.send(encode_message(message))

    def hello(self, node="n1", *, instance="i", **changes):
        self.say(msgspec.structs.replace(HELLO, node=node, instance=instance, **changes))
        return self.hear(Welcome, Reject)

    def send(self, *frames, position=None, flags=0, count=None, size=None, lane=0):
        part = b"".join(frames)
        start = self.sent if position is None else position
        head = pack_data_header(
            lane, flags, start, len(frames) if count is None else count, len(part) if size is None else size
        )
        self.socket.send_multipart([head, part])
        self.sent = start + len(part)

    def hear(self, *types, limit_s=15.0, skip=(Ack, Pong)):
        deadline = time.monotonic() + limit_s
        while (left := deadline - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                message = decode_from_intake(self.socket.recv())
                if isinstance(message, types):
                    return message
                assert isinstance(message, skip), message
        raise AssertionError(f"never heard {types}")

    def listen(self):
        """Return what has come."""
        found = []
        while self.socket.poll(5):
            found.append(decode_from_intake(self.socket.recv()))
            if isinstance(found[-1], Ack):
                self.credit = found[-1].credit
        return found

    def wait_ack(self, position):
        while True:
            ack = self.hear(Ack)
            if ack.durable >= position:
                assert ack.durable == position
                return ack


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Hop2(runtime_dir, tmp_path) as made:
        yield made


@pytest.fixture
def context():
    with zmq.Context() as made:
        yield made


@pytest.fixture
def intake(hop):
    return hop.intake()


@pytest.fixture
def talk(hop, context):
    made = []

    def begin(node="n1", **changes):
        talker = Talker(f"tcp://127.0.0.1:{hop.port}", context)
        made.append(talker)
        if node:
            assert isinstance(talker.hello(node, **changes), Welcome)
        return talker

    yield begin
    for talker in made:
        talker.socket.close()


def journal(hop):
    return [bytes(record.frame.raw) for record in hop.records()]


def test_what_is_acknowledged_is_in_the_journal_in_order_and_credit_follows(hop, intake, talk):
    talker = talk()
    frames = [open_frame(7), data(7, 1), data(7, 2)]
    talker.send(*frames)
    ack = talker.wait_ack(talker.sent)
    assert ack.credit == talker.sent + WINDOW_BYTES
    intake.kill()
    assert journal(hop) == frames


def test_what_comes_again_is_dropped_and_counted_and_acknowledged_all_the_same(hop, intake, talk):
    frames = [open_frame(7), data(7, 1), data(7, 2)]
    first = talk()
    first.send(*frames)
    first.wait_ack(first.sent)
    second = talk()
    second.send(*frames, data(7, 3))
    second.wait_ack(second.sent)
    wait_for(lambda: intake.extra["nodes"]["n1"]["duplicate_count"] == 3)
    assert intake.extra["nodes"]["n1"]["in_rows"] == 3
    assert intake.stop() == 0
    assert journal(hop) == [*frames, data(7, 3)]


def test_after_a_kill_it_knows_what_it_acknowledged(hop, intake, talk):
    talker = talk()
    talker.send(open_frame(7), data(7, 1))
    talker.wait_ack(talker.sent)
    intake.kill()
    again = hop.intake()
    talker = talk()
    talker.send(data(7, 1), data(7, 2))
    talker.wait_ack(talker.sent)
    assert again.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1), data(7, 2)]


@pytest.mark.parametrize(
    "at_byte", [0, 8, 11, 12, 16, 19, 24, HEADER_BYTES + 3], ids=lambda at_byte: f"byte {at_byte}"
)
def test_a_damaged_part_is_asked_for_again_and_nothing_behind_it_is_taken_before(hop, intake, talk, at_byte):
    talker = talk()
    talker.send(open_frame(7))
    at = talker.sent
    damaged = bytearray(data(7, 1))
    damaged[at_byte] ^= 0x41
    talker.send(bytes(damaged))
    talker.send(data(7, 2))
    resend = talker.hear(Resend)
    assert resend.position == at
    talker.send(data(7, 1), position=at)
    talker.send(data(7, 2))
    talker.wait_ack(talker.sent)
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1), data(7, 2)]


def test_a_stream_without_open_is_unknown_and_frames_that_never_came_are_told(hop, intake, talk):
    talker = talk()
    talker.send(data(7, 5))
    assert talker.hear(Unknown).stream == 7
    talker.send(open_frame(7), data(7, 5), position=0)
    ahead = talker.hear(Ahead)
    assert (ahead.position, ahead.stream, ahead.expected, ahead.seq, ahead.rows) == (0, 7, 1, 5, 4)
    talker.send(open_frame(7), gap(7, 1, 4, rows=4), data(7, 5), position=0)
    talker.wait_ack(talker.sent)
    node = wait_for(lambda: intake.extra["nodes"]["n1"]["gap_count"] and intake.extra["nodes"]["n1"])
    assert node["dropped_rows"] == 4
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), gap(7, 1, 4, rows=4), data(7, 5)]


def test_frames_of_another_nodes_stream_are_refused_and_set_aside(hop, intake, talk):
    owner = talk("n1")
    owner.send(open_frame(7), data(7, 1))
    owner.wait_ack(owner.sent)
    thief = talk("n2")
    thief.send(data(7, 2))
    refused = thief.hear(Refused)
    assert (refused.stream, refused.seq, refused.code) == (7, 2, "node")
    thief.send(open_frame(8, node="n1"), position=0)
    assert thief.hear(Refused).code == "node"
    owner.send(data(7, 2))
    owner.wait_ack(owner.sent)
    bad = hop.hub_state / "bad"
    assert {path.read_bytes() for path in bad.glob("*.bad")} == {data(7, 2), open_frame(8, node="n1")}
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1), data(7, 2)]


def test_ownership_of_streams_survives_a_restart(hop, intake, talk):
    owner = talk("n1")
    owner.send(open_frame(7), data(7, 1))
    owner.wait_ack(owner.sent)
    intake.kill()
    hop.intake()
    thief = talk("n2")
    thief.send(data(7, 2))
    assert thief.hear(Refused).code == "node"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (encode(Kind.PACKED, 7, 1, b"x" * 7, rows=2), "body"),
        (encode(Kind.GAP, 7, 1, b"\xc1"), "body"),
        (encode(Kind.GAP, 7, 1, pack_map({"last": 0, "rows": 1, "reason": ""})), "body"),
        (encode(Kind.CLOSE, 7, 1, b"\x93"), "body"),
        (encode(Kind.OPEN, 8, 0, b"\x80"), "body"),
    ],
    ids=["packed", "gap", "gap order", "close", "open"],
)
def test_a_frame_that_is_wrong_for_what_it_is_is_refused_alone(intake, talk, frame, code):
    talker = talk()
    talker.send(open_frame(7, schema=ROWS), frame, data(7, 1))
    refused = talker.hear(Refused)
    wrong = decode(memoryview(frame))
    assert (refused.stream, refused.seq, refused.code) == (wrong.stream, wrong.seq, code)
    talker.send(open_frame(7, schema=ROWS), gap(7, 1, 1, rows=2), position=0)
    talker.wait_ack(talker.sent)


def test_more_than_the_credit_ends_the_session(intake, talk):
    talker = talk()
    talker.send(open_frame(7), position=WINDOW_BYTES + 8)
    assert talker.hear(Bye).code == "protocol"


def test_who_says_no_hello_is_turned_away_once_and_garbage_changes_nothing(intake, talk):
    stranger = talk(node=None)
    stranger.socket.send(b"\xc1garbage")
    stranger.socket.send_multipart([b"x", b"y", b"z"])
    stranger.say(Ping(t_mono_ns=1, t_utc_ns=1))
    assert stranger.hear(Bye).code == "no_session"
    stranger.send(open_frame(7))
    known = talk()
    known.socket.send(os.urandom(50))
    assert known.hear(Bye).code == "protocol"
    for parts in ([b"a", b"b", b"c"], [b"EDS\x01" + bytes(28), b"x"], [b"short", b"x"]):
        known = talk()
        known.socket.send_multipart(parts)
        assert known.hear(Bye).code in {"protocol", "damaged"}
    talker = talk()
    talker.send(open_frame(9))
    talker.wait_ack(talker.sent)
    assert intake.stop() == 0


def test_another_protocol_or_a_name_that_is_none_is_rejected_with_words(intake, talk):
    talker = talk(node=None)
    reject = talker.hello(protocol_min=2, protocol_max=3)
    assert reject.code == "protocol"
    assert "speaks protocol 1" in reject.text
    assert talker.hello("ALL").code == "node"
    assert talker.hello("../x").code == "node"


def test_the_newest_session_of_a_node_wins_and_clones_are_named(hop, intake, talk):
    first = talk(instance="a")
    second = talk(instance="b")
    assert first.hear(Bye).code == "displaced"
    second.send(open_frame(7))
    second.wait_ack(second.sent)
    first.send(data(7, 1))
    assert first.hear(Bye).code == "no_session"
    assert not hop.logged("node.cloned")
    for instance in ("a", "b", "a"):
        talk(instance=instance)
    wait_for(lambda: hop.logged("node.cloned"))


def test_one_who_says_hello_under_a_thousand_names_holds_up_nobody(hop, intake, talk):
    for number in range(1100):
        if number % 5 == 0:  # more in one connection, and it is cut off
            flooder = talk(node=None)
        assert isinstance(flooder.hello(f"x{number}"), Welcome)
        flooder.say(HELLO)
        assert flooder.hear(Bye).code == "protocol"
    talker = talk("late")
    talker.send(open_frame(7, node="late"))
    talker.wait_ack(talker.sent)
    wait_for(lambda: intake.extra["nodes"]["late"]["connected"])
    connected = [name for name, node in intake.extra["nodes"].items() if node["connected"]]
    assert connected == ["late"]


def test_a_ping_is_answered_with_its_own_times_and_utc(intake, talk):
    talker = talk()
    before = time.time_ns()
    talker.say(Ping(t_mono_ns=123, t_utc_ns=456))
    pong = talker.hear(Pong, skip=())
    assert (pong.t_mono_ns, pong.t_utc_ns) == (123, 456)
    assert before <= pong.received_utc_ns <= pong.sent_utc_ns <= time.time_ns()


def test_a_session_in_which_a_part_got_lost_ends_instead_of_waiting_for_ever(intake, talk):
    talker = talk()
    talker.send(open_frame(7))
    talker.say(Ping(t_mono_ns=1, t_utc_ns=1, sent=[talker.sent]))
    talker.wait_ack(talker.sent)
    talker.say(Ping(t_mono_ns=1, t_utc_ns=1, sent=[talker.sent + 100]))
    assert talker.hear(Bye).code == "protocol"


def test_a_silent_session_ends(intake, talk):
    talk()
    wait_for(lambda: intake.extra["nodes"]["n1"]["connected"])
    wait_for(lambda: not intake.extra["nodes"]["n1"]["connected"], 8)


@pytest.mark.parametrize("segment", [1 << 20, 4 << 20])
def test_a_small_journal_that_was_full_goes_on_too(hop, context, talk, segment):
    intake = hop.intake(segment=segment, limit=4 * segment)
    talker = talk()
    talker.send(open_frame(7))
    seq = 0
    while not intake.extra.get("journal", {}).get("problem"):
        seq += 1
        assert seq < 500
        if talker.sent + 70_000 < talker.credit:
            talker.send(data(7, seq, size=64_000))
        talker.say(Ping(t_mono_ns=1, t_utc_ns=1))
        talker.listen()
    with JournalFollower(
        hop.hub_state / "journal", hop.hub_runtime, "waited_for", None, context=context
    ) as store:

        def is_asked():
            if store.read(50) and store.position is not None:
                store.report(store.position)
            talker.say(Ping(t_mono_ns=1, t_utc_ns=1))
            return any(isinstance(message, Resend) for message in talker.listen())

        wait_for(is_asked)
    assert intake.stop() == 0


def test_a_full_journal_acknowledges_nothing_and_asks_again_once_a_store_has_made_room(hop, context, talk):
    intake = hop.intake(limit=32 << 20)
    talker = talk()
    talker.send(open_frame(7))
    stands_at = None
    seq = 0
    while stands_at is None:
        assert seq < 60, "the journal never got full"
        start = talker.sent
        seq += 1
        talker.send(data(7, seq, size=1 << 20))
        try:
            ack = talker.hear(Ack, limit_s=1.0, skip=(Pong,))
            while ack.durable < talker.sent:
                ack = talker.hear(Ack, limit_s=1.0, skip=(Pong,))
        except AssertionError:
            stands_at = start
        talker.say(Ping(t_mono_ns=1, t_utc_ns=1))
    wait_for(lambda: intake.extra["journal"]["problem"])
    with JournalFollower(
        hop.hub_state / "journal", hop.hub_runtime, "waited_for", None, context=context
    ) as store:
        deadline = time.monotonic() + 8
        resend = None
        while resend is None and time.monotonic() < deadline:
            if store.read(100) and store.position is not None:
                store.report(store.position)
            talker.say(Ping(t_mono_ns=1, t_utc_ns=1))
            try:
                resend = talker.hear(Resend, limit_s=0.05)
            except AssertionError:
                continue
    assert resend is not None
    assert resend.position == stands_at
    talker.send(data(7, seq, size=1 << 20), position=stands_at)
    talker.wait_ack(talker.sent)
    assert intake.stop() == 0


def test_a_port_in_use_is_told_and_is_no_fault_of_the_configuration(hop, intake, talk):
    talk()
    other = Hop2(hop.node_runtime / "other", hop.hub_state / "other")
    with other:
        other.port = hop.port
        assert other.intake().wait() == 1
        assert "another process listens there" in other.log.read_text()
