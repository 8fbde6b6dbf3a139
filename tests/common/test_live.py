from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from edgedaq.broker import Broker
from edgedaq.errors import WireError
from edgedaq.frame import Kind, encode
from edgedaq.live_feed import LiveFeed
from edgedaq.live_messages import covering_topics, decode_live, publishing_address, subscription
from edgedaq.messages import DAQJobMessageStoreRaw
from edgedaq.outlet import Outlet
from edgedaq.ring import Identity
from edgedaq.schema import OpenInfo, encode_open

from tests.common.live_site import LIMIT_S, Looker, listener, live_site

MIB = 1 << 20
RATE_HZ = 100_000


def wait(condition, what, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def own_memory(pid):
    """Return the bytes that a process has for itself, without the ring."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def outlet_with_broker(runtime_dir):
    """Return an outlet that shows what it puts, and what serves it until a condition holds."""
    identity = Identity("node", "job", "Type", os.urandom(8).hex(), "boot", {})
    with Broker(runtime_dir), Outlet(runtime_dir / "rings", identity, live_dir=runtime_dir) as outlet:

        def serve(condition):
            def turn():
                outlet.service()
                return condition()

            wait(turn, "what was awaited")

        yield outlet, serve


def test_a_listener_gets_whole_segments_in_order_and_nothing_that_only_begins_alike(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", topic="node1.x")
        site.add("b", topic="node10.x")
        site.side.start()
        with LiveFeed(site.runtime_dir, ["node1"]) as feed:
            looker = Looker(feed)
            looker.until(lambda: len(looker.numbers("a")) > 50)
            numbers = looker.numbers("a")
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert not looker.numbers("b")
            assert not feed.refused_count
        with LiveFeed(site.runtime_dir, ["job.b", "node10.x", ""]) as feed:
            looker = Looker(feed)
            looker.until(lambda: len(looker.numbers("b")) > 50 and looker.numbers("a"))
            numbers = looker.numbers("b")  # asked for three times, given once
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_a_listener_may_be_first_and_goes_on_when_job_and_broker_are_killed(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site, LiveFeed(site.runtime_dir, ["job.a"]) as feed:
        looker = Looker(feed)
        site.add("a")
        site.side.start()
        looker.until(lambda: looker.numbers("a"))
        pid = site.side.kill_worker("a")
        site.side.wait_replaced("a", pid)
        before = len({message.source.stream for message in looker.messages if message.source})
        looker.until(lambda: len({m.source.stream for m in looker.messages if m.source}) > before)
        site.side.kill_all()
        site.side.start()
        streams = {m.source.stream for m in looker.messages if m.source}
        looker.until(lambda: {m.source.stream for m in looker.messages if m.source} - streams)


def test_when_the_broker_hangs_or_dies_the_jobs_go_on(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=RATE_HZ, rows=100, witness=str(site.witness("a")))
        site.side.start()
        with listener(site.runtime_dir, "job.a"):
            site.side.process.send_signal(signal.SIGSTOP)
            count = site.count("a")
            wait(lambda: site.count("a") > count + RATE_HZ, "puts go on", 60)
            site.side.process.send_signal(signal.SIGCONT)
            site.side.wait_running()
            assert site.side.jobs()["a"]["total"]["put_blocked_s"] == 0


def test_a_stuck_listener_costs_no_memory_and_neither_jobs_nor_other_listeners_anything(
    tmp_path, runtime_dir
):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=RATE_HZ, rows=100)
        site.add("b", rate_hz=100, message_bytes=200_000)
        site.side.start()
        pids = [site.side.process.pid, site.side.pid_of("a"), site.side.pid_of("b")]
        with (
            listener(site.runtime_dir, "") as stuck,
            LiveFeed(site.runtime_dir, ["job.a", "job.b"]) as feed,
        ):
            looker = Looker(feed)
            looker.until(lambda: looker.numbers("a"))
            stuck.send_signal(signal.SIGSTOP)
            end = time.monotonic() + 2
            looker.until(lambda: time.monotonic() > end)  # its queues fill
            used = [own_memory(pid) for pid in pids]
            count = looker.row_count + 4 * RATE_HZ
            looker.until(lambda: looker.row_count > count, 60)
            grown = [own_memory(pid) - before for pid, before in zip(pids, used, strict=True)]
            assert max(grown) < 4 * MIB, grown
            assert site.side.jobs()["a"]["total"]["put_blocked_s"] == 0
            stuck.send_signal(signal.SIGCONT)


def test_a_slow_listener_is_told_exactly_how_many_rows_it_missed(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=RATE_HZ, rows=100)
        site.side.start()
        with LiveFeed(site.runtime_dir, ["job.a"]) as feed:
            looker = Looker(feed)
            looker.until(lambda: looker.numbers("a"))
            wait(lambda: site.side.jobs()["a"]["total"]["out_count"] > 4 * RATE_HZ, "it is well behind", 60)
            end = time.monotonic() + 1
            looker.until(lambda: looker.missed_rows and time.monotonic() > end)
            numbers = looker.numbers("a")
            assert sorted(set(numbers)) == numbers
            assert len(numbers) + looker.missed_rows == numbers[-1] - numbers[0] + 1
            assert site.side.jobs()["a"]["total"]["put_blocked_s"] == 0


def test_large_messages_are_shown_whole_or_not_at_all(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", rate_hz=20, message_bytes=6 * MIB)
        site.side.start()
        with LiveFeed(site.runtime_dir, ["job.a"]) as feed:
            looker = Looker(feed)
            looker.until(lambda: len(looker.messages) >= 5, 30)
            for message in looker.messages:
                assert isinstance(message, DAQJobMessageStoreRaw)
                assert message.data == message.data[:8] * (6 * MIB // 8)


def test_a_job_with_live_topics_is_handed_messages_that_say_so(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a", topic="store.X")
        site.add("b", topic="other.X")
        site.add("w", "Watches", witness=str(site.witness("w")))
        site.side.start()
        wait(lambda: site.witness("w").exists() and len(site.witness("w").read_text()) > 1000, "messages")
        pid = site.side.kill_worker("w")
        size = site.witness("w").stat().st_size
        site.side.wait_replaced("w", pid)
        wait(lambda: site.witness("w").stat().st_size > size, "messages after its restart")
        site.side.stop()
        lines = site.witness("w").read_text().splitlines()
        assert {(line.split()[0], line.split()[2]) for line in lines} == {("a", "True")}


def test_nothing_is_copied_while_nobody_listens(tmp_path, runtime_dir, outlet_with_broker):
    outlet, serve = outlet_with_broker
    writer = outlet.raw(topics=["store.X"])
    writer.put(b"x")
    serve(lambda: outlet._tap is not None)
    assert outlet._server.observe is None
    with LiveFeed(runtime_dir, ["store"]) as feed:
        serve(lambda: outlet._server.observe is not None)
        writer.put(b"y")
        serve(lambda: feed.pollables()[0].poll(0))
        looker = Looker(feed)
        looker.until(lambda: looker.messages)
    serve(lambda: outlet._server.observe is None)
    with LiveFeed(runtime_dir, ["somebody.else"]):
        serve(lambda: outlet._server.observe is not None)
        writer.put(b"z")
        serve(lambda: not outlet._sealer.slots[0].account.unsealed()[0])
        assert not outlet._tap._noted


def test_garbage_from_listeners_and_publishers_harms_nobody(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a")
        site.side.start()
        looking = str(site.runtime_dir / "live.sock")
        for junk in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(1000), b"\xff" * 100_000):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(looking)
                try:
                    raw.sendall(junk)
                except OSError:
                    continue
        with zmq.Context() as context, LiveFeed(site.runtime_dir, [""]) as feed:
            liar = context.socket(zmq.XSUB)
            liar.linger = 0
            liar.connect(f"ipc://{looking}")
            for message in (b"\x05xyz", b"", b"\x01" + b"a" * 3000, b"no subscription", b"\x00never"):
                liar.send(message)
            forger = context.socket(zmq.PUB)
            forger.linger = 0
            forger.connect(publishing_address(site.runtime_dir))
            looker = Looker(feed)
            end = time.monotonic() + LIMIT_S
            while not feed.refused_count:
                forger.send_multipart([b"store.X.", b"OPEN", os.urandom(200)])
                forger.send_multipart([b"store.X."])
                looker.until(lambda: True)
                looker.messages += [
                    m for s in feed.receive() for f in s.frames for m in looker.reader.read(s.info, f)
                ]
                assert time.monotonic() < end
                time.sleep(0.01)
            looker.until(lambda: len(looker.numbers("a")) > 50)
            liar.close()
            forger.close()
        assert site.side.is_running


def can_connect(path, *, uid=0, gid=0):
    """Tell whether a process of another user can open a socket; 0: as this one."""
    code = "import os, socket, sys; path, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
    code += "if uid: os.setgroups([]); os.setgid(gid); os.setuid(uid)\n"
    code += "socket.socket(socket.AF_UNIX).connect(path)"
    command = [sys.executable, "-c", code, str(path), str(uid), str(gid)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_who_may_enter_the_directory_may_look_and_only_the_user_may_publish_or_command(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.add("a")
        site.side.start()
        directory = site.runtime_dir
        modes = {name: (directory / name).stat().st_mode & 0o777 for name in ("live.sock", "live_in.sock")}
        assert modes == {"live.sock": 0o660, "live_in.sock": 0o600}
        assert directory.stat().st_mode & 0o777 == 0o700
        if os.geteuid() != 0:
            return  # nobody else can be tried
        runtime_dir.chmod(0o755)
        assert can_connect(directory / "live.sock")
        assert not can_connect(directory / "live.sock", uid=65534)
        directory.chmod(0o750)
        assert can_connect(directory / "live.sock", uid=65534)
        assert not can_connect(directory / "live_in.sock", uid=65534)
        assert not can_connect(directory / "control.sock", uid=65534)
        assert not can_connect(directory / "live.sock", uid=65534, gid=65534)


def test_a_broker_that_cannot_be_had_keeps_nothing_from_starting(tmp_path, runtime_dir):
    with live_site(tmp_path, runtime_dir) as site:
        site.runtime_dir.mkdir(mode=0o700)
        (site.runtime_dir / "live.sock").mkdir()
        site.add("a")
        site.side.start()
        assert "broker.failed" in site.side.log.read_text()
        site.side.wait(lambda: site.side.jobs()["a"]["total"]["out_count"] > 10, LIMIT_S, "it puts")
        assert site.side.stop() < 5


def info(**more):
    return OpenInfo(
        node="n", job="j", job_type="T", life="0" * 16, boot="b", topics=("store.X",), form="raw", **more
    )


def test_a_message_cut_at_any_byte_or_with_frames_of_another_stream_is_refused():
    opened = encode_open(7, info())
    frame = encode(Kind.RAW, 7, 1, b"\x01\0\0\0x", rows=1)
    parts = [b"store.X.", opened, frame]
    assert decode_live(parts, {}).frames[0].seq == 1
    for index in (1, 2):
        for at in range(len(parts[index])):
            if index == 2 and at == 0:
                continue
            cut = [*parts]
            cut[index] = cut[index][:at]
            with pytest.raises(WireError):
                decode_live(cut, {})
            flipped = [*parts]
            flipped[index] = flipped[index][:at] + bytes([flipped[index][at] ^ 1]) + flipped[index][at + 1 :]
            with pytest.raises(WireError):
                decode_live(flipped, {})
    with pytest.raises(WireError, match="has a frame of stream"):
        decode_live([b"store.X.", opened, encode(Kind.RAW, 8, 1, b"\0\0\0\0", rows=1)], {})
    for wrong in ([], [b"store.X"], [b"store.X", opened, frame], [b"\xff.", opened, frame]):
        with pytest.raises(WireError):
            decode_live(wrong, {})


def test_topics_that_reach_all_subscriptions_are_as_few_as_it_takes():
    assert covering_topics(["store.X", "job.a"], []) == []
    assert covering_topics(["store.X", "job.a"], [b""]) == [b"store.X."]
    assert covering_topics(["store.X", "job.a"], [b"store.", b"store.X."]) == [b"store.X."]
    assert covering_topics(["store.X", "job.a"], [b"", b"job.a."]) == [b"store.X.", b"job.a."]
    assert covering_topics(["node10.x"], [subscription("node1")]) == []
