"""Logs: an event and its facts, for a person in a terminal, as JSON, or as fields of systemd's journal.

::

    get_logger(job="hv").warning("job.changed", state_to="BACKOFF")

    2026-11-20T12:00:00.000Z [warning] job.changed             node=n1 job=hv state_to=BACKOFF
    {"timestamp": "2026-…", "level": "warning", "event": "job.changed", "node": "n1", "job": "hv", …}

An event is ``noun.past_verb``; its facts are keys. ``configure`` is called once by each process; what
libraries and users' jobs write through ``logging`` and ``warnings`` comes out the same way. Each line is one
``write``, so that the lines of processes that share a stderr do not mix. It is written here and not taken
from a library because of what that costs each process ([0031] in ``docs/decisions``).
"""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgedaq.clock import iso_utc, utc_ns
from edgedaq.journald import Journald, find_journald

__all__ = ["Logger", "configure", "get_logger", "is_service"]

_STDERR = 2
_EVENT_WIDTH = 24
_COLORS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_PLAIN = "\x1b[0m"


@dataclass(frozen=True)
class _Output:
    """Where this process's events go."""

    level: int = logging.INFO
    as_json: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    journald: Journald | None = None


_output = [_Output()]
"""The one that ``configure`` has set; loggers look here each time."""


class Logger:
    """Writes events with the facts that it was given, and those of the process. Thread-safe."""

    __slots__ = ("_facts",)

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def bind(self, **facts: Any) -> Logger:
        """Return a logger that adds more facts."""
        return Logger({**self._facts, **facts})

    def debug(self, event: str, **facts: Any) -> None:
        """Write what is for us."""
        self.log(logging.DEBUG, event, **facts)

    def info(self, event: str, **facts: Any) -> None:
        """Write that a state changed."""
        self.log(logging.INFO, event, **facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Write that something is degraded and heals itself."""
        self.log(logging.WARNING, event, **facts)

    def error(self, event: str, **facts: Any) -> None:
        """Write that data is lost or a human is needed."""
        self.log(logging.ERROR, event, **facts)

    def exception(self, event: str, **facts: Any) -> None:
        """Write an error with the traceback of what is being handled."""
        self.log(logging.ERROR, event, **{"exc_info": True, **facts})

    def log(self, level: int, event: str, **facts: Any) -> None:
        """Write an event of a level of ``logging``; ``exc_info`` as there."""
        output = _output[0]
        if level < output.level:
            return
        told = {**output.facts, **self._facts, **facts}
        text = _traceback(told.pop("exc_info", None))
        _write(output, logging.getLevelName(level).lower(), str(event), told, text)


def is_service() -> bool:
    """Tell whether a service manager started this process, so that nobody sits before it.

    A shell in a desktop's terminal inherits ``INVOCATION_ID`` from the service that the terminal is, hence
    the second question.
    """
    is_managed = any(os.environ.get(name) for name in ("NOTIFY_SOCKET", "INVOCATION_ID"))
    return is_managed and not os.isatty(_STDERR)


def get_logger(**facts: Any) -> Logger:
    """Return a logger that adds ``facts`` to each event."""
    return Logger(facts)


def configure(
    verbosity: str = "INFO", *, json: bool | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Set up this process's logs.

    Args:
        verbosity: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
        json: One JSON map per line; by default under a service whose stderr is not the journal.
        facts: Added to each event of this process, e.g. node and job.
    """
    level = logging.getLevelNamesMapping()[verbosity]
    journald = find_journald(_STDERR, identifier="edgedaq") if json is None else None
    if _output[0].journald is not None:
        _output[0].journald.close()
    _output[0] = _Output(level, is_service() if json is None else json, dict(facts or {}), journald)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _FromLogging)]:
        root.removeHandler(handler)
    root.addHandler(_FromLogging())
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def _write(output: _Output, level: str, event: str, facts: Mapping[str, Any], text: str) -> None:
    if output.journald is not None:
        pairs = " ".join(f"{key}={_value(value)}" for key, value in facts.items() if key != "node")
        message = f"{event} {pairs}".rstrip() + (f"\n{text}" if text else "")
        if output.journald.send(level, message, {"event": event, **facts}):
            return
    time = iso_utc(utc_ns())
    if output.as_json:
        told = {"timestamp": time, "level": level, "event": event, **facts}
        line = json_format.dumps({**told, **({"exception": text} if text else {})}, default=str)
    else:
        pairs = " ".join(f"{key}={_value(value)}" for key, value in facts.items())
        is_colored = level in _COLORS and os.isatty(_STDERR)
        shown = f"{_COLORS[level]}{level}{_PLAIN}" if is_colored else level
        line = f"{time} [{shown}]{' ' * (8 - len(level))}{event.ljust(_EVENT_WIDTH)} {pairs}".rstrip()
        line += f"\n{text}" if text else ""
    # A terminal that is gone must not end the process that tells about it.
    with contextlib.suppress(OSError):
        os.write(_STDERR, line.encode("utf-8", "backslashreplace") + b"\n")


def _value(value: Any) -> str:
    """Return a value as it stands after its key: quoted where it would not be read as one."""
    text = str(value)
    return repr(text) if not text or any(mark in text for mark in " \n\t\"'=") else text


def _traceback(given: Any) -> str:
    """Return the traceback of what ``exc_info`` means, without the last newline."""
    if not given:
        return ""
    if isinstance(given, BaseException):
        found: Any = (type(given), given, given.__traceback__)
    else:
        found = given if isinstance(given, tuple) else sys.exc_info()
    return "" if found[0] is None else "".join(traceback.format_exception(*found)).rstrip("\n")


class _FromLogging(logging.Handler):
    """Writes what ``logging`` was told as an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = str(record.msg)
        get_logger(logger=record.name).log(max(record.levelno, logging.DEBUG), text, exc_info=record.exc_info)
