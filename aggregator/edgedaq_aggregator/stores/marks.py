"""Marks: what is stored about data rather than data.

They go to ``<out_dir>/<node>/_marks.csv`` (those of the CSV store) or ``_marks.<key>.csv`` (those of another:
one file has one writer), in the same commit as the data that they stand between::

    time        ISO 8601 UTC of the data before it, empty when there is none
    node, job, life, stream, tag
    kind        gap         dropped or lost before it came here; the reason says where
                refused     could not be stored for what it is; set aside in the state directory
                close       the stream has ended, and perhaps not all of it came
                start, stop run boundaries
                redirected  the stream's own file could not be had; the reason says where its rows are
    first_seq, last_seq    the frames it speaks of
    rows        how many rows are missing; empty: nobody knows
    reason      text
"""

from __future__ import annotations

from typing import NamedTuple

from edgedaq.clock import iso_utc
from edgedaq.open_info import OpenInfo
from edgedaq.store_config import MARKS_FILE

__all__ = ["MARKS_COLUMNS", "MARKS_HEADER", "Mark", "mark_line", "mark_values", "marks_file"]

MARKS_COLUMNS = (
    "time",
    "node",
    "job",
    "life",
    "stream",
    "tag",
    "kind",
    "first_seq",
    "last_seq",
    "rows",
    "reason",
)
MARKS_HEADER = (",".join(MARKS_COLUMNS) + "\n").encode()


class Mark(NamedTuple):
    """One mark; ``rows`` is None when nobody knows."""

    info: OpenInfo
    stream: int
    kind: str
    t_utc_ns: int
    first_seq: int
    last_seq: int
    rows: int | None = None
    reason: str = ""


def marks_file(key: str) -> str:
    """Return the name of the file that a store's marks go to."""
    return MARKS_FILE if key == "csv" else MARKS_FILE.replace(".csv", f".{key}.csv")


def mark_values(mark: Mark) -> tuple[str | int | None, ...]:
    """Return a mark as the values of ``MARKS_COLUMNS``."""
    info = mark.info
    return (
        iso_utc(mark.t_utc_ns),
        info.node,
        info.job,
        info.life,
        f"{mark.stream:016x}",
        info.tag,
        mark.kind,
        mark.first_seq,
        mark.last_seq,
        mark.rows,
        mark.reason.encode("utf-8", "backslashreplace").decode(),
    )


def mark_line(mark: Mark) -> bytes:
    """Return a mark as a line of CSV."""
    texts = ("" if value is None else str(value) for value in mark_values(mark))
    return (",".join(map(_field, texts)) + "\n").encode("utf-8", "backslashreplace")


def _field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(char in text for char in ',"\r\n') else text
