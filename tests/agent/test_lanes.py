"""Lanes: each its own queue; what a policy drops leaves a GAP; what is urgent does not wait for a backlog."""

from __future__ import annotations

import time

import pytest

from tests.agent.hop2 import Hop2, rings_of, wait_for
from tests.system.proxy import Proxy

SIZE = 100_000
LIMIT = 16 << 20


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Hop2(runtime_dir, tmp_path) as made:
        yield made


def numbers_of(hop):
    (numbers,) = [held for held in hop.numbers().values() if held]
    return numbers


def wait_until_empty(hop, uplink):
    wait_for(lambda: not rings_of(hop), 30)
    wait_for(lambda: uplink.extra["link"] == "up" and uplink.extra["oldest_unacknowledged_s"] == 0.0, 30)
    wait_for(lambda: all(lane["spool_bytes"] == 0 for lane in uplink.extra["lanes"].values()), 10)


def check_accounted(numbers, count):
    """Every message is there once and in order, or a GAP (``-rows``) stands in its place."""
    expected, dropped = 0, 0
    for number in numbers:
        if number < 0:
            dropped -= number
            expected -= number
        else:
            assert number == expected
            expected += 1
    assert expected == count
    return dropped


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
@pytest.mark.parametrize("is_restarted", [False, True], ids=["same uplink", "uplink killed in between"])
def test_what_a_full_spool_drops_is_a_gap_in_the_journal_and_jobs_do_not_wait(hop, policy, is_restarted):
    count = 600
    uplink = hop.uplink(limit=LIMIT, policy=policy)
    assert hop.job(count=count, size=SIZE).wait(40) == 0
    if policy == "drop_oldest":
        wait_for(lambda: hop.logged("spool.dropped"))
    else:
        wait_for(lambda: uplink.extra["dropped_rows"] > 0)
    if is_restarted:
        wait_for(lambda: not rings_of(hop) or policy == "drop_newest")
        uplink.kill()
        uplink = hop.uplink(limit=LIMIT, policy=policy)
    intake = hop.intake()
    wait_until_empty(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    numbers = numbers_of(hop)
    dropped = check_accounted(numbers, count)
    assert dropped >= count - 2 * LIMIT // SIZE
    kept = [number for number in numbers if number >= 0]
    assert (kept[-1] == count - 1) if policy == "drop_oldest" else (kept[0] == 0)
    if not is_restarted:
        assert uplink.snapshot["extra"]["dropped_rows"] == dropped


def test_a_lane_in_memory_drops_its_oldest_and_lets_jobs_go_on(hop):
    uplink = hop.uplink(durability="memory", policy="drop_oldest")
    count = 200
    assert hop.job(count=count, size=SIZE).wait(40) == 0
    intake = hop.intake()
    wait_until_empty(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    numbers = numbers_of(hop)
    dropped = check_accounted(numbers, count)
    assert dropped > count // 2
    assert numbers[-1] == count - 1
    assert not list((hop.node_state / "spool").glob("*")) if (hop.node_state / "spool").exists() else True
    assert uplink.snapshot["extra"]["dropped_rows"] == dropped


def test_a_lane_in_memory_that_waits_holds_the_job_back_and_loses_nothing(hop):
    uplink = hop.uplink(durability="memory")
    job = hop.job(count=200, size=SIZE)
    wait_for(lambda: job.extra is not None and job.snapshot.get("is_blocked"))
    intake = hop.intake()
    assert job.wait(40) == 0
    wait_until_empty(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    assert numbers_of(hop) == list(range(200))


def test_a_second_lane_has_its_own_spool_and_what_is_put_there_arrives_once(hop):
    hop.lanes.append(("telemetry", ["telemetry"], {"weight": 4}, {}))
    uplink = hop.uplink()
    assert hop.job(count=300, size=10_000).wait() == 0
    assert hop.job("teller", count=300, size=1000, topic="telemetry.pressure").wait() == 0
    wait_for(lambda: not rings_of(hop))
    uplink.kill()
    assert {path.name for path in (hop.node_state / "spool").iterdir()} == {"data", "telemetry"}
    intake, uplink = hop.intake(), hop.uplink()
    wait_until_empty(hop, uplink)
    assert uplink.stop() == 0
    assert intake.stop() == 0
    held = [numbers for numbers in hop.numbers().values() if numbers]
    assert held == [list(range(300))] * 2


def test_telemetry_is_not_held_up_by_a_backlog_on_a_slow_link(hop):
    hop.lanes.append(("telemetry", ["telemetry"], {"weight": 4, "spool_after": 5.0}, {}))
    intake = hop.intake()
    with Proxy(hop.port, rate_bytes_per_s=300_000) as proxy:
        uplink = hop.uplink(port=proxy.port)
        backlog = hop.job(count=600, size=10_000)
        wait_for(lambda: uplink.extra["spool_bytes"] > 3_000_000, 30)
        teller = hop.job("teller", count=50, size=200, rate_hz=10.0, topic="telemetry.pressure")
        waits = []
        while teller.process.poll() is None:
            waits.append(uplink.extra["lanes"]["telemetry"]["oldest_unacknowledged_s"])
            time.sleep(0.05)
        wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] > 50)
        wait_for(lambda: not uplink.extra["lanes"]["telemetry"]["oldest_unacknowledged_s"], 5)
        assert uplink.extra["lanes"]["data"]["spool_bytes"] > 500_000
        assert max(waits) < 1.0
        backlog.kill()
        uplink.kill()
    assert intake.stop() == 0
