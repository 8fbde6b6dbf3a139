"""SIGTERM and Ctrl-C to either side: it ends soon, all that was put is on a disk, the next start delivers."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.system.harness import STOP_LIMIT_S, Site

BATCH = 20

pytestmark = pytest.mark.timeout(120)
both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def site(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as made:
        made.add_table_job(rate_hz=4000.0, batch_count=BATCH)
        made.add_raw_job(rate_hz=500.0, payload_bytes=8192)
        yield made


def forget_memory(site: Site, side_runtime: Path) -> None:
    """Take away all that a reboot would: what was put must be on a disk."""
    assert not list(side_runtime.glob("rings/*.ring")), site.agent.tail()
    shutil.rmtree(side_runtime, ignore_errors=True)


def assert_all_delivered(site: Site) -> None:
    ledger = site.deliver_rest()
    table, raw = site.judge_table(batch_count=BATCH), site.judge_raw()
    assert table.is_clean, table
    assert raw.is_clean, raw
    assert table.stored_count
    assert raw.stored_count
    assert not any(row.dropped for row in ledger)


@both_signals
def test_an_agent_that_is_stopped_keeps_everything_until_its_next_start(site: Site, number):
    site.aggregator.start()
    site.agent.start()
    site.wait_put("table", 4000)
    assert site.agent.stop(number) < STOP_LIMIT_S
    forget_memory(site, site.agent.runtime_dir)
    assert_all_delivered(site)


@both_signals
def test_an_agent_without_its_aggregator_is_stopped_with_its_backlog_on_disk(site: Site, number):
    site.agent.start()
    site.wait_put("table", 8000)
    assert site.agent.stop(number) < STOP_LIMIT_S
    forget_memory(site, site.agent.runtime_dir)
    assert_all_delivered(site)


@both_signals
def test_an_aggregator_that_is_stopped_under_load_goes_on_where_it_was(site: Site, number):
    site.aggregator.start()
    site.agent.start()
    site.wait_put("table", 4000)
    assert site.aggregator.stop(number) < STOP_LIMIT_S
    forget_memory(site, site.aggregator.runtime_dir)
    site.wait_put("table", 2000)
    site.aggregator.start()
    site.wait_put("table", 2000)
    assert_all_delivered(site)


@both_signals
def test_an_aggregator_whose_agent_is_away_is_stopped_with_all_that_arrived(site: Site, number):
    site.aggregator.start()
    site.agent.start()
    site.wait_put("table", 6000)
    site.agent.kill()
    assert site.aggregator.stop(number) < STOP_LIMIT_S
    forget_memory(site, site.aggregator.runtime_dir)
    site.agent.start()
    assert_all_delivered(site)
