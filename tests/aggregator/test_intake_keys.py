"""The intake with keys: who gets in, as whom, for how long, and what everybody else gets to do: nothing."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

import msgspec
import pytest
import zmq
from edgedaq.clock import iso_utc, utc_ns
from edgedaq.delivery import gap_of
from edgedaq.frame import Kind
from edgedaq.keys import ENROLMENT_NAME, new_key_pair, unpack_token, write_enrolment
from edgedaq.session_messages import Bye, Join, Joined, Refused, Reject, Welcome
from edgedaq_agent.join import JoinError, join

from tests.agent.hop2 import rings_of, wait_for
from tests.agent.keyed import Keyed
from tests.aggregator.test_intake import Talker, data, journal, open_frame


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


@pytest.fixture
def talk(hop, context):
    made = []

    def begin(enrolment, *, routing_id=b""):
        talker = Talker(hop.address, context, enrolment)
        made.append(talker)
        return talker

    yield begin
    for talker in made:
        talker.socket.close()


def refused(intake):
    return intake.extra["security"]["refused"]


def wait_refused(intake, reason, limit_s=20.0):
    return wait_for(lambda: refused(intake).get(reason), limit_s)


def is_silent(talker, within_ms=700):
    return not talker.socket.poll(within_ms)


def test_a_node_that_is_let_in_has_a_session_and_its_data_arrives(hop, intake, talk):
    talker = talk(hop.enrol())
    assert isinstance(talker.hello(), Welcome)
    talker.send(open_frame(7), data(7, 1))
    talker.wait_ack(talker.sent)
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1)]


def test_an_unknown_key_reaches_nothing_and_both_sides_say_so_at_once(hop, intake, talk):
    hop.enrol()
    write_enrolment(hop.enrolment, hop.stranger())
    uplink = hop.uplink()
    wait_for(lambda: uplink.extra.get("link"))
    wait_for(lambda: "lets no such key in" in uplink.extra["reason"], 20.0)
    assert "127.0.0.1" in wait_refused(intake, "unknown key")["who"]
    assert any("unknown key" in line for line in intake.extra["security"]["told"])
    stranger = talk(hop.stranger())
    stranger.say(msgspec.structs.replace(Join(node="n1", secret=b"x" * 16)))
    stranger.send(open_frame(7))
    assert is_silent(stranger)
    assert "not a message of ours" not in refused(intake)
    assert "outside of a session" not in refused(intake)
    assert hop.logged("peer.refused")
    assert hop.logged("session.refused")
    assert intake.extra["streams"] == {}


def test_without_a_key_nothing_is_reached_and_both_sides_say_so(hop, intake):
    uplink = hop.uplink(enrolment="")
    wait_for(lambda: uplink.extra.get("link"))
    wait_for(lambda: "has to join" in uplink.extra["reason"], 20.0)
    wait_refused(intake, "keys on one side only")


def test_a_node_with_a_key_says_that_the_aggregator_has_none(hop, runtime_dir, tmp_path):
    hop.enrol()
    plain = super(Keyed, hop).intake()
    uplink = hop.uplink()
    wait_for(lambda: uplink.extra.get("link"))
    wait_for(lambda: "has no keys" in uplink.extra["reason"], 20.0)
    wait_for(lambda: refused(plain).get("keys on one side only"), 20.0)


def test_a_node_talks_to_no_other_than_its_own_aggregator(hop, intake):
    enrolment = hop.enrol()
    write_enrolment(hop.enrolment, msgspec.structs.replace(enrolment, aggregator_key=new_key_pair().public))
    uplink = hop.uplink()
    wait_for(lambda: uplink.extra.get("link"))
    wait_for(lambda: "not the aggregator that this node joined" in uplink.extra["reason"], 20.0)
    wait_refused(intake, "meant for another aggregator's key")


def test_a_revoked_node_loses_its_session_and_its_connection_at_once_and_others_do_not(hop, intake, talk):
    victim, other = talk(hop.enrol("n1")), talk(hop.enrol("n2"))
    assert isinstance(victim.hello("n1"), Welcome)
    assert isinstance(other.hello("n2"), Welcome)
    victim.send(open_frame(7), data(7, 1))
    victim.wait_ack(victim.sent)
    events = victim.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    hop.nodes_file.revoke("n1", utc_ns())
    begun = time.monotonic()
    assert victim.hear(Bye).code == "revoked"
    assert time.monotonic() - begun < 5.0
    with contextlib.suppress(zmq.Again):
        victim.send(data(7, 2))
    assert events.poll(2000)
    victim.socket.disable_monitor()
    events.close()
    wait_refused(intake, "revoked key")
    other.send(open_frame(8, node="n2"), data(8, 1))
    other.wait_ack(other.sent)
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1), open_frame(8, node="n2"), data(8, 1)]


def test_a_key_is_valid_until_it_expires_also_while_it_has_a_session(hop, intake, talk):
    talker = talk(hop.enrol(expires=iso_utc(utc_ns() + 2_500_000_000)))
    assert isinstance(talker.hello(), Welcome)
    assert talker.hear(Bye).code == "revoked"
    again = talk(hop.stranger())
    assert is_silent(again, 100)
    wait_refused(intake, "expired key")


def test_the_node_is_that_of_the_key_whatever_hello_says(hop, intake, talk):
    hop.enrol("n2")
    liar = talk(hop.enrol("n1"))
    reject = liar.hello("n2")
    assert (reject.code, isinstance(reject, Reject)) == ("key", True)
    assert "'n1'" in reject.text
    wait_refused(intake, "another node's name")
    assert "n2" not in intake.extra["nodes"]


def test_who_takes_a_victims_routing_id_does_not_speak_in_its_session(hop, intake, context, talk):
    """Clients of libzmq cannot choose the ids that it gives; so the victim has one of its own choice here."""
    victim = Talker.__new__(Talker)
    sockets = []

    def begin(enrolment):
        made = context.socket(zmq.DEALER)
        made.setsockopt(zmq.IDENTITY, b"same")
        talker = Talker(hop.address, _Given(made), enrolment)
        sockets.append(talker.socket)
        return talker

    victim = begin(hop.enrol("n1"))
    assert isinstance(victim.hello(), Welcome)
    victim.send(open_frame(7))
    victim.wait_ack(victim.sent)
    position = victim.sent
    victim.socket.close()
    thief = begin(hop.enrol("n2"))
    thief.send(data(7, 1), position=position)
    assert thief.hear(Bye).code == "no_session"
    assert isinstance(thief.hello("n2"), Welcome)
    thief.send(data(7, 1), position=0)
    assert thief.hear(Refused).code == "node"
    for held in sockets:
        held.close()
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7)]


class _Given:
    """In place of a context: gives out a socket that was prepared."""

    def __init__(self, made):
        self._made = made

    def socket(self, _kind):
        return self._made


def test_a_session_that_was_recorded_on_the_wire_cannot_be_played_again(hop, intake, context, talk):
    enrolment = hop.enrol()
    with _Recorder(hop.port) as recorder:
        talker = Talker(f"tcp://127.0.0.1:{recorder.port}", context, enrolment)
        assert isinstance(talker.hello(), Welcome)
        talker.send(open_frame(7), data(7, 1))
        talker.wait_ack(talker.sent)
        talker.socket.close()
        recorded = recorder.finish()
    assert len(recorded) > 500
    wait_for(lambda: intake.extra["nodes"]["n1"]["duplicate_count"] == 0)
    before = dict(refused(intake))
    with socket.create_connection(("127.0.0.1", hop.port)) as attacker:
        attacker.sendall(recorded)
        attacker.settimeout(5)
        while attacker.recv(4096):
            continue
    wait_for(lambda: refused(intake) != before, 20.0)
    assert not {"not a message of ours", "outside of a session"} & set(refused(intake))
    assert intake.extra["nodes"]["n1"]["duplicate_count"] == 0
    assert intake.stop() == 0
    assert journal(hop) == [open_frame(7), data(7, 1)]


class _Recorder:
    """A TCP relay for one connection that keeps what the client sent."""

    def __init__(self, target_port):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = target_port
        self._recorded = bytearray()
        self._thread = threading.Thread(target=self._relay)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.close()
        self._thread.join()

    def finish(self):
        self._thread.join(5)
        return bytes(self._recorded)

    def _relay(self):
        client, _ = self._server.accept()
        with client, socket.create_connection(("127.0.0.1", self._target)) as target:
            while True:
                for ready in select.select([client, target], [], [])[0]:
                    try:
                        chunk = ready.recv(65536)
                    except OSError:
                        return
                    if not chunk:
                        return
                    if ready is client:
                        self._recorded += chunk
                        target.sendall(chunk)
                    else:
                        client.sendall(chunk)


def test_an_invitation_lets_one_key_in_once_and_a_repeated_join_of_that_key_is_told_yes(hop, intake, talk):
    token = unpack_token(hop.token("n1"))
    asked = Join(node="n1", secret=token.secret)
    mine = hop.stranger()
    first = talk(mine)
    first.say(asked)
    assert first.hear(Joined).node == "n1"
    again = talk(mine)
    again.say(asked)
    assert again.hear(Joined).node == "n1"
    hop.token("n9")  # while it is open, strangers get as far as JOIN
    thief = talk(hop.stranger())
    thief.say(asked)
    assert thief.hear(Reject).code == "token"
    wait_refused(intake, "no such invitation")
    talker = talk(mine)
    assert isinstance(talker.hello(), Welcome)


def test_a_stranger_gets_nowhere_but_to_join_while_an_invitation_is_open(hop, intake, talk):
    hop.token("n9")
    hop.enrol("n1")
    guest = talk(hop.stranger())
    assert guest.hello("n1").code == "key"
    wait_refused(intake, "unknown key")
    guest = talk(hop.stranger())
    guest.send(open_frame(7))
    assert guest.hear(Bye).code == "no_session"
    wait_refused(intake, "outside of a session")
    assert intake.stop() == 0
    assert intake.extra["streams"] == {}


def test_an_invitation_outlives_a_restart_of_the_aggregator_but_not_its_hour(hop, intake, tmp_path):
    token = hop.token("n1")
    old = unpack_token(token)
    intake.kill()
    again = hop.intake()
    wait_for(lambda: again.extra.get("listen"))
    enrolment = join(tmp_path / "card", hop.address, token)
    assert (enrolment.node, old.aggregator_key) == ("n1", enrolment.aggregator_key)
    late = hop.token("n2")
    text = hop.nodes_file.path.read_text()
    held = hop.nodes_file.read()["n2"].invitation
    hop.nodes_file.path.write_text(text.replace(held.until, iso_utc(utc_ns() - 1_000_000_000)))
    wait_for(lambda: len(hop.logged("nodes.read")) >= 3)
    with pytest.raises(JoinError, match="not valid"):
        join(tmp_path / "late", hop.address, late)


def test_a_node_that_joins_while_its_uplink_waits_is_up_without_a_restart(hop, intake, tmp_path):
    card = tmp_path / "card"
    token = hop.token("n1")
    uplink = hop.uplink(enrolment=str(card / ENROLMENT_NAME), port=hop.port)
    wait_for(lambda: uplink.extra.get("link"))
    assert "has to join" in wait_for(lambda: uplink.extra["reason"])
    enrolment = join(card, hop.address, token)
    wait_for(lambda: uplink.extra["link"] == "up", 20.0)
    assert (card / ENROLMENT_NAME).stat().st_mode & 0o777 == 0o600
    assert enrolment.secret_key not in hop.nodes_file.path.read_text()


def test_a_broken_file_of_nodes_keeps_what_held_and_is_told_and_lets_nobody_in_at_a_start(hop, intake, talk):
    mine = hop.enrol()
    talker = talk(mine)
    assert isinstance(talker.hello(), Welcome)
    good = hop.nodes_file.path.read_text()
    hop.nodes_file.path.write_text(good.replace("key =", "kye ="))
    wait_for(lambda: "kye" in intake.extra["security"]["problem"])
    talker.send(open_frame(7))
    talker.wait_ack(talker.sent)
    intake.kill()
    again = hop.intake()
    wait_for(lambda: "kye" in again.extra.get("security", {}).get("problem", ""))
    outsider = talk(mine)
    assert is_silent(outsider)
    hop.nodes_file.path.write_text(good)
    wait_for(lambda: not again.extra["security"]["problem"])
    assert isinstance(talk(mine).hello(), Welcome)


def test_a_clone_is_alarmed_and_the_node_still_delivers(hop, intake, talk):
    mine = hop.enrol()
    for instance in ("a", "b", "a"):
        talker = talk(mine)
        assert isinstance(talker.hello(instance=instance), Welcome)
    talker = talk(mine)
    assert isinstance(talker.hello(instance="b"), Welcome)
    wait_for(lambda: hop.logged("node.cloned"))
    wait_for(lambda: any("cloned" in line for line in intake.extra["security"]["told"]))
    talker.send(open_frame(7), data(7, 1))
    talker.wait_ack(talker.sent)


def test_topics_that_a_node_may_not_send_become_a_gap_and_the_lane_moves_on(hop, intake):
    hop.enrol(topics=("store.Y", "stats"))
    uplink = hop.uplink()
    assert hop.job("bad", count=50, store="X").wait() == 0
    wait_for(lambda: uplink.extra.get("refused"))
    assert hop.job("good", count=60, store="Y").wait() == 0
    wait_for(lambda: not rings_of(hop))
    node = wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] == 60 and intake.extra["nodes"]["n1"])
    assert node["dropped_rows"] == 50
    uplink.kill()  # the next one does not know what was refused, and the rest is refused all the same
    again = hop.uplink()
    assert hop.job("bad", count=7, store="X").wait() == 0
    wait_for(lambda: intake.extra["nodes"]["n1"]["dropped_rows"] == 57)
    assert again.stop() == 0
    assert intake.stop() == 0
    held = sorted(hop.numbers().values())
    assert [number for numbers in held for number in numbers if number >= 0] == list(range(60))
    assert -sum(number for numbers in held for number in numbers if number < 0) == 57
    reasons = {gap_of(record.frame)[2] for record in hop.records() if record.frame.kind is Kind.GAP}
    assert reasons == {"refused: topic: node 'n1' may not send 'store.X', only store.Y, stats"}
    assert list((hop.node_state / "bad").glob("*.bad"))


def test_data_of_a_stream_without_topics_is_refused(hop, intake, talk):
    talker = talk(hop.enrol(topics=("store.Y",)))
    assert isinstance(talker.hello(), Welcome)
    talker.send(open_frame(7))
    assert talker.hear(Refused).code == "topic"
    talker.send(open_frame(7, topics=()), data(7, 1), position=0)
    refusal = talker.hear(Refused)
    assert (refusal.code, refusal.seq) == ("topic", 1)
