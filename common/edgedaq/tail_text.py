"""Rows as they come, as text: for a person, as CSV, or as JSON. Pure: from messages to lines.

============ ==========================================================================
for          what is written
============ ==========================================================================
a person     names of the columns once per stream, then values below them, the job first
csv          the same with commas, quoted as CSV; names again where another stream follows
json         one map per line: node, job, tag, time of the put, and ``row``, ``bytes`` or
             ``event``
============ ==========================================================================

Raw messages are shown as their size and first bytes in hex, events as ``key=value``. What comes from
elsewhere may be anything: characters that a terminal would obey are written as escapes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from edgedaq.clock import iso_utc
from edgedaq.messages import (
    DAQJobMessage,
    DAQJobMessageEvent,
    DAQJobMessageStorePyArrow,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
    Source,
)

__all__ = ["Form", "Line", "TailText"]

Form = Literal["text", "csv", "json"]

_HEX_BYTES = 16
_JSON_HEX_BYTES = 256
_CELL_MAX = 60
_LOOK_AHEAD = 10
_STREAMS_MAX = 1024


class Line(NamedTuple):
    """One line without its end: a row, a raw message or an event, or names of columns."""

    text: str
    is_row: bool = True


class TailText:
    """Turns messages into lines, and remembers which names it has written.

    Args:
        with_node: Say ``node/job``, not only the job.
    """

    def __init__(self, form: Form, *, with_node: bool = False) -> None:
        self._form = form
        self._with_node = with_node
        self._widths: dict[tuple[Any, ...], list[int]] = {}
        self._last: tuple[Any, ...] = ()

    def lines(self, message: DAQJobMessage) -> Iterator[Line]:
        """Yield the lines of one message."""
        source = message.source or Source("", "", 0, 0, 0)
        match message:
            case DAQJobMessageStoreTabular():
                yield from self._table(source, message.tag, tuple(message.keys), message.data or ())
            case DAQJobMessageStorePyArrow():
                columns = message.table.to_pydict()
                rows = list(zip(*columns.values(), strict=True))
                yield from self._table(source, message.tag, tuple(columns), rows)
            case DAQJobMessageStoreRaw():
                yield from self._raw(source, message.tag, message.data)
            case DAQJobMessageEvent():
                yield from self._event(source, message)

    def _who(self, source: Source, tag: str) -> str:
        job = f"{source.node}/{source.job}" if self._with_node else source.job
        return f"{job}:{tag}" if tag else job

    def _table(
        self, source: Source, tag: str, names: tuple[str, ...], rows: Sequence[Sequence[Any]]
    ) -> Iterator[Line]:
        if self._form == "json":
            for row in rows:
                yield Line(_json(source, tag, row=dict(zip(names, row, strict=True))))
            return
        who = self._who(source, tag)
        kind = (source.node, source.job, tag, names)
        if self._form == "csv":
            if kind != self._last:
                self._last = kind
                yield Line(_csv(["job", *names]), is_row=False)
            for row in rows:
                yield Line(_csv([who, *row]))
            return
        widths = self._widths.get(kind)
        if widths is None:
            if len(self._widths) >= _STREAMS_MAX:
                self._widths.clear()
            widths = self._widths[kind] = [0] * (len(names) + 1)
        if kind != self._last:
            self._last = kind
            for row in rows[:_LOOK_AHEAD]:
                _aligned([who, *row], widths)
            yield Line(_aligned([who, *names], widths), is_row=False)
        for row in rows:
            yield Line(_aligned([who, *row], widths))

    def _raw(self, source: Source, tag: str, data: Any) -> Iterator[Line]:
        who, held = self._who(source, tag), bytes(data[:_JSON_HEX_BYTES])
        if self._form == "json":
            yield Line(_json(source, tag, bytes=len(data), hex=held.hex()))
            return
        shown = held[:_HEX_BYTES].hex(" ") + (" ..." if len(data) > _HEX_BYTES else "")
        self._last = ()
        if self._form == "csv":
            yield Line(_csv([who, "raw", len(data), shown]))
        else:
            yield Line(f"{_safe(who)}  raw {len(data)} bytes  {shown}".rstrip())

    def _event(self, source: Source, message: DAQJobMessageEvent) -> Iterator[Line]:
        who = self._who(source, message.tag)
        if self._form == "json":
            yield Line(_json(source, message.tag, event=message.metadata, bytes=len(message.data)))
            return
        facts = " ".join(f"{key}={_cell(value)}" for key, value in message.metadata.items())
        size = f" ({len(message.data)} bytes)" if message.data else ""
        self._last = ()
        if self._form == "csv":
            yield Line(_csv([who, "event", facts, len(message.data)]))
        else:
            yield Line(f"{_safe(who)}  event  {facts}{size}")


def _json(source: Source, tag: str, **content: Any) -> str:
    """Return one line; bytes are hex, and what JSON does not have (nan) is null."""
    head = {"node": source.node, "job": source.job, "tag": tag, "t": iso_utc(source.t_first_ns)}
    return json.dumps(_plain({**head, **content}), ensure_ascii=True)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(held) for key, held in value.items()}
        case list() | tuple():
            return [_plain(held) for held in value]
        case bytes() | bytearray() | memoryview():
            return bytes(value[:_JSON_HEX_BYTES]).hex()
        case float():
            return value if value - value == 0 else None
        case None | bool() | int() | str():
            return value
    return str(value)


def _csv(cells: Sequence[Any]) -> str:
    held = io.StringIO()
    csv.writer(held, lineterminator="").writerow([_cell(value, limit=None) for value in cells])
    return held.getvalue()


def _aligned(cells: Sequence[Any], widths: list[int]) -> str:
    parts = []
    for index, value in enumerate(cells):
        text = _cell(value)
        widths[index] = max(widths[index], len(text))
        parts.append(text.ljust(widths[index]) if isinstance(value, str) else text.rjust(widths[index]))
    return "  ".join(parts).rstrip()


def _cell(value: Any, limit: int | None = _CELL_MAX) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes | bytearray | memoryview):
        text = bytes(value[:_JSON_HEX_BYTES]).hex()
    else:
        text = _safe(str(value))
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def _safe(text: str) -> str:
    """Return a text without what a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
