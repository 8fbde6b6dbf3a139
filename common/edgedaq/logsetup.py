"""Logs: one event per line on stderr, JSON under a service, readable in a terminal.

An event is ``noun.past_verb``; its facts are keys. ``configure`` is called once by each process; what
libraries and users' jobs write through ``logging`` and ``warnings`` comes out the same way. Each line is one
``write``, so that the lines of processes that share a stderr do not mix.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

from edgedaq.clock import iso_utc, utc_ns

__all__ = ["configure", "get_logger", "is_service"]

_STDERR = 2


def is_service() -> bool:
    """Tell whether a service manager started this process, so that nobody sits before it.

    A shell in a desktop's terminal inherits ``INVOCATION_ID`` from the service that the terminal is, hence
    the second question.
    """
    is_managed = any(os.environ.get(name) for name in ("NOTIFY_SOCKET", "INVOCATION_ID"))
    return is_managed and not os.isatty(_STDERR)


def get_logger(**facts: Any) -> Any:
    """Return a logger that adds ``facts`` to each event."""
    return structlog.get_logger(**facts)


def configure(
    verbosity: str = "INFO", *, json: bool | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Set up this process's logs.

    Args:
        verbosity: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
        json: One JSON map per line; by default under a service.
        facts: Added to each event of this process, e.g. node and job.
    """
    as_json = is_service() if json is None else json
    level = logging.getLevelNamesMapping()[verbosity]
    renderer: Any
    if as_json:
        renderer = structlog.processors.JSONRenderer(sort_keys=False, default=str)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=24,
            exception_formatter=structlog.dev.plain_traceback,  # whole paths, also where rich is installed
        )
    bound = dict(facts or {})

    def add_facts(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for key, value in bound.items():
            event.setdefault(key, value)
        return event

    processors: list[Any] = [
        structlog.processors.add_log_level,
        _add_time,
        add_facts,
        *([structlog.processors.format_exc_info] if as_json else []),
        renderer,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LineLogger(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ToStructlog)]:
        root.removeHandler(handler)
    root.addHandler(_ToStructlog())
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def _add_time(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {"timestamp": iso_utc(utc_ns()), **event}


class _LineLogger:
    """Writes each line to stderr in one call."""

    def msg(self, line: str) -> None:
        # A terminal that is gone must not end the process that tells about it.
        with contextlib.suppress(OSError):
            os.write(_STDERR, line.encode("utf-8", "backslashreplace") + b"\n")

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


class _ToStructlog(logging.Handler):
    """Hands what ``logging`` was told to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = str(record.msg)
        logger = structlog.get_logger().bind(logger=record.name)
        logger.log(max(record.levelno, logging.DEBUG), text, exc_info=record.exc_info)
