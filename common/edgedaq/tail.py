"""``tail TOPIC ...``: rows on the terminal as jobs put them, over the live plane.

It may begin before anything runs, and goes on when a job or the supervisor begins again; Ctrl-C ends it. On
stdout are rows alone; on stderr is what is worth knowing beside them: what was not shown, what was reported
as lost, and, as long as nothing comes, why that may be.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import zmq

from edgedaq.config_dir import RESERVED_IDS
from edgedaq.control import ControlError, request
from edgedaq.delivery import gap_of
from edgedaq.errors import ConfigError, nearest
from edgedaq.frame import Kind
from edgedaq.live_feed import LiveFeed, Shown
from edgedaq.live_messages import NODE_TOPIC, job_topic, live_topics_of, node_topic
from edgedaq.messages import MessageReader
from edgedaq.names import check_topic, matches
from edgedaq.tail_text import Form, TailText
from edgedaq.units import SECONDS

__all__ = ["Tail", "add_tail", "known_topics", "run_tail", "why_silent"]

_POLL_MS = 200
_QUIET_S = 2.0
_MISSED_EVERY_S = 1.0
_KNOWN_SHOWN = 12
_STREAMS_MAX = 1024


def add_tail(parser: argparse.ArgumentParser) -> None:
    """Let a command take the options of ``tail``."""
    parser.add_argument(
        "topic", nargs="*", metavar="TOPIC", help="e.g. job.hv, store or store.DAQJobStoreCSV; none: all"
    )
    parser.add_argument("--json", action="store_true", help="one JSON map per row")
    parser.add_argument("--csv", action="store_true", help="commas; what a pipe gets by default")
    parser.add_argument(
        "--every", metavar="TIME", help='of each stream only one row in such a time, e.g. "1 s"'
    )
    parser.add_argument("--count", type=int, metavar="N", help="end after N rows")


def run_tail(runtime_dir: Path, hint: str, options: argparse.Namespace) -> int:
    """Print rows until Ctrl-C; return the exit status.

    Args:
        hint: What to type to start what runs there, for when nothing runs.

    Raises:
        ConfigError: An option or a topic is not valid.
    """
    every_s = 0.0
    if options.every is not None:
        try:
            every_s = float(SECONDS.parse(options.every))
        except ConfigError as e:
            message = f"--every {e}"
            raise ConfigError(message) from e
    form: Form = "json" if options.json else "csv" if options.csv or not sys.stdout.isatty() else "text"
    topics = [check_topic(topic) for topic in options.topic] or [""]
    with contextlib.suppress(KeyboardInterrupt), Tail(runtime_dir, topics, hint, form, every_s) as tail:
        tail.run(options.count)
    return 0


class Tail:
    """One listener that prints. A context manager.

    Args:
        every_s: Of each stream one row in that time; 0 for all.
    """

    def __init__(
        self, runtime_dir: Path, topics: Sequence[str], hint: str, form: Form, every_s: float = 0.0
    ) -> None:
        self._runtime_dir = runtime_dir
        self._topics = list(topics)
        self._hint = hint
        self._text = TailText(form, with_node=any(matches(NODE_TOPIC, topic) for topic in topics))
        self._every_s = every_s
        self._reader = MessageReader(is_live=True)
        self._due_s: dict[int, float] = {}
        self._silent = set(topics)
        self._missed_rows = 0
        self._missed_told_s = 0.0
        self._told = ""
        self._feed = LiveFeed(runtime_dir, topics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.close()

    def run(self, count: int | None = None) -> None:
        """Print until ``count`` rows were, or for ever."""
        left = sys.maxsize if count is None else count
        poller = zmq.Poller()
        for socket in self._feed.pollables():
            poller.register(socket, zmq.POLLIN)
        quiet_s = time.monotonic() + _QUIET_S
        while left > 0:
            poller.poll(_POLL_MS)
            for shown in self._feed.receive():
                left -= self._print(shown, left)
            now = time.monotonic()
            if self._silent and now >= quiet_s:
                quiet_s = now + _QUIET_S
                self._tell(self._why())
            if self._missed_rows and not self._every_s and now >= self._missed_told_s + _MISSED_EVERY_S:
                self._missed_told_s = now
                self._tell(f"{self._missed_rows} rows were not shown: they come faster than they are read")
                self._missed_rows = 0

    def _print(self, shown: Shown, rows_max: int) -> int:
        """Print what has come; return how many rows that were."""
        topics = live_topics_of(shown.info)
        topics += tuple(node_topic(shown.info.node, topic) for topic in topics)
        self._silent -= {held for held in self._silent if any(matches(held, topic) for topic in topics)}
        if not shown.is_continuous:
            self._reader.forget(shown.frames[0].stream)
        self._missed_rows += shown.missed_rows
        count, texts = 0, []
        for frame in shown.frames:
            if frame.kind is Kind.GAP:
                _, rows, reason = gap_of(frame)
                self._tell(f"{shown.info.job}: {'some' if rows is None else rows} rows are lost: {reason}")
            for message in self._reader.read(shown.info, frame):
                if not self._is_due(frame.stream):
                    continue
                lines = list(self._text.lines(message))
                if self._every_s:
                    lines = [*(x for x in lines if not x.is_row), *[x for x in lines if x.is_row][-1:]]
                for line in lines:
                    if count < rows_max:
                        texts.append(f"{line.text}\n")
                        count += line.is_row
        sys.stdout.write("".join(texts))
        sys.stdout.flush()
        return count

    def _is_due(self, stream: int) -> bool:
        """Tell whether a row of a stream is to be printed now; each time it is, that is remembered."""
        if not self._every_s:
            return True
        now = time.monotonic()
        if now < self._due_s.get(stream, 0.0):
            return False
        self._due_s[stream] = now + self._every_s
        if len(self._due_s) > _STREAMS_MAX:
            del self._due_s[next(iter(self._due_s))]
        return True

    def _why(self) -> str:
        """Return why nothing may have come of the topics that nothing has come of."""
        try:
            status = request(self._runtime_dir, "status")
        except ControlError as e:
            return f"{e}; waiting for it; to start it: {self._hint}"
        return "\n".join(why_silent(topic, known_topics(status)) for topic in sorted(self._silent))

    def _tell(self, text: str) -> None:
        """Say something once beside the rows."""
        if text != self._told:
            self._told = text
            sys.stderr.write(f"{text}\n")


def known_topics(status: Mapping[str, Any]) -> list[str]:
    """Return the live topics that a supervisor's status tells of, in a control room those of nodes, too."""
    own = {topic for job in status.get("jobs", ()) for topic in job.get("topics", ())}
    jobs = status.get("statistics", {}).get("jobs", ())
    theirs = {
        node_topic(str(job["supervisor"]), job_topic(str(job["unique_id"])))
        for job in jobs
        if job.get("supervisor") != status.get("node") and job.get("unique_id") not in RESERVED_IDS
    }
    return [*sorted(own), *sorted(theirs)]


def why_silent(topic: str, known: Sequence[str]) -> str:
    """Return why nothing may have come of a topic."""
    if any(matches(topic, held) for held in known):
        return f"topic {topic or '(all)'!r}: nothing comes now"
    held = job_topic(topic)
    hint = f", did you mean {held!r}?" if held in known else nearest(topic, known)
    shown = ", ".join(known[:_KNOWN_SHOWN]) + (", ..." if len(known) > _KNOWN_SHOWN else "")
    return f"topic {topic or '(all)'!r}: was not seen yet{hint} (known: {shown or 'none'})"
