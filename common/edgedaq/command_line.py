"""What the two commands have in common: options, exit statuses, ``status`` from a second terminal, running.

Exit status: 0; 78 when a configuration must be edited; 1 for everything else. Each problem of a configuration
is one line on stderr that names file, key, value and what is allowed.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgedaq.config import EXIT_CONFIG
from edgedaq.config_dir import JobFile
from edgedaq.control import ControlError, request
from edgedaq.errors import ConfigError, EdgeDAQError
from edgedaq.logsetup import get_logger, is_service
from edgedaq.runtime_dir import InstanceLock, remove
from edgedaq.supervisor import Supervisor, SupervisorSetup
from edgedaq.tables import LiveTable, format_status, summary_line

__all__ = [
    "add_config_dir",
    "add_lifeline",
    "add_status",
    "guarded",
    "refuse_broken",
    "run_supervisor",
    "say",
    "show_reload",
    "show_status",
]

_RELOAD_LIMIT_S = 60.0


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Let a command take ``--config-dir``, or the name that it had in ENRGDAQ."""
    parser.add_argument(
        "--config-dir",
        "--daq-job-config-path",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of TOML files, one per job",
    )


def add_status(parser: argparse.ArgumentParser) -> None:
    """Let a command take the options of ``status``."""
    parser.add_argument("--json", action="store_true", help="all facts as one JSON map")
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")


def add_lifeline(parser: argparse.ArgumentParser) -> None:
    """Let a command be tied to the process that starts it: it stops when this descriptor comes to its end."""
    parser.add_argument("--lifeline-fd", type=int, help=argparse.SUPPRESS)


def say(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what it raises becomes lines on stderr and an exit status."""
    try:
        return command()
    except ConfigError as e:
        sys.stderr.write("".join(f"{line}\n" for line in str(e).splitlines()))
        return EXIT_CONFIG
    except EdgeDAQError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.EIO):
            raise
        sys.stderr.close()  # the reader or the terminal is gone, and the interpreter would complain
        return 1
    except KeyboardInterrupt:
        return 1


def refuse_broken(files: Iterable[JobFile], problems: Iterable[str], *, always: bool = False) -> None:
    """Refuse broken files where a person can edit them now; under a service the other jobs are to run.

    Args:
        problems: Of the main file, which nobody can run without.
        always: Under a service, too.

    Raises:
        ConfigError: There are problems: all of them, one line each.
    """
    found = list(problems)
    if always or not is_service():
        found += [problem for file in files for problem in file.problems]
    if found:
        raise ConfigError("\n".join(found))


def run_supervisor(runtime_dir: Path, make: Callable[[], SupervisorSetup]) -> int:
    """Run a supervisor, alone in its runtime directory, until it is stopped; return the exit status.

    Args:
        make: Called once the directory is this process's own.

    Raises:
        ConfigError: The directory cannot be used, or another supervisor runs in it.
    """
    with InstanceLock(runtime_dir):
        try:
            return Supervisor(make()).run()
        except Exception:  # noqa: BLE001  # the top of the process; the workers have ended when it arrives here
            get_logger().exception("supervisor.crashed")
            return 1
        finally:
            remove(runtime_dir)


def show_reload(runtime_dir: Path) -> int:
    """Let a running supervisor take its files as they are now; print what changed. 78 if one was refused."""
    told = request(runtime_dir, "reload", limit_s=_RELOAD_LIMIT_S)
    for kind in ("added", "changed", "removed"):
        say(f"{kind}: {', '.join(told[kind]) or '-'}")
    for name, problem in told["refused"].items():
        sys.stderr.write(f"{name} runs on as it was: {problem}\n")
    return EXIT_CONFIG if told["refused"] else 0


def show_status(
    runtime_dir: Path,
    hint: str,
    *,
    as_json: bool,
    watch: bool,
    refine: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    render: Callable[[dict[str, Any]], str] = format_status,
) -> int:
    """Print what a running supervisor says about itself; return the exit status.

    Args:
        hint: What to type to start it, for when nothing runs.
        refine: Adds to the answer what is better found out on this side.
        render: From the answer to text.
    """
    live = LiveTable(sys.stdout) if watch and not as_json else None
    try:
        while True:
            try:
                status = refine(request(runtime_dir, "status"))
            except ControlError as e:
                message = f"{e}; to start it: {hint}" if str(e).startswith("nothing runs") else str(e)
                raise ControlError(message) from e
            if as_json:
                say(json.dumps(status, default=str))
            elif live is not None:
                live.show(render(status), summary_line(status))
            else:
                say(render(status))
            if not watch:
                return 0
            time.sleep(1.0)
    except KeyboardInterrupt:
        return 0
