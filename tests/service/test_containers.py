"""The services on machines that boot: install, run, hang, restart, reboot, power cut, upgrade."""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from edgedaq_aggregator.ledger import LedgerRow, read_ledger

from tests.service.containers import (
    ROOT,
    Machine,
    Network,
    build_wheel,
    install_wheel,
    layers,
    product_layer,
    why_not,
)
from tests.system.oracle import Verdict, judge_csv, witnessed

AGENT, AGGREGATOR = "edgedaq-agent", "edgedaq-aggregator"
BATCH = 10
RATE_HZ = 2000.0
JOB = f"""\
daq_job_type = "witness_job.py:DAQJobWitness"
witness_dir = "/var/lib/edgedaq-agent/witness"
rate_hz = {RATE_HZ}
batch_count = {BATCH}
[store_config.csv]
file_path = "table.csv"
"""

pytestmark = pytest.mark.timeout(900)  # the first builds what is then kept


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the layers of a machine with this tree's EdgeDAQ."""
    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    lower = layers()
    return [product_layer(lower, tmp_path_factory.mktemp("product")), *lower]


class Site:
    """A sensor host and a control room."""

    def __init__(self, agent: Machine, aggregator: Machine) -> None:
        self.agent = agent
        self.aggregator = aggregator
        self.witness = agent.root / "var/lib/edgedaq-agent/witness"

    def install(self) -> None:
        """Do what the page for installers says."""
        self.aggregator.run(AGGREGATOR, "install-service")
        (self.aggregator.root / "etc/edgedaq-aggregator/csv.toml").write_text(
            'daq_job_type = "DAQJobStoreCSV"\n'
        )
        main = self.aggregator.root / "etc/edgedaq-aggregator/aggregator.toml"
        main.write_text(main.read_text().replace("127.0.0.1:7770", "0.0.0.0:7770"))
        self.aggregator.run("systemctl", "start", AGGREGATOR)
        self.agent.run(AGENT, "install-service")
        directory = self.agent.root / "etc/edgedaq-agent"
        (directory / "agent.toml").write_text('supervisor_id = "pi"\n')
        shutil.copy(ROOT / "tests/system/witness_job.py", directory)
        (directory / "tests/system").mkdir(parents=True)
        shutil.copy(ROOT / "tests/system/payload.py", directory / "tests/system")
        (directory / "table.toml").write_text(JOB)
        self.agent.run("install", "-d", "-o", "edgedaq", "-g", "edgedaq", "/var/lib/edgedaq-agent/witness")
        self.agent.run("systemctl", "start", AGENT)
        self.join("pi")

    def join(self, node: str, config_dir: str = "/etc/edgedaq-agent") -> None:
        """Let a node that runs join, as `invite` says."""
        where = ("--config-dir", "/etc/edgedaq-aggregator")
        told = self.aggregator.run(AGGREGATOR, "invite", node, *where, "--address", "tcp://127.0.0.1:7770")
        (line,) = [line.split() for line in told.splitlines() if " join " in line]
        self.agent.run(*line[: line.index("--config-dir")], "--config-dir", config_dir)

    def put_count(self) -> int:
        return sum(witnessed(self.witness, "table").values())

    def wait_put(self, more: int) -> None:
        wanted = self.put_count() + more
        self.agent.wait(lambda: self.put_count() >= wanted, 60, f"{more} rows are put")

    def status(self, machine: Machine) -> dict[str, Any]:
        command = AGENT if machine is self.agent else AGGREGATOR
        text = machine.ask(command, "status", "--json", "--config-dir", f"/etc/{command}")
        return json.loads(text) if text else {}

    def job(self, name: str) -> dict[str, Any]:
        return next((job for job in self.status(self.agent).get("jobs", ()) if job["unique_id"] == name), {})

    def ledger(self) -> list[LedgerRow]:
        return read_ledger(self.aggregator.root / "var/lib/edgedaq-aggregator")

    def lives(self) -> set[int]:
        """Return the lives that have put."""
        return {life for life, count in witnessed(self.witness, "table").items() if count}

    def deliver_rest(self) -> Verdict:
        """End the job by its file, let everything arrive, stop both; return the verdict."""
        (self.agent.root / "etc/edgedaq-agent/table.toml").unlink()
        self.agent.run("systemctl", "reload", AGENT)
        count = len(self.lives())

        def is_settled() -> bool:
            rows = self.ledger()
            ended = [row for row in rows if row.closed]
            return len(ended) >= count and all(row.balances and not row.waiting for row in rows)

        self.aggregator.wait(is_settled, 60, f"the ledger balances: {self.ledger()}")
        self.agent.run("systemctl", "stop", AGENT)
        self.aggregator.run("systemctl", "stop", AGGREGATOR)
        for machine, unit in ((self.agent, AGENT), (self.aggregator, AGGREGATOR)):
            assert machine.ask("systemctl", "is-failed", unit).strip() == "inactive", machine.tail()
        files = (self.aggregator.root / "srv/edgedaq/pi").glob("table*.csv")
        return judge_csv(files, witnessed(self.witness, "table"), BATCH)


