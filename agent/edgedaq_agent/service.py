"""What is particular about an agent as a service, and about its host."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from edgedaq.doctor import Finding, check_key_file, check_reachable
from edgedaq.doctor_command import examine_host, user_of
from edgedaq.install_service import KEY_FILE

from edgedaq_agent import app
from edgedaq_agent.config import FILE_NAME

__all__ = ["examine", "install_facts"]

_LOOPBACK = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:")

_MAIN_FILE = """\
# One node. Every other .toml file of this directory is a job; `edgedaq-agent check` finds mistakes.
supervisor_id = "{node}"
aggregator = "tcp://127.0.0.1:7770"
"""


def install_facts(config_dir: Path, root: Path) -> tuple[tuple[str, str], list[Path]]:
    """Return a first main file, and what the service writes to besides its own directories: nothing."""
    host = "" if root != Path("/") else socket.gethostname().partition(".")[0]
    name = config_dir.name if len(config_dir.parts) > 3 else host
    node = re.sub(r"[^A-Za-z0-9_-]", "-", name).lstrip("_-")[:63] or "node1"
    return (FILE_NAME, _MAIN_FILE.format(node=node)), []


def examine(config_dir: Path) -> list[Finding]:
    """Return what is so with a node: configuration, host, devices, key, aggregator.

    Raises:
        ConfigError: ``agent.toml`` itself is broken.
    """
    agent = app.load(config_dir)
    place, user = agent.place, user_of(config_dir)
    found = [Finding("problem", FILE_NAME, problem, "edit it") for problem in agent.problems]
    kept = [lane for lane in place.lanes if lane.options.durability == "disk"]
    reserve = max((lane.reserve for lane in kept), default=0)
    found += examine_host(
        agent.files,
        user,
        runtime_dir=place.runtime_dir,
        disks=[("spool", place.state_dir, sum(lane.limit for lane in kept), reserve)],
    )
    key_file = config_dir / KEY_FILE
    if key_file.exists() or not agent.config.aggregator.startswith(_LOOPBACK):
        fix = "edgedaq-aggregator invite NODE there, edgedaq-agent join here"
        missing = Finding("problem", "keys", "this node is not enrolled", fix)
        found += check_key_file(key_file, user, missing=missing)
    return found + check_reachable(agent.config.aggregator)
