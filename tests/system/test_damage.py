"""Flipped bits, on the way and on disks: seen by the checksum, then repaired or written down, not stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.harness import Site, free_port
from tests.system.payload import MAGIC
from tests.system.proxy import Proxy

PAYLOAD = 4096

pytestmark = pytest.mark.timeout(120)


def flip_in_the_middle(directory: Path) -> None:
    """Flip one bit within a message near the middle of what the segments of a directory hold."""
    places = []
    for path in sorted(directory.rglob("*.seg")):
        content = path.read_bytes()
        position = content.find(MAGIC)
        while position >= 0:
            places.append((path, position))
            position = content.find(MAGIC, position + PAYLOAD)
    assert places, f"no message in any segment of {directory}"
    path, position = places[len(places) // 2]
    with path.open("r+b") as file:
        file.seek(position + PAYLOAD // 2)
        byte = file.read(1)[0]
        file.seek(position + PAYLOAD // 2)
        file.write(bytes([byte ^ 0x10]))


def test_bits_flipped_between_uplink_and_intake_are_asked_for_again(tmp_path: Path, runtime_dir: Path):
    port = free_port()
    with (
        Proxy(port, flip_every_bytes=2_000_000, seed=7) as proxy,
        Site(tmp_path, runtime_dir, port=port, agent_port=proxy.port) as site,
    ):
        site.add_raw_job(payload_bytes=PAYLOAD, limit_count=8000, rate_hz=4000.0)
        site.aggregator.start()
        site.agent.start()
        site.wait_put_count("raw", 8000)
        ledger = site.deliver_rest()
        verdict = site.judge_raw()
        assert proxy.flipped_count >= 5
    assert verdict.is_clean, verdict
    assert verdict.stored_count == 8000
    assert not any(row.dropped for row in ledger)


def assert_only_the_damaged_is_missing_and_written_down(site: Site, put_count: int) -> None:
    ledger = site.deliver_rest()
    verdict = site.judge_raw()
    assert not (verdict.twice or verdict.corrupt or verdict.disordered or verdict.beyond), verdict
    assert 0 < verdict.missing_count < put_count
    assert sum(row.dropped for row in ledger) == verdict.missing_count
    assert ",gap," in "".join(path.read_text() for path in site.node_dir.glob("_marks*.csv"))


def test_a_bit_flipped_in_the_spool_costs_that_frame_and_leaves_a_gap(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as site:
        site.add_raw_job(payload_bytes=PAYLOAD, limit_count=3000)
        site.agent.start()
        site.wait_put_count("raw", 3000)
        site.agent.stop()
        flip_in_the_middle(site.spool_dir)
        assert_only_the_damaged_is_missing_and_written_down(site, 3000)


def test_a_bit_flipped_in_the_journal_costs_that_frame_and_leaves_a_gap(tmp_path: Path, runtime_dir: Path):
    with Site(tmp_path, runtime_dir) as site:
        (site.aggregator_dir / "raw.toml").unlink()
        site.add_raw_job(payload_bytes=PAYLOAD, limit_count=3000)
        site.aggregator.start()
        site.agent.start()
        site.wait_put_count("raw", 3000)
        site.agent.wait(lambda: _spooled_bytes(site) == 0, 20.0, "all is in the journal")
        site.agent.stop()
        site.aggregator.stop()
        flip_in_the_middle(site.state_dir / "journal")
        site.add_store("raw", "DAQJobStoreRaw")
        assert_only_the_damaged_is_missing_and_written_down(site, 3000)


def _spooled_bytes(site: Site) -> int:
    report = site.agent.jobs().get("uplink", {}).get("total") or {}
    return int(report.get("extra", {}).get("waiting_bytes", 1))
