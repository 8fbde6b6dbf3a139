"""``doctor`` of both commands: what all hosts have in common is looked at here."""

from __future__ import annotations

import getpass
import pwd
from collections.abc import Iterable
from pathlib import Path

from edgedaq.command_line import say
from edgedaq.config_dir import JobFile
from edgedaq.doctor import (
    Finding,
    check_clock,
    check_devices,
    check_disk,
    check_memory,
    check_wear,
    device_paths,
    format_findings,
)
from edgedaq.install_service import USER
from edgedaq.main_config import place_of

__all__ = ["examine_host", "report_findings", "user_of"]


def user_of(config_dir: Path) -> str:
    """Return who runs the jobs of a directory: the service's user if it is a service's."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return getpass.getuser()
    return USER if place_of(config_dir) else getpass.getuser()


def examine_host(
    files: Iterable[JobFile],
    user: str,
    *,
    runtime_dir: Path,
    disks: Iterable[tuple[str, Path, int, int]],
) -> list[Finding]:
    """Return what is so with clock, disks, shared memory and the devices that jobs name.

    Args:
        disks: Name, directory, limit and reserve of what is kept there.
    """
    held = list(files)
    found = check_clock()
    for subject, directory, limit, reserve in disks:
        found += check_disk(subject, directory, limit, reserve)
        found += check_wear(subject, directory)
    rings = [file.config.ring for file in held if file.config is not None and not file.is_store]
    found += check_memory(runtime_dir, sum(ring.ring_bytes + ring.slots * ring.slot_bytes for ring in rings))
    for file in held:
        found += [Finding("problem", file.path.name, problem, "edit it") for problem in file.problems]
        found += check_devices(file.path.name, device_paths(file.raw), user)
    return found


def report_findings(findings: Iterable[Finding]) -> int:
    """Print what was found; return 1 if any of it is a problem."""
    held = list(findings)
    say(format_findings(held))
    problems = sum(found.level == "problem" for found in held)
    say(f"{len(held)} looked at, {problems} to be mended")
    return 1 if problems else 0
