"""``edgedaq-agent``: run, check, status, join, tail."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edgedaq.command_line import (
    add_config_dir,
    add_lifeline,
    add_status,
    guarded,
    refuse_broken,
    say,
    show_reload,
    show_status,
)
from edgedaq.doctor_command import report_findings
from edgedaq.install_command import add_install, install_command
from edgedaq.keys import enrolment_path
from edgedaq.main_config import version
from edgedaq.tail import add_tail, run_tail

from edgedaq_agent import app, service
from edgedaq_agent.join import join

__all__ = ["main"]

_EXAMPLES = """\
examples:
  edgedaq-agent check  --config-dir configs/agent      find mistakes; starts nothing
  edgedaq-agent run    --config-dir configs/agent      until Ctrl-C or SIGTERM
  edgedaq-agent status --config-dir configs/agent      in a second terminal
  edgedaq-agent status --config-dir configs/agent --watch
  edgedaq-agent join ADDRESS TOKEN --config-dir configs/agent    once, as `edgedaq-aggregator invite` says
  edgedaq-agent tail   --config-dir configs/agent job.pc_metrics

exit status: 0; 78 if a configuration must be edited; 1 for everything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: int(options.command(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgedaq-agent",
        description="The edge agent: runs jobs beside the hardware and forwards their data, exactly once.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgedaq {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", _run, "run the jobs of a directory until stopped"),
        ("check", _check, "find every mistake in a directory; start nothing"),
        ("doctor", _doctor, "look at this host: clock, disks, devices, keys, network; say what to do"),
        ("reload", _reload, "let a running one take changed files, each job for itself"),
        ("status", _status, "show what a running agent does"),
        ("join", _join, "make this node's key and let an aggregator know it, by an invitation"),
        ("tail", _tail, "print rows as jobs put them, until Ctrl-C"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=function)
        add_config_dir(command)
        if name == "join":
            command.add_argument(
                "address", metavar="ADDRESS", help="where the aggregator listens, tcp://HOST:PORT"
            )
            command.add_argument(
                "token", metavar="TOKEN", help="what the invitation says; valid once, for an hour"
            )
        if name == "run":
            add_lifeline(command)
        if name == "status":
            add_status(command)
        if name == "tail":
            add_tail(command)
    add_install(commands, app.ROLE, _install)
    return parser


def _install(options: argparse.Namespace) -> int:
    return install_command(options, app.ROLE, *service.install_facts(options.config_dir, options.root))


def _run(options: argparse.Namespace) -> int:
    return app.run(options.config_dir, lifeline_fd=options.lifeline_fd)


def _check(options: argparse.Namespace) -> int:
    agent = app.load(options.config_dir)
    for warning in agent.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    refuse_broken(agent.files, agent.problems, always=True)
    say(f"{options.config_dir}: {len(agent.files)} jobs, no mistake found")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return report_findings(service.examine(options.config_dir))


def _reload(options: argparse.Namespace) -> int:
    return show_reload(app.runtime_dir_of(options.config_dir))


def _status(options: argparse.Namespace) -> int:
    return show_status(
        app.runtime_dir_of(options.config_dir),
        f"edgedaq-agent run --config-dir {options.config_dir}",
        as_json=options.json,
        watch=options.watch,
    )


def _join(options: argparse.Namespace) -> int:
    enrolment = join(options.config_dir, options.address, options.token)
    say(
        f"{enrolment.node} has joined {enrolment.aggregator}\n"
        f"its key is in {enrolment_path(options.config_dir)}; now: "
        f"edgedaq-agent run --config-dir {options.config_dir}"
    )
    return 0


def _tail(options: argparse.Namespace) -> int:
    return run_tail(
        app.runtime_dir_of(options.config_dir),
        f"edgedaq-agent run --config-dir {options.config_dir}",
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
