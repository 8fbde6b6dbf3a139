"""What ``status`` and the live views show: plain text, in at most ``WIDTH`` columns.

``format_status`` is a pure function of the map that a supervisor answers to ``status``; what is not in the
map is left out, and what is not known is shown as ``-``. ``LiveTable`` redraws such text in place in a
terminal; where nobody looks (a pipe, a log) it writes one line per second instead.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from edgedaq.units import format_bytes, format_seconds

__all__ = ["WIDTH", "LiveTable", "format_status", "summary_line", "table"]

WIDTH = 100
_UNKNOWN = "-"
_MIB = 1 << 20
_HOME = "\x1b[H"
_CLEAR_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"
_CLEAR_ALL = "\x1b[2J"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, width: int = WIDTH) -> str:
    """Return rows as aligned text: texts to the left, numbers to the right.

    When it would be wider than ``width``, texts are cut at the end, the longest column first.
    """
    cells = [[_text(value) for value in row] for row in rows]
    held = [list(row) for row in cells]
    is_number = [bool(held) and all(_is_number(row[index]) for row in held) for index in range(len(columns))]
    widths = [max(len(row[index]) for row in [list(columns), *held]) for index in range(len(columns))]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max(
            (index for index in range(len(widths)) if not is_number[index]),
            key=lambda index: widths[index],
            default=None,
        )
        if longest is None or widths[longest] <= 4:
            break
        widths[longest] -= 1
    lines = [_line(columns, widths, is_number), *(_line(row, widths, is_number) for row in held)]
    return "\n".join(line.rstrip()[:width] for line in lines)


def format_status(status: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """Return all that a ``status`` answer says, as tables."""
    header = _header(status)
    parts = [_text(header)[:width]] if header else []
    jobs = [job for job in status.get("jobs", ()) if isinstance(job, dict)]
    statistics = status.get("statistics")
    rows = statistics if isinstance(statistics, dict) else {}
    if jobs:
        parts.append(table(_JOB_COLUMNS, [_job_cells(job) for job in jobs], width=width))
        reasons = [_text(f"{job.get('unique_id')}: {job['reason']}") for job in jobs if job.get("reason")]
        parts += ["\n".join(line[:width] for line in reasons)] if reasons else []
    queues = {row.get("unique_id"): row.get("message_in_queue_size") for row in rows.get("jobs", ())}
    for name, columns, cells in (
        ("uplink", _UPLINK_COLUMNS, _uplink_cells),
        ("store", _STORE_COLUMNS, lambda job: _store_cells(job, queues.get(job.get("unique_id")))),
    ):
        found = [cells(job) for job in jobs if job.get("group") == name]
        if found:
            problems = [line for job in jobs if job.get("group") == name for line in _problems(job)]
            parts.append("\n".join([table(columns, found, width=width), *(p[:width] for p in problems)]))
    told = [line for job in jobs for line in _told(job)]
    parts += ["\n".join(line[:width] for line in told)] if told else []
    for job in jobs:
        line = _journal_line(job)
        parts += ["\n".join([line[:width], *(p[:width] for p in _problems(job))])] if line else []
    if rows.get("nodes"):
        parts.append(table(tuple(_NODE_CELLS), [_node_cells(row) for row in rows["nodes"]], width=width))
    if isinstance(status.get("ledger"), str) and status["ledger"]:
        parts.append(status["ledger"])
    return "\n\n".join(part for part in parts if part)


def summary_line(status: Mapping[str, Any]) -> str:
    """Return one line about a ``status`` answer, for where there is no terminal."""
    jobs = [job for job in status.get("jobs", ()) if isinstance(job, dict)]
    running = sum(job.get("state") in ("RUNNING", "BLOCKED") for job in jobs)
    text = f"{status.get('node', '?')}: {running} of {len(jobs)} jobs run"
    put = sum(_rate(job, "out_count_per_s") for job in jobs if job.get("group") == "device")
    if any(job.get("group") == "device" for job in jobs):
        text += f", {_text(put)} rows/s put"
    statistics = status.get("statistics")
    nodes = statistics.get("nodes", ()) if isinstance(statistics, dict) else ()
    whole = nodes[-1] if nodes else None
    if whole:
        text += f", {_text(whole.get('message_in_count'))} arrived, {_text(whole.get('stored_count'))} stored"
    return text


class _Stream(Protocol):
    """What a live table is written to."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


class LiveTable:
    """Shows text that changes: redrawn in place in a terminal, a line per second elsewhere.

    Args:
        stream: Where it is written.
        is_terminal: Whether it is one; asked of the stream if not given.
    """

    def __init__(self, stream: _Stream, *, is_terminal: bool | None = None) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        self._is_first = True
        self._line_due_s = 0.0

    def show(self, text: str, line: str) -> None:
        """Show ``text`` in a terminal, cut to fit it; elsewhere ``line``, if the last is a second old."""
        if not self._is_terminal:
            if time.monotonic() >= self._line_due_s:
                self._line_due_s = time.monotonic() + 0.95
                self._stream.write(line + "\n")
                self._stream.flush()
            return
        size = shutil.get_terminal_size((WIDTH, 40))
        lines = [part[: size.columns - 1] for part in text.split("\n")][: size.lines - 1]
        begin = (_CLEAR_ALL if self._is_first else "") + _HOME
        self._is_first = False
        self._stream.write(begin + "".join(part + _CLEAR_LINE + "\n" for part in lines) + _CLEAR_BELOW)
        self._stream.flush()


