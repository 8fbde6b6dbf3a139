from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import zmq
from edgedaq.broker import Broker
from edgedaq.frame import Kind
from edgedaq.live_feed import LiveFeed
from edgedaq.open_info import OpenInfo, encode_open
from edgedaq.session_messages import Live
from edgedaq_aggregator.live_relay import LiveRelay

from tests.common.live_site import JOBS, LIMIT_S, Looker
from tests.common.log_model import frame_of
from tests.system.harness import NODE, Site, environment


@pytest.fixture
def site(tmp_path, runtime_dir):
    """Return an aggregator and an agent whose job ``fast`` puts 20000 rows/s under ``other.X``."""
    with Site(tmp_path, runtime_dir) as site:
        (site.agent_dir / "jobs.py").write_text(JOBS)
        (site.agent_dir / "fast.toml").write_text(
            'daq_job_type = "jobs.py:Counts"\ntopic = "other.X"\nrate_hz = 20000.0\nrows = 20\n'
        )
        site.add_table_job(rate_hz=500)
        site.aggregator.start()
        site.agent.start()
        site.aggregator.wait(
            lambda: any(row["supervisor"] == NODE for row in site.aggregator.status()["statistics"]["nodes"]),
            LIMIT_S,
            "the node is known",
        )
        yield site
        if site.agent.is_running:
            site.agent.stop()
        site.aggregator.stop()


def test_the_control_room_sees_what_it_asks_a_node_for_and_asks_for_nothing_else(site):
    uplink = site.agent.pid_of("uplink")
    with LiveFeed(site.aggregator.runtime_dir, [f"node.{NODE}.other"]) as feed:
        looker = Looker(feed)
        looker.until(lambda: looker.numbers("fast"))
        assert {m.source.job for m in looker.messages if m.source} == {"fast"}
        site.agent.kill_worker("uplink")
        site.agent.wait_replaced("uplink", uplink)
        looker.messages.clear()
        looker.until(lambda: looker.numbers("fast"))
        site.aggregator.wait_replaced("intake", site.aggregator.kill_worker("intake"))
        looker.messages.clear()
        looker.until(lambda: looker.numbers("fast"))
        numbers = looker.numbers("fast")
        assert sorted(set(numbers)) == numbers
    with LiveFeed(site.aggregator.runtime_dir, ["", f"node.{NODE}0"]) as feed:
        looker = Looker(feed)
        end = time.monotonic() + 1
        looker.until(lambda: time.monotonic() > end)  # what was under way for the one before
        looker.messages.clear()
        end = time.monotonic() + 2
        looker.until(lambda: time.monotonic() > end)
        assert looker.messages == []
    with LiveFeed(site.aggregator.runtime_dir, ["node"]) as feed:
        looker = Looker(feed)
        looker.until(lambda: {m.source.job for m in looker.messages if m.source} == {"fast", "table"})


def test_a_stuck_listener_in_the_control_room_holds_no_data_up(site):
    command = [sys.executable, "-m", "edgedaq_aggregator.cli", "tail", "--config-dir"]
    arguments = [*command, str(site.aggregator_dir), f"node.{NODE}"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, env=environment(), cwd=site.root, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("job,")
        assert process.stdout.readline().startswith(f"{NODE}/")
        process.send_signal(signal.SIGSTOP)
        site.wait_put("table", 1500)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        assert process.wait(LIMIT_S) in (0, 1)
    rows = site.deliver_rest()
    assert all(row.balances and row.waiting == 0 for row in rows)
    assert site.judge_table().is_clean
    site.aggregator.start()


def test_a_hint_in_the_control_room_names_jobs_of_nodes(site):
    command = [sys.executable, "-m", "edgedaq_aggregator.cli", "tail", "--config-dir"]
    with subprocess.Popen(
        [*command, str(site.aggregator_dir), f"node.{NODE}.job.fats"],
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=site.root,
        text=True,
    ) as process:
        assert process.stderr
        assert f"did you mean 'node.{NODE}.job.fast'?" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0


def live(node: str, topic: str = "store.X") -> Live:
    info = OpenInfo(
        node=node, job="j", job_type="T", life="0" * 16, boot="b", topics=("store.X",), form="raw"
    )
    frame = frame_of(Kind.RAW, 7, 1, b"\1\0\0\0x", rows=1)
    return Live(topic=topic, opened=encode_open(7, info), frames=bytes(frame.raw))


def test_a_node_speaks_for_itself_alone_and_garbage_is_refused(runtime_dir):
    with Broker(runtime_dir), zmq.Context() as context, LiveFeed(runtime_dir, ["node.n1"]) as feed:
        relay = LiveRelay(runtime_dir, context)
        end = time.monotonic() + LIMIT_S
        while relay.wanted("n1") != ("",):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert relay.wanted("n10") == ()
        good = live("n1")
        for bad in (
            live("n2"),
            live("n1", ""),
            live("n1", "a..b"),
            live("n1", "../x"),
            Live(topic="store.X", opened=b"", frames=good.frames),
            Live(topic="store.X", opened=good.opened, frames=os.urandom(100)),
        ):
            relay.show("n1", bad, None)
        relay.show("n1", good, ["alarm", "store.Y"])
        relay.show("n1", good, ["store"])
        looker = Looker(feed)
        looker.until(lambda: looker.messages)
        assert len(looker.messages) == 1
        assert not feed.refused_count
        relay.close()
