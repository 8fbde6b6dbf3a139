from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import threading

import msgpack
import pytest
from edgedaq.link import MESSAGE_BYTES_MAX, PENDING_BYTES_MAX, Link, LinkClosed
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def ends():
    ours, theirs = Link.pair()
    with ours, Link(theirs) as other:
        yield ours, other


@pytest.fixture
def raw():
    ours, theirs = Link.pair()
    with ours, theirs:
        yield ours, theirs


def take(link, count):
    found: list[dict[str, object]] = []
    while len(found) < count:
        assert select.select([link], [], [], 5)[0], "nothing came"
        found += link.receive()
    return found


def test_maps_arrive_in_order_both_ways(ends):
    ours, other = ends
    for number in range(100):
        assert ours.send({"type": "n", "n": number})
    assert [message["n"] for message in take(other, 100)] == list(range(100))
    other.send({"blob": b"\0\xff", "deep": {"list": [1, None, 2.5]}})
    assert take(ours, 1) == [{"blob": b"\0\xff", "deep": {"list": [1, None, 2.5]}}]
    assert ours.receive() == []


def test_the_end_of_the_other_side_is_told_after_everything_it_sent(ends):
    ours, other = ends
    other.send({"n": 1})
    other.close()
    assert ours.receive() == [{"n": 1}]
    with pytest.raises(LinkClosed, match="has ended"):
        ours.receive()
    with pytest.raises(LinkClosed):
        ours.send({"n": 2})


def test_a_killed_process_ends_the_link(raw):
    ours, theirs = raw
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(theirs.fileno(),)
    )
    theirs.close()
    assert ours.receive() == []
    process.kill()
    process.wait()
    assert select.select([ours], [], [], 5)[0]
    with pytest.raises(LinkClosed):
        ours.receive()


def test_a_reader_that_does_not_read_never_blocks_the_sender_and_bounds_its_memory(ends):
    ours, other = ends
    blob = bytes(1 << 20)
    accepted = 0
    while ours.send({"blob": blob}):
        accepted += 1
        assert accepted < 2 * PENDING_BYTES_MAX // len(blob)
    assert ours.has_pending
    assert not ours.flush(0.05)
    got = []
    reader = threading.Thread(target=lambda: got.extend(take(other, accepted)))
    reader.start()
    assert ours.flush(10.0)
    reader.join()
    assert len(got) == accepted
    assert ours.send({"again": 1})


def test_a_message_that_is_too_large_or_not_plain_is_the_callers_defect(ends):
    ours, _ = ends
    with pytest.raises(ValueError, match="at most"):
        ours.send({"blob": bytes(MESSAGE_BYTES_MAX)})
    with pytest.raises(ValueError, match="plain data"):
        ours.send({"object": object()})
    assert not ours.has_pending


def test_many_threads_send_whole_messages(ends):
    ours, other = ends

    def send(k):
        for n in range(200):
            ours.send({"k": k, "n": n})
        ours.flush(5.0)

    threads = [threading.Thread(target=send, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    found = take(other, 800)
    for thread in threads:
        thread.join()
    for k in range(4):
        assert [message["n"] for message in found if message["k"] == k] == list(range(200))


def test_a_length_beyond_the_limit_ends_the_link_without_waiting_for_it(raw):
    ours, theirs = raw
    theirs.send(struct.pack("<I", MESSAGE_BYTES_MAX + 1))
    with pytest.raises(LinkClosed, match="message of"):
        ours.receive()


@pytest.mark.parametrize("body", [b"\xc1", msgpack.packb([1]), msgpack.packb(7), b"", msgpack.packb({1: 2})])
def test_what_is_no_map_ends_the_link_after_what_was_whole_before(raw, body):
    ours, theirs = raw
    good = msgpack.packb({"n": 1})
    theirs.send(struct.pack("<I", len(good)) + good + struct.pack("<I", len(body)) + body)
    assert ours.receive() == [{"n": 1}]
    with pytest.raises(LinkClosed):
        ours.receive()


@settings(max_examples=50)
@given(st.binary(max_size=200), st.integers(1, 7))
def test_any_bytes_in_any_pieces_are_messages_or_an_end(noise, size):
    good = msgpack.packb({"n": 1})
    stream = struct.pack("<I", len(good)) + good + noise
    ours, theirs = Link.pair()
    with ours, theirs:
        found = []
        try:
            for begin in range(0, len(stream), size):
                theirs.send(stream[begin : begin + size])
                found += ours.receive()
            theirs.shutdown(socket.SHUT_WR)
            while True:
                found += ours.receive()
        except LinkClosed:
            pass
        assert found[0] == {"n": 1}
        assert all(isinstance(message, dict) for message in found)


def test_an_inherited_descriptor_becomes_a_link():
    ours, theirs = Link.pair()
    with ours, Link.from_fd(os.dup(theirs.fileno())) as other:
        theirs.close()
        other.send({"n": 1})
        assert take(ours, 1) == [{"n": 1}]