@pytest.fixture
def site(product: list[Path], tmp_path: Path):
    with (
        Network() as network,
        Machine("agent", product, tmp_path, network) as agent,
        Machine("aggregator", product, tmp_path, network) as aggregator,
    ):
        made = Site(agent, aggregator)
        made.install()
        yield made


def shown(machine: Machine, unit: str, name: str) -> str:
    return machine.ask("systemctl", "show", "--value", f"--property={name}", unit).strip()


def has_version(site: Site, machine: Machine, version: str) -> bool:
    return bool(site.status(machine).get("version") == version)


def assert_nothing_is_lost(site: Site) -> None:
    verdict = site.deliver_rest()
    assert verdict.is_clean, (verdict, site.agent.tail(), site.aggregator.tail())
    assert verdict.stored_count
    assert not any(row.dropped for row in site.ledger())


def test_what_is_installed_runs_says_how_it_does_and_can_be_found_in_the_journal(site: Site):
    site.wait_put(2000)
    for machine, unit in ((site.agent, AGENT), (site.aggregator, AGGREGATOR)):
        assert machine.ask("systemctl", "is-active", unit).strip() == "active"
        assert machine.ask("systemctl", "is-enabled", unit).strip() == "enabled"
        again = machine.run(unit, "install-service")
        assert "write" not in again, again
    site.agent.wait(
        lambda: "link up" in shown(site.agent, AGENT, "StatusText"), 10, "says that the link is up"
    )
    assert "2 of 2 jobs run" in shown(site.agent, AGENT, "StatusText")
    assert site.job("table")["state"] == "RUNNING"
    entry = json.loads(
        site.agent.run(
            "journalctl", "-o", "json", "-n", "1", "EDGEDAQ_JOB=table", "EDGEDAQ_EVENT=job.changed"
        )
    )
    assert (entry["EDGEDAQ_NODE"], entry["EDGEDAQ_STATE_TO"], entry["PRIORITY"]) == ("pi", "RUNNING", "6")
    assert entry["_SYSTEMD_UNIT"] == f"{AGENT}.service"
    pid = shown(site.agent, AGENT, "MainPID")
    assert site.agent.run("stat", "-c", "%U", f"/proc/{pid}").strip() == "edgedaq"
    assert_nothing_is_lost(site)
    site.agent.run(AGENT, "uninstall-service")
    assert (site.agent.root / "etc/edgedaq-agent/agent.toml").exists()
    assert list((site.agent.root / "var/lib/edgedaq-agent").iterdir())
    assert site.agent.ask("systemctl", "is-enabled", AGENT).strip() == ""


def test_a_main_loop_that_hangs_is_killed_by_the_watchdog_and_comes_back(site: Site):
    override = site.agent.root / "etc/systemd/system/edgedaq-agent.service.d/override.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nWatchdogSec=3\n")
    site.agent.run("systemctl", "daemon-reload")
    site.agent.run("systemctl", "restart", AGENT)
    site.wait_put(1000)
    former = shown(site.agent, AGENT, "MainPID")
    site.agent.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", AGENT)
    site.agent.wait(
        lambda: (
            shown(site.agent, AGENT, "MainPID") not in (former, "0", "")
            and shown(site.agent, AGENT, "ActiveState") == "active"
        ),
        40,
        "is back",
    )
    assert "Watchdog timeout" in site.agent.run("journalctl", "--no-pager", "-u", AGENT)
    site.wait_put(1000)
    assert_nothing_is_lost(site)


def test_stops_and_restarts_of_either_under_load_lose_nothing(site: Site):
    site.wait_put(1000)
    for _ in range(2):
        site.agent.run("systemctl", "restart", AGENT)
        site.wait_put(1000)
        site.aggregator.run("systemctl", "restart", AGGREGATOR)
        site.wait_put(1000)
    site.aggregator.run("systemctl", "stop", AGGREGATOR)
    site.wait_put(4000)
    site.agent.run("systemctl", "stop", AGENT)
    assert shown(site.agent, AGENT, "Result") == "success"
    site.aggregator.run("systemctl", "start", AGGREGATOR)
    site.agent.run("systemctl", "start", AGENT)
    site.wait_put(1000)
    assert_nothing_is_lost(site)


def test_a_killed_service_finds_its_rings_again(site: Site):
    site.aggregator.run("systemctl", "stop", AGGREGATOR)
    site.wait_put(1000)
    site.agent.run("systemctl", "kill", "--kill-whom=all", "--signal=KILL", AGENT)
    site.agent.wait(lambda: shown(site.agent, AGENT, "ActiveState") == "active", 30, "is back")
    site.aggregator.run("systemctl", "start", AGGREGATOR)
    site.wait_put(1000)
    assert_nothing_is_lost(site)


