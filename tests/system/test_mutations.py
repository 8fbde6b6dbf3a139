"""With a safety taken out, the same machinery that proves the promise must see it broken."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.harness import Site, free_port, kill_seed
from tests.system.proxy import Proxy

MUTATIONS = Path(__file__).parent / "mutations"
ROUNDS_MAX = 20

pytestmark = pytest.mark.timeout(120)


def test_without_deduplication_the_oracle_finds_rows_twice(tmp_path: Path, runtime_dir: Path):
    """Answers are swallowed, then the cable is cut: what was not acknowledged is sent again."""
    port = free_port()
    with Proxy(port) as proxy, Site(tmp_path, runtime_dir, port=port, agent_port=proxy.port) as site:
        site.aggregator.mutation = MUTATIONS / "no_deduplication"
        site.add_raw_job(rate_hz=1000.0, payload_bytes=1024)
        site.aggregator.start()
        site.agent.start()
        for _ in range(ROUNDS_MAX):
            site.wait_put("raw", 300)
            proxy.mute()
            site.wait_put("raw", 100)
            proxy.cut()
            proxy.mend()
            if site.judge_raw().twice:
                break
        site.agent.stop()
        site.aggregator.stop()
        verdict = site.judge_raw()
    assert verdict.twice, verdict
    assert not verdict.corrupt, verdict


def test_with_deduplication_the_same_cuts_leave_nothing_twice(tmp_path: Path, runtime_dir: Path):
    port = free_port()
    with Proxy(port) as proxy, Site(tmp_path, runtime_dir, port=port, agent_port=proxy.port) as site:
        site.add_raw_job(rate_hz=1000.0, payload_bytes=1024)
        site.aggregator.start()
        site.agent.start()
        for _ in range(5):
            site.wait_put("raw", 300)
            proxy.mute()
            site.wait_put("raw", 100)
            proxy.cut()
            proxy.mend()
        site.wait_put("raw", 300)
        ledger = site.deliver_rest()
        verdict = site.judge_raw()
    assert verdict.is_clean, verdict
    assert not any(row.dropped for row in ledger)


def test_with_acknowledgement_before_the_write_the_oracle_finds_a_loss(tmp_path: Path, runtime_dir: Path):
    source = random.Random(kill_seed())
    with Site(tmp_path, runtime_dir) as site:
        site.aggregator.mutation = MUTATIONS / "ack_before_write"
        site.add_raw_job(rate_hz=1000.0, payload_bytes=1024)
        site.aggregator.start()
        site.agent.start()
        for _ in range(5):
            site.wait_put("raw", source.randrange(200, 800))
            site.aggregator.wait_replaced("intake", site.aggregator.kill_worker("intake"))
        site.wait_put("raw", 300)
        site.aggregator.stop()
        site.aggregator.mutation = None
        site.deliver_rest()
        verdict = site.judge_raw()
    assert verdict.missing, verdict
    assert not (verdict.twice or verdict.corrupt), verdict
