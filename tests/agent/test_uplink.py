"""Uplink and intake as processes over real sockets: through kills, cuts and stops, exactly once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from edgedaq.segment_reader import SegmentReader

from tests.agent.hop2 import Hop2, rings_of, wait_for
from tests.system.proxy import Proxy


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Hop2(runtime_dir, tmp_path) as made:
        yield made


def wait_until_delivered(hop, uplink, limit_s=30):
    """Wait until rings are gone, and a report that was made after that says that nothing is owed."""
    wait_for(lambda: not rings_of(hop), limit_s)
    since_ns = time.monotonic_ns() + 600_000_000

    def is_delivered():
        extra = uplink.extra
        is_fresh = uplink.snapshot.get("t_mono_ns", 0) > since_ns
        return is_fresh and extra["link"] == "up" and extra["oldest_unacknowledged_s"] == 0.0

    wait_for(is_delivered, limit_s)


def check_all(hop, count):
    (numbers,) = [held for held in hop.numbers().values() if held]
    assert numbers == list(range(count))


def test_what_a_job_puts_is_in_the_journal_once_and_its_ring_is_gone(hop):
    intake, uplink = hop.intake(), hop.uplink()
    wait_for(lambda: uplink.extra.get("clock_offset_ms") is not None)
    assert hop.job(count=3000).wait() == 0
    wait_until_delivered(hop, uplink)
    extra = uplink.extra
    assert extra["clock_offset_ms"] is not None
    assert abs(extra["clock_offset_ms"]) < 50
    node = wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] == 3000 and intake.extra["nodes"]["n1"])
    assert node["connected"]
    assert node["duplicate_count"] == 0
    assert node["latency"]
    assert node["latency_by_job"].keys() == {"putter"}
    assert uplink.stop() == 0
    assert intake.stop() == 0
    assert uplink.snapshot["in_count"] == 3000
    check_all(hop, 3000)


@pytest.mark.parametrize("seed", [1])
def test_nothing_is_lost_or_twice_when_uplink_and_intake_are_killed_again_and_again(hop, seed):
    chance = random.Random(seed)
    intake, uplink = hop.intake(), hop.uplink(spool_after=0.05)
    job = hop.job(count=1500, size=2000, rate_hz=500)
    while job.process.poll() is None:
        time.sleep(chance.uniform(0.1, 0.6))
        if chance.random() < 0.5:
            intake.kill()
            intake = hop.intake()
        else:
            uplink.kill()
            uplink = hop.uplink(spool_after=0.05)
    job.wait()
    wait_until_delivered(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 1500)


def test_a_cable_that_flips_bits_and_is_cut_costs_repetitions_but_no_data(hop):
    intake = hop.intake()
    with Proxy(hop.port, flip_every_bytes=3_000_000, seed=3) as proxy:
        uplink = hop.uplink(port=proxy.port)
        job = hop.job(count=4000, size=4000)
        for _ in range(3):
            time.sleep(0.3)
            proxy.cut()
            time.sleep(0.2)
            proxy.mend()
        job.wait()
        wait_until_delivered(hop, uplink)
        assert proxy.flipped_count
        assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 4000)


@pytest.mark.parametrize("spool_after", [0.0, 60.0], ids=["from the spool", "from memory"])
def test_through_a_cable_that_damages_nearly_every_part_all_gets_through_in_smaller_ones(hop, spool_after):
    intake = hop.intake()
    with Proxy(hop.port, flip_every_bytes=300_000, seed=5) as proxy:
        uplink = hop.uplink(port=proxy.port, spool_after=spool_after)
        job = hop.job(count=1500, size=10_000)
        job.wait(40)
        wait_until_delivered(hop, uplink, 40)
        assert proxy.flipped_count > 20
        assert uplink.extra["resent"] > 5
        assert uplink.extra["set_aside"] == 0
        assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 1500)


def test_a_backlog_on_disk_survives_a_stop_without_aggregator_and_is_delivered_later(hop):
    uplink = hop.uplink()
    assert hop.job(count=2000, size=3000).wait() == 0
    begun = time.monotonic()
    assert uplink.stop() == 0
    assert time.monotonic() - begun < 6
    assert not rings_of(hop)
    assert hop.logged("nobody listens there")
    with SegmentReader(hop.node_state / "spool" / "data", 0) as reader:
        assert reader.read(1 << 63)
    intake, uplink = hop.intake(), hop.uplink()
    wait_until_delivered(hop, uplink)
    assert uplink.extra["spool_bytes"] == 0
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 2000)


def test_an_intake_that_answers_nobody_is_noticed_within_seconds(hop):
    intake, uplink = hop.intake(), hop.uplink()
    wait_for(lambda: uplink.extra.get("link") == "up")
    intake.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: uplink.extra["link"] == "down", 8)
        assert "for 3 s" in uplink.extra["reason"]
    finally:
        intake.process.send_signal(signal.SIGCONT)
    wait_for(lambda: uplink.extra["link"] == "up", 12)
    assert hop.job(count=10).wait() == 0
    wait_until_delivered(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 10)


def test_without_aggregator_jobs_wait_once_spool_and_ring_are_full_and_go_on_when_it_comes(hop):
    uplink = hop.uplink(limit=16 << 20)
    job = hop.job(count=400, size=100_000)
    wait_for(lambda: uplink.extra["spool_problem"], 20)
    wait_for(lambda: job.extra is not None and job.snapshot.get("is_blocked"), 10)
    assert job.process.poll() is None
    intake = hop.intake()
    assert job.wait(30) == 0
    wait_until_delivered(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 400)


def test_an_uplink_whose_supervisor_has_gone_saves_everything_and_ends(hop):
    uplink = hop.uplink()
    assert hop.job(count=500).wait() == 0
    uplink.link.close()
    assert uplink.process.wait(9) == 0
    intake, uplink = hop.intake(), hop.uplink()
    wait_until_delivered(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 500)


def test_a_stream_that_is_refused_is_set_aside_and_holds_up_nobody(hop):
    intake, uplink = hop.intake(), hop.uplink()
    wait_for(lambda: uplink.extra.get("link") == "up")
    assert hop.job("stranger", node="other", count=50).wait() == 0
    assert hop.job(count=500).wait() == 0
    wait_until_delivered(hop, uplink)
    assert uplink.extra["set_aside"] >= 2
    assert list((hop.node_state / "bad").glob("*.bad"))
    assert hop.logged("frame.set_aside")
    assert uplink.stop() == 0
    assert intake.stop() == 0
    check_all(hop, 500)


def test_a_journal_that_was_lost_with_its_disk_gets_gaps_for_what_nobody_has_and_then_the_rest(hop):
    intake, uplink = hop.intake(), hop.uplink()
    job = hop.job(count=400, rate_hz=200)
    wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] > 50)
    intake.kill()
    shutil.rmtree(hop.hub_state / "journal")
    intake = hop.intake()
    assert job.wait() == 0
    wait_until_delivered(hop, uplink)
    assert uplink.extra["ahead"] >= 1
    assert uplink.stop() == 0
    assert intake.stop() == 0
    (numbers,) = hop.numbers().values()
    lost = -numbers[0]
    assert 50 <= lost < 400
    assert numbers[1:] == list(range(lost, 400))


def test_a_report_of_the_node_reaches_the_supervisor_of_the_aggregator(hop):
    intake, uplink = hop.intake(), hop.uplink()
    wait_for(lambda: uplink.extra.get("link") == "up")
    uplink.link.send({"type": "node_report", "report": {"node": "other", "version": "7"}})
    wait_for(lambda: hop.logged("report.rejected"))
    uplink.link.send({"type": "node_report", "report": {"node": "n1", "version": "7"}})

    def sent():
        intake.listen()
        return [message for message in intake.messages if message["type"] == "node_report"]

    assert wait_for(sent) == [{"type": "node_report", "report": {"node": "n1", "version": "7"}}]
    assert uplink.stop() == 0
    assert intake.stop() == 0


def test_a_quiet_uplink_uses_next_to_no_processor(hop):
    intake, uplink = hop.intake(), hop.uplink()
    wait_for(lambda: uplink.extra.get("link") == "up")
    used = [_cpu_s(worker.process.pid) for worker in (uplink, intake)]
    time.sleep(1)
    for before, worker in zip(used, (uplink, intake), strict=True):
        assert _cpu_s(worker.process.pid) - before < 0.06
    assert uplink.stop() == 0
    assert intake.stop() == 0


def _cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
