from __future__ import annotations

import os
import socket
import struct

import pytest
from edgedaq.journald import Journald, find_journald


@pytest.fixture
def journal(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        held.bind(str(tmp_path / "socket"))
        held.settimeout(5)
        yield held


@pytest.fixture
def journald(tmp_path, journal):
    found = Journald(tmp_path / "socket", identifier="edgedaq")
    yield found
    found.close()


def fields(packed):
    """Read an entry as the drawing says."""
    found, rest = {}, packed
    while rest:
        head, _, rest = rest.partition(b"\n")
        name, has_value, value = head.partition(b"=")
        if not has_value:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_an_event_and_each_of_its_facts_is_a_field_that_can_be_selected_by(journal, journald):
    assert journald.send("error", "job.failed", {"node": "n1", "job": "hv", "reason": "a = b", "wait_s": 0.5})
    assert fields(journal.recv(65536)) == {
        "MESSAGE": "job.failed",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "edgedaq",
        "EDGEDAQ_NODE": "n1",
        "EDGEDAQ_JOB": "hv",
        "EDGEDAQ_REASON": "a = b",
        "EDGEDAQ_WAIT_S": "0.5",
    }


def test_a_value_of_several_lines_cannot_pretend_to_be_another_field(journal, journald):
    assert journald.send("info", "a.b", {"reason": "one\nPRIORITY=0\n", "Größe": "ü"})
    found = fields(journal.recv(65536))
    assert found["EDGEDAQ_REASON"] == "one\nPRIORITY=0\n"
    assert found["PRIORITY"] == "6"
    assert found["EDGEDAQ_GR_SSE"] == "ü"


def test_an_entry_that_the_journal_does_not_take_is_for_the_caller_to_write(tmp_path, journal, journald):
    assert not journald.send("info", "x" * (16 << 20), {})
    journal.close()
    assert not journald.send("info", "a.b", {})


def test_the_journal_is_used_only_where_this_very_stderr_goes_to_it(tmp_path, monkeypatch):
    with (tmp_path / "log").open("wb") as file:
        held = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{held.st_dev}:{held.st_ino}")
        found = find_journald(file.fileno(), identifier="x")
        assert found is not None
        found.close()
        monkeypatch.setenv("JOURNAL_STREAM", f"{held.st_dev}:{held.st_ino + 1}")
        assert find_journald(file.fileno(), identifier="x") is None
        monkeypatch.delenv("JOURNAL_STREAM")
        assert find_journald(file.fileno(), identifier="x") is None
    assert find_journald(9999, identifier="x") is None
