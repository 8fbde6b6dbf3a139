"""What is particular about an agent as a service."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from edgedaq_agent.config import FILE_NAME

__all__ = ["install_facts"]

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
