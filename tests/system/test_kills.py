"""``kill -9`` at random moments under load: each comes back by itself, and the promise holds.

The seed is printed; ``KILL_SEED`` gives it back. All kills of one kind are one test. ``and all``: the
supervisor with all of its workers in one moment, as when a machine runs out of memory.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.harness import Site, kill_seed

TABLE_BATCH = 50

pytestmark = [pytest.mark.kills, pytest.mark.timeout(300)]


def add_load(site: Site) -> None:
    site.add_table_job(rate_hz=5000.0, batch_count=TABLE_BATCH)
    site.add_raw_job(rate_hz=1500.0, payload_bytes=4096)


def kill_once(site: Site, kind: str, number: int) -> None:
    """Kill one process of a kind and wait until it is back."""
    side = site.agent if kind in ("job", "uplink", "agent", "agent and all") else site.aggregator
    if kind in ("agent", "aggregator"):
        side.kill()
        side.start()
        return
    if kind.endswith("and all"):
        side.kill_all()
        side.start()
        return
    victim = {"job": ("table", "raw")[number % 2], "store": ("csv", "raw")[number % 2]}.get(kind, kind)
    side.wait_replaced(victim, side.kill_worker(victim))


KINDS = {
    "job": 20,
    "uplink": 20,
    "intake": 20,
    "store": 20,
    "agent": 20,
    "aggregator": 20,
    "agent and all": 10,
    "aggregator and all": 10,
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_or_twice_when_it_is_killed_again_and_again(kind, tmp_path: Path, runtime_dir: Path):
    source = random.Random(kill_seed())
    kills = KINDS[kind]
    with Site(tmp_path, runtime_dir) as site:
        add_load(site)
        site.aggregator.start()
        site.agent.start()
        site.wait_put("table", 1000)
        for number in range(kills):
            site.wait_put("table", source.randrange(1, 3000))
            kill_once(site, kind, number)
        site.wait_put("raw", 100)
        ledger = site.deliver_rest()
        table, raw = site.judge_table(batch_count=TABLE_BATCH), site.judge_raw()
    assert table.is_clean, table
    assert raw.is_clean, raw
    assert all(row.balances and not row.dropped for row in ledger)
    for name, verdict in (("table", table), ("raw", raw)):
        assert sum(row.stored for row in ledger if row.job == name) == verdict.stored_count
    assert table.lives_count >= {"job": kills // 2, "agent": kills, "agent and all": kills}.get(kind, 1)
