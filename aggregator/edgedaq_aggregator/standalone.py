"""``standalone``: jobs and stores of one directory on one machine, one table to watch, the ledger at the end.

In a terminal the table is redrawn each second, and meanwhile what is logged goes to
``<state_dir>/standalone.log``, because lines between would tear it. Elsewhere (a pipe, a service) there is a
line each second, and the log is on stderr as usual.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from edgedaq.command_line import refuse_broken, say
from edgedaq.main_config import make_directory
from edgedaq.patient_stream import PatientStream
from edgedaq.supervisor import Supervisor
from edgedaq.tables import LiveTable, format_status, summary_line

from edgedaq_aggregator import app
from edgedaq_aggregator.ledger import format_ledger, read_ledger

__all__ = ["run_standalone"]

LOG_NAME = "standalone.log"
_STDERR = 2
_READ_LIMIT_S = 1.0


def run_standalone(config_dir: Path, out_dir: Path | None) -> int:
    """Run until stopped; return the exit status, 1 if the ledger does not balance.

    Raises:
        ConfigError: It cannot run with this directory.
    """
    aggregator = app.load(config_dir, is_standalone=True, out_dir=out_dir)
    refuse_broken(aggregator.files, aggregator.problems)
    place = aggregator.place
    for warning in aggregator.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    say(f"writing to {place.out_dir}; Ctrl-C ends")
    table = _Table()
    if sys.stdout.isatty() and os.isatty(_STDERR):
        make_directory(aggregator.path, "state_dir", place.state_dir)
        log_path = place.state_dir / LOG_NAME
        with _stderr_to(log_path):
            status = app.run(aggregator, table)
        ending = f"log: {log_path}\n\n"
    else:
        status = app.run(aggregator, table)
        ending = "\n"
    rows = read_ledger(place.state_dir)
    if table.close():
        say(ending + format_ledger(rows))
    else:
        sys.stderr.write("the ledger is not shown: nobody reads what is written to stdout\n")
    return status or (0 if all(row.balances for row in rows) else 1)


class _Table(app.LiveView):
    """Shows the supervisor's status on stdout, as far as somebody reads there."""

    def __init__(self) -> None:
        self._stream = PatientStream(sys.stdout)
        self._live = LiveTable(self._stream)

    def show(self, supervisor: Supervisor) -> None:
        """Draw it anew."""
        status = supervisor.status()
        self._live.show(format_status(status), summary_line(status))

    def close(self) -> bool:
        """Leave stdout to others; False if nobody reads there."""
        return self._stream.close(_READ_LIMIT_S)


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Let this process and the workers that it starts write what they log to a file; a new one each time."""
    kept = os.dup(_STDERR)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
    try:
        sys.stderr.flush()
        os.dup2(file, _STDERR)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, _STDERR)
        os.close(file)
        os.close(kept)
