"""``install-service`` and ``uninstall-service`` of both commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedaq.command_line import say
from edgedaq.install_service import Service, install, uninstall

__all__ = ["add_install", "install_command"]


def add_install(commands: Any, role: str, run: Any) -> None:
    """Add both commands to those of a side; ``run(options)`` is called for either."""
    for name, text in (
        ("install-service", "make a systemd service of it: user, directories, unit; may be run again"),
        ("uninstall-service", "take the service away; configuration and data stay"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run, is_install=name == "install-service")
        command.add_argument(
            "--config-dir",
            type=Path,
            default=Path(f"/etc/edgedaq-{role}"),
            metavar="DIR",
            help="(%(default)s); one of several on this host: %(default)s/NAME",
        )
        command.add_argument("--root", type=Path, default=Path("/"), help="a tree to install into (/)")
        command.add_argument("--dry-run", action="store_true", help="print everything, do nothing")
        if name == "install-service":
            command.add_argument("--start", action="store_true", help="start it, too, or start it again")


def install_command(
    options: argparse.Namespace, role: str, main_file: tuple[str, str], writable: Sequence[Path] = ()
) -> int:
    """Do what one of the two was called for; return the exit status.

    Args:
        main_file: Name and content for a directory that has none.
        writable: What the service writes to besides its own directories.
    """
    outside = tuple(path for path in writable if not path.is_relative_to("/var/lib"))
    prefix = Path(sys.prefix)
    service = Service(role, prefix, options.config_dir, outside, main_file)
    if options.is_install:
        install(service, root=options.root, dry_run=options.dry_run, start=options.start, say=say)
    else:
        uninstall(service, root=options.root, dry_run=options.dry_run, say=say)
    return 0
