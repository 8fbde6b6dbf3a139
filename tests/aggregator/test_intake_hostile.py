"""Anything on the port of the intake: it stays up and small, counts by reason, and disturbs nobody else."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time

import msgspec
import psutil
import pytest
import zmq
from edgedaq.log_limit import LogBudget
from edgedaq.session_messages import Ack, Bye, Hello, Join, Resend, Welcome, encode_message
from edgedaq_aggregator.refusals import GARBAGE, STRAY, Refusals

from tests.agent.hop2 import wait_for
from tests.agent.keyed import Keyed
from tests.aggregator.test_intake import HELLO, Talker, data, open_frame

MIB = 1 << 20
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01"


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Keyed(runtime_dir, tmp_path) as made:
        yield made


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(0)


@pytest.fixture
def intake(hop):
    worker = hop.intake()
    wait_for(lambda: worker.extra.get("listen"))
    return worker


def rss(worker):
    return psutil.Process(worker.process.pid).memory_info().rss


def refused(intake, reason):
    return intake.extra["security"]["refused"].get(reason, {}).get("count", 0)


class Victim(Talker):
    """A node that behaves, and notices when it is disturbed."""

    def __init__(self, hop, context):
        super().__init__(hop.address, context, hop.enrol("victim"))
        assert isinstance(self.hello("victim"), Welcome)
        self.send(open_frame(99, node="victim"))
        self.seq = 0

    def works(self):
        self.seq += 1
        self.send(data(99, self.seq))
        begun = time.monotonic()
        self.wait_ack(self.sent)
        assert time.monotonic() - begun < 10.0


def test_bytes_of_any_kind_on_the_port_are_counted_and_leave_nothing(hop, intake, context):
    victim = Victim(hop, context)
    victim.works()
    before = rss(intake)
    chance = random.Random(1)
    kinds = [
        lambda: chance.randbytes(chance.randrange(1, 2000)),
        lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda: GREETING[: chance.randrange(1, 12)],
        lambda: GREETING + b"CURVE".ljust(20, b"\0") + b"\0" * 32 + chance.randbytes(300),
        lambda: GREETING + b"NULL".ljust(20, b"\0") + b"\0" * 32 + b"\x04\x26\x05READY" + bytes(31),
        lambda: GREETING + b"CURVE".ljust(20, b"\0") + b"\0" * 32 + b"\x06" + (1 << 62).to_bytes(8, "big"),
        lambda: b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + chance.randbytes(500),
    ]
    held = []
    for number in range(700):
        attacker = socket.create_connection(("127.0.0.1", hop.port))
        attacker.sendall(kinds[number % len(kinds)]())
        held.append(attacker)
        if number % 100 == 0:
            victim.works()
            victim.listen()
    wait_for(lambda: refused(intake, "no handshake of ours"))
    process = psutil.Process(intake.process.pid)
    wait_for(lambda: len(process.net_connections(kind="tcp")) < 20, 20)  # who never finishes is cut after 3 s
    for attacker in held:
        attacker.close()
    victim.works()
    assert rss(intake) - before < 100 * MIB
    victim.socket.close()
    assert intake.stop() == 0
    assert 0 < len(hop.logged("peer.refused")) < 40


def test_a_node_that_repeats_garbage_is_cut_off_with_an_alarm_and_nobody_else_is(hop, intake, context):
    victim = Victim(hop, context)
    mine = hop.enrol("bad")
    bad = Talker(hop.address, context, mine)
    events = bad.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    assert isinstance(bad.hello("bad"), Welcome)
    for _ in range(5):
        bad.socket.send(os.urandom(100))
        bad.socket.send_multipart([b"a", b"b", b"c"])
    assert bad.hear(Bye).code == "protocol"
    assert events.poll(3000)
    bad.socket.disable_monitor()
    events.close()
    wait_for(lambda: hop.logged("peer.cut_off"))
    again = Talker(hop.address, context, mine)
    assert not again.socket.poll(500)
    wait_for(lambda: refused(intake, "barred key"))
    assert intake.extra["security"]["cut_off"] == 1
    victim.works()
    for talker in (victim, bad, again):
        talker.socket.close()
    assert intake.stop() == 0


def test_a_node_that_sends_the_same_refused_frame_for_ever_loses_its_session(hop, intake, context):
    bad = Talker(hop.address, context, hop.enrol("bad"))
    assert isinstance(bad.hello("bad"), Welcome)
    damaged = bytearray(open_frame(7, node="bad"))
    damaged[-1] ^= 1
    for _ in range(51):
        bad.send(bytes(damaged), position=0)
    assert bad.hear(Bye, skip=(Ack, Resend)).code == "stuck"
    bad.socket.close()


def test_a_flood_of_sessions_and_strangers_leaves_memory_bounded_and_others_alone(hop, intake, context):
    victim = Victim(hop, context)
    mine = hop.enrol("n1")
    hop.token("n2")  # so that strangers get as far as they ever do
    before = rss(intake)
    held = []
    for number in range(300):
        talker = Talker(hop.address, context, mine if number % 3 == 0 else hop.stranger())
        talker.socket.sndtimeo = 500
        held.append(talker)
        with contextlib.suppress(zmq.Again):  # refused already
            if number % 3 == 0:
                talker.say(msgspec.structs.replace(HELLO, instance=str(number)))
            elif number % 3 == 1:
                talker.say(Join(node="n2", secret=os.urandom(16)))
            else:
                talker.socket.send_multipart([os.urandom(40), os.urandom(1 << 16)])
        if number % 50 == 49:
            victim.works()
            victim.listen()
            while held:
                held.pop().socket.close()
    for reason in ("too many strangers", "no such invitation", "outside of a session"):
        wait_for(lambda: refused(intake, reason))  # noqa: B023  # called at once
    victim.works()
    assert rss(intake) - before < 100 * MIB
    victim.socket.close()
    assert intake.stop() == 0
    assert len(hop.logged("session.")) < 210


def test_messages_as_large_as_any_are_refused_without_keeping_them(hop, intake, context):
    mine = hop.enrol("n1")
    before = rss(intake)
    for _ in range(6):
        talker = Talker(hop.address, context, mine)
        assert isinstance(talker.hello(), Welcome)
        talker.socket.sndtimeo = 2000
        for _ in range(4):
            talker.socket.send_multipart([b"x" * (4 * MIB), b"y" * (4 * MIB)])
        assert talker.hear(Bye).code in {"damaged", "displaced", "no_session"}
        talker.socket.close()
    wait_for(lambda: rss(intake) - before < 200 * MIB)
    assert intake.stop() == 0


def test_weights_of_what_is_refused_bar_who_repeats_it_and_forgive_who_stops():
    now = 10**12
    refusals = Refusals()
    assert not any(refusals.strike("a", GARBAGE, now) for _ in range(9))
    assert refusals.strike("a", GARBAGE, now)
    assert not any(refusals.strike("b", STRAY, now) for _ in range(999))
    assert refusals.strike("b", STRAY, now)
    assert not any(refusals.strike("c", GARBAGE, now + at * 5 * 10**9) for at in range(100))
    refusals.bar("a", now)
    assert refusals.is_barred("a", now + 10**9)
    assert not refusals.is_barred("b", now)
    assert not refusals.is_barred("a", now + 31 * 10**9)
    for number in range(5000):
        refusals.strike(str(number), STRAY, now)
        refusals.bar(str(number), now)
    assert len(refusals._strikes) <= 1024
    assert len(refusals._barred) <= 1024


def test_a_hello_longer_than_any_is_refused(hop, intake, context):
    talker = Talker(hop.address, context, hop.enrol("n1"))
    raw = encode_message(
        Hello(
            protocol_min=1,
            protocol_max=1,
            version="1",
            node="n" * 100_000,
            boot="b",
            instance="i",
            lanes=["data"] * 10_000,
        )
    )
    talker.socket.send(raw)
    wait_for(lambda: refused(intake, "not a message of ours"))
    talker.socket.close()


def test_a_budget_of_lines_says_how_many_it_left_out():
    budget = LogBudget(2, 10)
    assert [budget.take(now) for now in (0, 1, 2, 3)] == [(True, 0), (True, 0), (False, 0), (False, 0)]
    assert budget.take(10) == (True, 2)
    assert budget.take(11) == (True, 0)
