"""The service as it is written: the same in the tree, valid to systemd, and shut as far as is promised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from edgedaq.errors import ConfigError
from edgedaq.install_service import Service, install, service_files
from edgedaq.main_config import default_state_dir, place_of, resolve_runtime_dir

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {
    "agent": Service(
        "agent", Path("/opt/edgedaq"), Path("/etc/edgedaq-agent"), (), ("agent.toml", "x = 1\n")
    ),
    "aggregator": Service(
        "aggregator",
        Path("/opt/edgedaq"),
        Path("/etc/edgedaq-aggregator"),
        (Path("/srv/edgedaq"),),
        ("aggregator.toml", ""),
    ),
    "instance": Service(
        "agent", Path("/opt/edgedaq"), Path("/etc/edgedaq-agent/left"), (), ("agent.toml", "")
    ),
}
SCORES = {"agent": 2.0, "aggregator": 1.5, "instance": 2.0}
every_service = pytest.mark.parametrize("name", SERVICES)


def analyze(*arguments):
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is not installed")
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def unit_path(service, directory, **replaced):
    """Write its unit with a program that exists; return where."""
    files = service_files(service, ["dialout"])
    (text,) = [text for path, text in files.items() if path.suffix == ".service"]
    path = directory / service.unit_file
    path.write_text(re.sub(r"/opt/edgedaq/bin/\S+", "/bin/true", text))
    return path


@every_service
def test_systemd_finds_nothing_wrong_with_the_unit(name, tmp_path):
    assert analyze("verify", "--man=no", unit_path(SERVICES[name], tmp_path)) == (0, "")


@every_service
def test_the_unit_is_shut_as_far_as_is_promised(name, tmp_path):
    path = unit_path(SERVICES[name], tmp_path)
    status, told = analyze("security", "--offline=true", "--no-pager", path)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found, (status, told)
    assert float(found[1]) <= SCORES[name], told


def sample_of(path):
    """Return where in the tree a file is shown, e.g. ``systemd/system/edgedaq-agent.service``."""
    return ROOT / "systemd" / path.parent.name / path.name


@every_service
def test_what_is_in_the_tree_is_what_is_installed(name):
    for path, text in service_files(SERVICES[name], ["dialout"]).items():
        held = sample_of(path)
        if name != "instance" or path.suffix == ".service":
            assert held.read_text() == text, f"{held}: make systemd"


@pytest.fixture
def root(tmp_path):
    """Return a tree with a program and the groups of a Pi."""
    for command in ("edgedaq-agent", "edgedaq-aggregator"):
        program = tmp_path / "opt/edgedaq/bin" / command
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/group").write_text("root:x:0:\ndialout:x:20:\ni2c:x:990:\n")
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    return tmp_path


def tree(root):
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def put(service, root, **options):
    told: list[str] = []
    install(service, root=root, say=told.append, start=False, **{"dry_run": False, **options})
    return "\n".join(told)


def test_a_dry_run_prints_everything_and_writes_nothing(root):
    before = tree(root)
    told = put(SERVICES["agent"], root, dry_run=True)
    assert tree(root) == before
    for line in ("ExecStart=/opt/edgedaq/bin/edgedaq-agent run", "m edgedaq i2c", "run systemctl", "x = 1"):
        assert line in told
    assert "m edgedaq gpio" not in told


def test_a_service_that_could_not_see_its_own_program_is_refused_with_the_remedy(root, tmp_path):
    service = Service("agent", Path("/home/pi/venv"), Path("/etc/edgedaq-agent"))
    with pytest.raises(ConfigError, match=r"home directory.*python3 -m venv /opt/edgedaq"):
        put(service, root)


@pytest.mark.parametrize("place", ["/srv/daq", "/etc/other", "/etc/edgedaq-agent/a/b"])
def test_a_service_has_its_configuration_below_etc(place, root):
    with pytest.raises(ConfigError, match="must be /etc/edgedaq-agent"):
        put(Service("agent", Path("/opt/edgedaq"), Path(place)), root, dry_run=True)


def test_a_person_finds_the_running_service_by_its_directory_alone(monkeypatch):
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    for directory, place in (
        ("edgedaq-agent", "edgedaq-agent"),
        ("edgedaq-agent/left", "edgedaq-agent-left"),
    ):
        path = Path("/etc") / directory
        assert place_of(path) == place
        assert default_state_dir(path, "n1") == Path("/var/lib") / place
        assert resolve_runtime_dir("", path, "agent", path / "agent.toml") == Path("/run") / place
    assert place_of(Path("/home/pi/configs")) is None