def test_both_machines_boot_again_and_go_on_with_nothing_lost(site: Site):
    site.wait_put(2000)
    site.agent.reboot()
    site.wait_put(2000)
    site.aggregator.reboot()
    site.wait_put(2000)
    assert_nothing_is_lost(site)


def test_a_power_cut_of_the_control_room_loses_nothing(site: Site):
    site.wait_put(4000)
    site.aggregator.cut_power()
    site.wait_put(2000)
    site.aggregator.boot()
    site.wait_put(2000)
    assert_nothing_is_lost(site)


def test_a_power_cut_of_the_sensor_host_loses_at_most_a_tail_and_the_stream_says_so(site: Site):
    site.wait_put(4000)
    site.agent.cut_power()
    site.agent.boot()
    site.agent.wait(lambda: site.job("table").get("state") == "RUNNING", 60, "the job is back")
    site.wait_put(2000)
    verdict = site.deliver_rest()
    # What was not acknowledged and not yet in the spool: spool_after, one commit, and a busy machine's delay.
    assert verdict.missing_count <= 2 * RATE_HZ, verdict
    assert not (verdict.twice or verdict.disordered or verdict.corrupt or verdict.beyond), verdict
    marks = (site.aggregator.root / "srv/edgedaq/pi/_marks.csv").read_text().splitlines()
    assert [line for line in marks if ",close," in line], marks


def test_an_upgrade_to_a_newer_build_continues_where_the_older_one_was(site: Site, tmp_path: Path):
    wheel = build_wheel(tmp_path / "newer", "99.0.1")
    for machine, command in ((site.aggregator, AGGREGATOR), (site.agent, AGENT)):
        site.wait_put(2000)
        install_wheel(machine.root, wheel)
        machine.run(command, "install-service", "--start")
        machine.wait(partial(has_version, site, machine, "99.0.1"), 20, "is the newer one")
    site.wait_put(2000)
    assert_nothing_is_lost(site)


def test_several_agents_run_on_one_host_by_the_template(site: Site):
    site.wait_put(1000)
    for name in ("left", "right"):
        directory = site.agent.root / f"etc/edgedaq-agent/{name}"
        site.agent.run(AGENT, "install-service", "--config-dir", f"/etc/edgedaq-agent/{name}")
        (directory / "pc.toml").write_text(
            'daq_job_type = "DAQJobPCMetrics"\ninterval_seconds = 0.2\n'
            '[store_config.csv]\nfile_path = "pc.csv"\n'
        )
        site.agent.run("systemctl", "start", f"{AGENT}@{name}")
        site.join(name, f"/etc/edgedaq-agent/{name}")
    stored = site.aggregator.root / "srv/edgedaq"
    for name in ("left", "right"):
        site.aggregator.wait((stored / name / "pc.csv").exists, 30, f"data of {name}")
        site.agent.run(AGENT, "status", "--config-dir", f"/etc/edgedaq-agent/{name}")
    site.agent.run(AGENT, "uninstall-service", "--config-dir", "/etc/edgedaq-agent/left")
    assert site.agent.ask("systemctl", "is-active", f"{AGENT}@right").strip() == "active"
    site.agent.run(AGENT, "uninstall-service", "--config-dir", "/etc/edgedaq-agent/right")
    assert not list((site.agent.root / "etc/systemd/system").glob("edgedaq-agent@*"))
    assert_nothing_is_lost(site)


def test_a_broken_main_file_is_not_tried_again_and_a_broken_job_file_stops_nobody(site: Site):
    (site.agent.root / "etc/edgedaq-agent/broken.toml").write_text("daq_job_type = 3\n")
    site.agent.run("systemctl", "restart", AGENT)
    site.wait_put(1000)
    assert site.job("broken")["state"] == "FAILED"
    assert "FAILED: broken" in shown(site.agent, AGENT, "StatusText")
    main = site.agent.root / "etc/edgedaq-agent/agent.toml"
    text = main.read_text()
    main.write_text(text + "typo = 1\n")
    site.agent.ask("systemctl", "restart", AGENT)
    site.agent.wait(lambda: shown(site.agent, AGENT, "ActiveState") == "failed", 30, "has given up")
    assert shown(site.agent, AGENT, "ExecMainStatus") == "78"
    assert "typo" in site.agent.run("journalctl", "--no-pager", "-u", AGENT)
    time.sleep(3)  # longer than RestartSec: it must not come back by itself
    assert shown(site.agent, AGENT, "ActiveState") == "failed"
    main.write_text(text)
    site.agent.run("systemctl", "start", AGENT)
    (site.agent.root / "etc/edgedaq-agent/broken.toml").unlink()
    site.wait_put(1000)
    assert_nothing_is_lost(site)
