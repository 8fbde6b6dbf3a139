"""What is particular about an agent as a service, and about its host."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from edgedaq.doctor import Finding, check_key_file, check_reachable
from edgedaq.doctor_command import examine_host, user_of
from edgedaq.errors import ConfigError
from edgedaq.keys import ENROLMENT_NAME, enrolment_path
from edgedaq.transport import is_loopback

from edgedaq_agent import app
from edgedaq_agent.config import FILE_NAME
from edgedaq_agent.dialling import Dialling

__all__ = ["examine", "install_facts"]


_MAIN_FILE = """\
# One node. Every other .toml file of this directory is a job; `edgedaq-agent check` finds mistakes.
supervisor_id = "{node}"
# aggregator = "tcp://192.0.2.1:7770"   # left out: where this node has joined
"""


_JOIN = "there: edgedaq-aggregator invite NODE; here: what that prints"


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
    try:
        address = (
            Dialling(agent.config.aggregator, enrolment_path(config_dir), agent.config.supervisor_id)
            .destination()
            .address
        )
    except ConfigError as e:
        return [*found, Finding("problem", "keys", str(e), _JOIN)]
    key_file = config_dir / ENROLMENT_NAME
    if key_file.exists() or not is_loopback(address):
        missing = Finding("problem", "keys", "this node has joined no aggregator", _JOIN)
        found += check_key_file(key_file, user, missing=missing)
    return found + check_reachable(address)