_JOB_COLUMNS = (
    "job",
    "state",
    "pid",
    "restarts",
    "in/s",
    "out/s",
    "in",
    "out",
    "MiB out",
    "blocked",
    "cpu %",
)
_UPLINK_COLUMNS = ("uplink", "link", "up for", "in flight", "spool", "oldest waiting")
_STORE_COLUMNS = ("store", "state", "stored", "waiting", "rows", "lag", "through in", "files")
_NODE_CELLS = {
    "node": "supervisor",
    "alive": "is_alive",
    "arrived": "message_in_count",
    "MiB/s": "message_in_mb_per_s",
    "stored": "stored_count",
    "waiting": "waiting_count",
    "dropped": "dropped_count",
    "p50 ms": "latency_p50_ms",
    "p99 ms": "latency_p99_ms",
    "spool MiB": "spool_megabytes",
    "clock ms": "clock_offset_ms",
}


def _header(status: Mapping[str, Any]) -> str:
    uptime_s = status.get("uptime_s")
    up = f"  up {format_seconds(uptime_s)}" if isinstance(uptime_s, int | float) else ""
    stopping = "  stopping" if status.get("is_stopping") else ""
    words = [str(status[key]) for key in ("role", "node", "version") if status.get(key)]
    pid = f"  pid {status['pid']}" if status.get("pid") else ""
    return " ".join(words) + pid + up + stopping


def _job_cells(job: Mapping[str, Any]) -> list[Any]:
    total = job.get("total") or {}
    rates = job.get("rates") or {}
    out_bytes = total.get("out_bytes")
    blocked_s = total.get("put_blocked_s")
    return [
        job.get("unique_id"),
        job.get("state"),
        job.get("pid"),
        job.get("restart_count"),
        rates.get("in_count_per_s"),
        rates.get("out_count_per_s"),
        total.get("in_count"),
        total.get("out_count"),
        None if out_bytes is None else out_bytes / _MIB,
        None if blocked_s is None else format_seconds(blocked_s),
        total.get("cpu_percent"),
    ]


def _uplink_cells(job: Mapping[str, Any]) -> list[Any]:
    extra = _extra(job)
    oldest_s, age_s = extra.get("oldest_unacknowledged_s"), extra.get("session_age_s")
    return [
        job.get("unique_id"),
        extra.get("link"),
        None if age_s is None else format_seconds(age_s),
        _bytes(extra.get("in_flight_bytes")),
        _bytes(extra.get("spool_bytes")),
        None if oldest_s is None else format_seconds(oldest_s),
    ]


def _store_cells(job: Mapping[str, Any], waiting_rows: Any) -> list[Any]:
    extra = _extra(job)
    lag_s, through_in_s = extra.get("lag_s"), extra.get("through_in_s")
    return [
        job.get("unique_id"),
        extra.get("state"),
        extra.get("stored_rows"),
        _bytes(extra.get("lag_bytes")),
        waiting_rows,
        None if lag_s is None else format_seconds(lag_s),
        None if through_in_s is None else format_seconds(through_in_s),
        extra.get("files"),
    ]


def _journal_line(job: Mapping[str, Any]) -> str:
    """Return how full the journal of an intake is, and when it will be; empty for other jobs."""
    journal = _extra(job).get("journal")
    if not isinstance(journal, dict) or not isinstance(journal.get("limit_bytes"), int):
        return ""
    full_in_s = journal.get("full_in_s")
    when = "" if full_in_s is None else f", full in {format_seconds(full_in_s)} at this rate"
    missed = journal.get("left_behind") or {}
    lost = "".join(f"; {store} was left behind, {_bytes(count)} missed" for store, count in missed.items())
    return _text(
        f"journal: {_bytes(journal.get('disk_bytes'))} of {_bytes(journal['limit_bytes'])}{when}{lost}"
    )


def _problems(job: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an uplink or a store by its own account, in words, one line each."""
    extra = _extra(job)
    told = [extra.get(key) for key in ("error", "reason", "spool_problem", "store_problem")]
    return [_text(f"{job.get('unique_id')}: {text}") for text in told if text]


def _told(job: Mapping[str, Any]) -> list[str]:
    """Return what an intake tells about who was not let in."""
    security = _extra(job).get("security")
    lines = security.get("told") if isinstance(security, dict) else None
    return [_text(f"{job.get('unique_id')}: {line}") for line in lines] if isinstance(lines, list) else []


def _node_cells(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(key) for key in _NODE_CELLS.values()]


def _extra(job: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = (job.get("total") or {}).get("extra")
    return extra if isinstance(extra, dict) else {}


def _bytes(count: Any) -> str | None:
    return format_bytes(count) if isinstance(count, int) else None


def _rate(job: Mapping[str, Any], name: str) -> float:
    value = (job.get("rates") or {}).get(name)
    return value if isinstance(value, int | float) else 0.0


def _text(value: Any) -> str:
    if value is None or value == "":
        return _UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        size = abs(value)
        return (
            f"{value:.0f}" if size >= 100 or value == 0 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
        )
    return "".join(char if char.isprintable() else "?" for char in str(value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == _UNKNOWN
    return True


def _line(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if right else _cut(cell, width).ljust(width)
        for cell, width, right in zip(cells, widths, is_number, strict=True)
    )
    return "  ".join(padded)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
