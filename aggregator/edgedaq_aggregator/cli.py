"""``edgedaq-aggregator``: run it, look at it, let nodes in, prove, mend and end what it stores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from edgedaq.main_config import version
from edgedaq.tail import add_tail, run_tail

from edgedaq_aggregator import app, service
from edgedaq_aggregator.demo import run_demo
from edgedaq_aggregator.demo_configs import chosen_stores
from edgedaq_aggregator.forget import forget
from edgedaq_aggregator.ledger import format_ledger, read_ledger
from edgedaq_aggregator.node_commands import add_invite, invite, revoke, show_nodes
from edgedaq_aggregator.restore import restore
from edgedaq_aggregator.standalone import run_standalone
from edgedaq_aggregator.stored import find_stored
from edgedaq_aggregator.verify import format_report, verify

__all__ = ["main"]

_EXAMPLES = """\
examples:
  edgedaq-aggregator check      --config-dir configs/aggregator     find mistakes; starts nothing
  edgedaq-aggregator run        --config-dir configs/aggregator     until Ctrl-C or SIGTERM
  edgedaq-aggregator status     --config-dir configs/aggregator     in a second terminal
  edgedaq-aggregator nodes      --config-dir configs/aggregator     one line per node
  edgedaq-aggregator invite NODE --config-dir configs/aggregator    what to type on a new node
  edgedaq-aggregator revoke NODE --config-dir configs/aggregator    nobody gets in with its key any more
  edgedaq-aggregator tail       --config-dir my_project job.hv      rows as they come
  edgedaq-aggregator verify     out                                 prove that nothing is lost, from the files
  edgedaq-aggregator restore    --config-dir configs/aggregator store_csv
                                                                    store again what the journal still has
  edgedaq-aggregator forget     --config-dir configs/aggregator old_store
                                                                    wait no longer for a store that is gone
  edgedaq-aggregator standalone --config-dir my_project --out data  jobs and stores on one machine
  edgedaq-aggregator demo       --out out --seconds 20              see it work, without any hardware
  edgedaq-aggregator demo       --out out --stores all              the same, in every store there is

exit status: 0; 78 if a configuration must be edited; 1 for everything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: int(options.command(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgedaq-aggregator",
        description="The aggregator: stores what all nodes send, exactly once, and merges their statistics.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgedaq {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", _run, "run intake and stores until stopped"),
        ("check", _check, "find every mistake in a directory; start nothing"),
        ("doctor", _doctor, "look at this host: clock, disks, devices, keys, network; say what to do"),
        ("reload", _reload, "let a running one take changed files, each job for itself"),
        ("status", _status, "show what a running aggregator does: jobs, nodes, lags, ledger"),
        ("nodes", _nodes, "show the nodes: keys, expiry, when last heard of"),
        ("invite", _invite, "let a node join within the hour; print what to type there"),
        ("revoke", _revoke, "end a node's session and let its key in no more"),
        ("tail", _tail, "print rows as jobs of this directory put them, until Ctrl-C"),
        ("verify", _verify, "prove from the files that produced = stored + waiting + dropped"),
        ("restore", _restore, "let a store begin anew with all that the journal still has"),
        ("forget", _forget, "close the ledger of a store that is no longer configured"),
        ("standalone", _standalone, "run jobs and stores of one directory on this machine until stopped"),
        ("demo", _demo, "run an aggregator and an agent with simulated and real data, then stop"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=function)
        if name not in ("demo", "verify"):
            add_config_dir(command)
        if name in ("restore", "forget"):
            command.add_argument("store", metavar="STORE", help="its unique id: the name of its TOML file")
        if name == "verify":
            command.add_argument(
                "directory", type=Path, metavar="DIR", help="of the TOML files, or where files are stored"
            )
            command.add_argument(
                "--moved-ok", action="store_true", help="files that are not there are no reason to fail"
            )
        if name == "run":
            add_lifeline(command)
        if name in ("status", "nodes"):
            add_status(command)
        if name in ("invite", "revoke"):
            command.add_argument("node", metavar="NODE", help="its supervisor_id")
        if name == "invite":
            add_invite(command)
        if name == "tail":
            add_tail(command)
        if name == "standalone":
            command.add_argument("--out", type=Path, metavar="DIR", help="where files are stored (./out)")
        if name == "demo":
            command.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(%(default)s)")
            command.add_argument(
                "--seconds", type=float, default=20.0, help="how long; 0: until Ctrl-C (%(default)s)"
            )
            command.add_argument(
                "--stores", default="csv,raw", metavar="LIST", help="e.g. csv,sqlite; or all (%(default)s)"
            )
    add_install(commands, app.ROLE, _install)
    return parser


def _install(options: argparse.Namespace) -> int:
    return install_command(options, app.ROLE, *service.install_facts(options.config_dir, options.root))


def _run(options: argparse.Namespace) -> int:
    return app.run(app.load(options.config_dir), lifeline_fd=options.lifeline_fd)


def _check(options: argparse.Namespace) -> int:
    aggregator = app.load(options.config_dir)
    for warning in [*aggregator.warnings, *app.store_doubts(aggregator.files)]:
        sys.stderr.write(f"warning: {warning}\n")
    refuse_broken(aggregator.files, aggregator.problems, always=True)
    stores = sum(file.is_store for file in aggregator.files)
    say(f"{options.config_dir}: {stores} stores, {len(aggregator.files) - stores} jobs, no mistake found")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return report_findings(service.examine(options.config_dir))


def _reload(options: argparse.Namespace) -> int:
    return show_reload(app.runtime_dir_of(options.config_dir))


def _status(options: argparse.Namespace) -> int:
    return show_status(
        app.runtime_dir_of(options.config_dir),
        f"edgedaq-aggregator run --config-dir {options.config_dir}",
        as_json=options.json,
        watch=options.watch,
        refine=_with_ledger,
    )


def _nodes(options: argparse.Namespace) -> int:
    aggregator = app.load(options.config_dir)
    return show_nodes(aggregator, as_json=options.json, watch=options.watch)


def _invite(options: argparse.Namespace) -> int:
    say(invite(app.load(options.config_dir), options))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    say(revoke(app.load(options.config_dir), options.node))
    return 0


def _with_ledger(status: dict[str, Any]) -> dict[str, Any]:
    rows = read_ledger(Path(status["state_dir"]))
    return {**status, "ledger": format_ledger(rows)}


def _verify(options: argparse.Namespace) -> int:
    report = verify(find_stored(options.directory))
    say(format_report(report))
    is_content = report.is_proven or (options.moved_ok and not report.problems and not report.silent)
    return 0 if is_content else 1


def _restore(options: argparse.Namespace) -> int:
    say(restore(app.load(options.config_dir), options.store))
    return 0


def _forget(options: argparse.Namespace) -> int:
    say(forget(app.load(options.config_dir), options.store))
    return 0


def _standalone(options: argparse.Namespace) -> int:
    return run_standalone(options.config_dir, options.out)


def _demo(options: argparse.Namespace) -> int:
    return run_demo(options.out, options.seconds, chosen_stores(options.stores))


def _tail(options: argparse.Namespace) -> int:
    return run_tail(
        app.runtime_dir_of(options.config_dir),
        f"edgedaq-aggregator run --config-dir {options.config_dir}",
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
