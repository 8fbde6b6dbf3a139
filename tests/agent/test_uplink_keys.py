"""Nodes whose card was copied, or restored from an old copy; and the files that ``join`` leaves."""

from __future__ import annotations

import shutil
import socket
import threading

import pytest
from edgedaq.errors import ConfigError
from edgedaq.keys import (
    AGGREGATOR_KEY_NAME,
    ENROLMENT_NAME,
    Token,
    aggregator_keys,
    enrolment_path,
    new_key_pair,
    pack_token,
    read_enrolment,
    unpack_token,
    write_enrolment,
)
from edgedaq_agent.dialling import Dialling
from edgedaq_agent.join import JoinError, join

from tests.agent.hop2 import free_port, rings_of, wait_for
from tests.agent.keyed import Keyed


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Keyed(runtime_dir, tmp_path) as made:
        yield made


def test_a_cloned_card_is_alarmed_and_what_both_put_is_there_once(hop, runtime_dir, tmp_path):
    intake = hop.intake()
    wait_for(lambda: intake.extra.get("listen"))
    hop.enrol()
    with hop.beside(runtime_dir / "2", tmp_path / "2") as clone:
        shutil.copy(hop.enrolment, clone.enrolment)
        hop.uplink()
        clone.uplink()
        wait_for(lambda: hop.logged("node.cloned"), 60)
        wait_for(lambda: any("cloned" in line for line in intake.extra["security"]["told"]))
        assert hop.job(count=300).wait() == 0
        assert clone.job(count=200).wait() == 0
        wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] == 500, 40)
    assert intake.stop() == 0
    held = sorted(numbers for numbers in hop.numbers().values() if numbers)
    assert held == [list(range(200)), list(range(300))]


def test_a_node_that_is_restored_from_an_old_card_is_let_in_and_nothing_is_there_twice(hop):
    intake = hop.intake()
    wait_for(lambda: intake.extra.get("listen"))
    hop.enrol()
    away = hop.uplink(port=free_port())
    assert hop.job(count=400).wait() == 0
    wait_for(lambda: not rings_of(hop))
    assert away.stop() == 0
    backup = hop.node_state.with_name("backup")
    shutil.copytree(hop.node_state, backup)
    uplink = hop.uplink()
    wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] == 400)
    assert uplink.stop() == 0
    shutil.rmtree(hop.node_state)
    shutil.copytree(backup, hop.node_state)
    restored = hop.uplink()
    wait_for(lambda: restored.extra.get("link") == "up")
    wait_for(lambda: intake.extra["nodes"]["n1"]["duplicate_count"])
    assert hop.job(count=100).wait() == 0
    wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] == 500)
    assert restored.stop() == 0
    assert intake.stop() == 0
    assert not hop.logged("node.cloned")
    held = sorted(numbers for numbers in hop.numbers().values() if numbers)
    assert held == [list(range(100)), list(range(400))]


def test_a_token_says_what_it_was_made_of_and_every_damage_to_it_is_told(tmp_path):
    token = Token("hall-b_3", new_key_pair().public, bytes(range(16)))
    text = pack_token(token)
    assert unpack_token(f" {text}\n") == token
    for at in range(len(text)):
        wrong = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        if at < len(text) - 1:  # of the last character, two bits say nothing
            with pytest.raises(ConfigError, match="damaged"):
                unpack_token(wrong)
        with pytest.raises(ConfigError, match="damaged"):
            unpack_token(text[:at])


def test_keys_are_for_their_owner_alone_and_others_are_refused_with_words(hop, tmp_path, monkeypatch):
    hop.enrol()
    aggregator_keys(hop.hub_state)
    for path in (hop.enrolment, hop.hub_state / AGGREGATOR_KEY_NAME, hop.nodes_file.path):
        assert path.stat().st_mode & 0o777 == 0o600
    hop.enrolment.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0600, got 0640"):
        Dialling("", hop.enrolment).destination()
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    given = credentials / "edgedaq-enrolment"
    shutil.copy(hop.enrolment, given)
    given.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert enrolment_path(tmp_path) == given
    held = read_enrolment(given)
    assert held is not None
    assert Dialling("", given).destination() == (hop.address, held.keys, held.aggregator_key)
    with pytest.raises(ConfigError, match="is the enrolment of node 'n1', this one is called 'n2'"):
        Dialling("", given, "n2").destination()


def test_a_damaged_enrolment_is_told_and_never_repeated_in_words(hop):
    enrolment = hop.enrol()
    text = hop.enrolment.read_text()
    hop.enrolment.write_text(text.replace(enrolment.secret_key, enrolment.secret_key[:-1]))
    with pytest.raises(ConfigError, match="secret_key must be a key") as told:
        read_enrolment(hop.enrolment)
    assert enrolment.secret_key[:-1] not in str(told.value)


def test_without_an_enrolment_only_this_machine_is_dialled(tmp_path):
    nobody = tmp_path / ENROLMENT_NAME
    assert Dialling("", nobody).destination().address == "tcp://127.0.0.1:7770"
    with pytest.raises(ConfigError, match="invite"):
        Dialling("tcp://10.0.0.1:7770", nobody).destination()


def test_two_that_start_at_once_have_one_key(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(aggregator_keys(tmp_path)), name=str(number))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [AGGREGATOR_KEY_NAME]


def test_join_tells_what_does_not_fit_before_it_asks_anybody(hop, tmp_path):
    card = tmp_path / "card"
    card.mkdir()
    (card / "agent.toml").write_text('supervisor_id = "other"\n')
    with pytest.raises(ConfigError, match="supervisor_id must be 'n1'"):
        join(card, hop.address, hop.token("n1"))
    (card / "agent.toml").write_text('supervisor_id = "n1"\naggregator = "tcp://10.0.0.9:7770"\n')
    with pytest.raises(ConfigError, match="aggregator must be"):
        join(card, hop.address, hop.token("n1"))
    assert [path.name for path in card.iterdir()] == ["agent.toml"]


def test_join_says_who_does_not_answer_and_keeps_its_key_for_the_next_attempt(hop, tmp_path):
    card = tmp_path / "card"
    token = hop.token("n1")
    with pytest.raises(JoinError, match="nobody listens there"):
        join(card, f"tcp://127.0.0.1:{free_port()}", token)
    with socket.create_server(("127.0.0.1", 0)) as other:
        closer = threading.Thread(target=_accept_and_close, args=(other,))
        closer.start()
        with pytest.raises(JoinError, match="not the aggregator that the token is of"):
            join(card, f"tcp://127.0.0.1:{other.getsockname()[1]}", token)
        closer.join()
    pending = read_enrolment(card / f".{ENROLMENT_NAME}.joining")
    assert pending is not None
    intake = hop.intake()
    wait_for(lambda: intake.extra.get("listen"))
    enrolment = join(card, hop.address, token)
    assert enrolment.secret_key == pending.secret_key
    assert sorted(path.name for path in card.iterdir()) == ["agent.toml", ENROLMENT_NAME]
    assert (card / "agent.toml").read_text() == 'supervisor_id = "n1"\n'
    write_enrolment(hop.enrolment, enrolment)
    uplink = hop.uplink()
    wait_for(lambda: uplink.extra.get("link") == "up")
    assert uplink.stop() == 0
    assert intake.stop() == 0


def _accept_and_close(server):
    server.accept()[0].close()
