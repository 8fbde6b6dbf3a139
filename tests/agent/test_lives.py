"""A stream whose ring is gone, as after a power cut of its node, is closed: its tail is unknown."""

from __future__ import annotations

import shutil

import pytest
from edgedaq.frame import Kind, unpack_map

from tests.agent.hop2 import Hop2, rings_of, wait_for


@pytest.fixture
def hop(runtime_dir, tmp_path):
    with Hop2(runtime_dir, tmp_path) as made:
        yield made


def closes(hop):
    return [unpack_map(record.frame.body) for record in hop.records() if record.frame.kind is Kind.CLOSE]


def test_a_stream_that_lost_its_ring_in_a_power_cut_is_closed_with_the_bound_of_what_is_missing(hop):
    intake, uplink = hop.intake(), hop.uplink()
    job = hop.job(count=100_000, rate_hz=200)
    wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] > 50)
    for worker in (job, uplink):
        worker.kill()
    shutil.rmtree(hop.node_runtime / "rings")
    (hop.node_runtime / "rings").mkdir()
    uplink = hop.uplink(lives_after=0.5)
    wait_for(lambda: hop.logged("stream.closed"))
    assert uplink.stop() == 0
    assert intake.stop() == 0
    (close,) = closes(hop)
    assert close["tail_unknown"]
    assert 0.2 < close["bound_s"] < 5
    (numbers,) = hop.numbers().values()
    assert numbers == list(range(close["rows"]))


def test_streams_of_jobs_that_live_or_have_a_ring_to_be_read_stay_open(hop):
    intake, uplink = hop.intake(), hop.uplink(lives_after=0.2)
    job = hop.job(count=300, rate_hz=75)
    wait_for(lambda: intake.extra["nodes"]["n1"]["in_rows"] > 100)  # LIVES was told some times by then
    uplink.kill()
    assert job.wait(20) == 0
    assert rings_of(hop)
    uplink = hop.uplink(lives_after=0.2)
    wait_for(lambda: not rings_of(hop))
    wait_for(lambda: closes(hop))
    assert not hop.logged("stream.closed")
    assert uplink.stop() == 0
    assert intake.stop() == 0
    assert [close["tail_unknown"] for close in closes(hop)] == [False]
    (numbers,) = hop.numbers().values()
    assert numbers == list(range(300))
