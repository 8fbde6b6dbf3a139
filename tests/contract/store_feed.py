"""A journal in memory, and the frames that stores are tested with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgedaq.delivery import StreamTable, Verdict
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, Frame, Kind, decode, encode, pack_map
from edgedaq.schema import Column, OpenInfo, Schema, encode_columns, encode_open, pack_rows, to_columns
from edgedaq.segment_format import Hole, Record

NODE = "node1"
DAY_NS = 86_400_000_000_000
T0_NS = 20_574 * DAY_NS  # 2026-05-01
PAIR = Schema((Column("sequence", "i8"), Column("value", "f8")))


class Feed:
    """Frames in journal order, each at a position of its own; a stream's frames are numbered by itself."""

    def __init__(self) -> None:
        self.records: list[Record | Hole] = []
        self.position = 0
        self._seq: dict[int, int] = {}
        self._row: dict[int, int] = {}
        self.infos: dict[int, OpenInfo] = {}

    def append(self, frame: Frame) -> Frame:
        end = self.position + len(frame.raw) + 24
        self.records.append(Record(self.position, end, frame))
        self.position = end
        return frame

    def put(self, kind: Kind, stream: int, body: bytes = b"", **fields: Any) -> Frame:
        rows = fields.get("rows", 0)
        fields.setdefault("row0", self._row[stream])
        frame = _frame(kind, stream, self._seq[stream], body, **fields)
        self._seq[stream] += 1
        self._row[stream] = fields["row0"] + rows
        return self.append(frame)

    def open(self, stream: int, store_config: dict[str, Any], **fields: Any) -> OpenInfo:
        fields = {"node": NODE, "job": "job1", "form": "table", "schema": PAIR, **fields}
        info = OpenInfo(
            job_type="DAQJobTest",
            life=f"{stream:016x}",
            boot="boot",
            topics=("store.Any",),
            store_config=store_config,
            t_open_ns=fields.pop("t_open_ns", T0_NS),
            **fields,
        )
        self.infos[stream] = info
        self._seq[stream], self._row[stream] = 1, 0
        self.append(decode(memoryview(encode_open(stream, info))))
        return info

    def rows(self, stream: int, rows: Sequence[Sequence[Any]], t_ns: int = T0_NS, **fields: Any) -> Frame:
        """Append rows as PACKED where the schema has that form, else as COLUMNS."""
        schema = self.infos[stream].schema
        assert schema is not None
        if fields.pop("general", False) or not schema.is_packed:
            kind, body = Kind.COLUMNS, encode_columns(schema, to_columns(schema, rows))
        else:
            kind, body = Kind.PACKED, pack_rows(schema, rows)
        return self.put(kind, stream, body, rows=len(rows), t_first_ns=t_ns, **fields)

    def pairs(self, stream: int, first: int, count: int, t_ns: int = T0_NS) -> list[tuple[int, float]]:
        rows = [(value, value / 4) for value in range(first, first + count)]
        self.rows(stream, rows, t_ns)
        return rows

    def messages(self, stream: int, messages: Sequence[bytes], t_ns: int = T0_NS) -> Frame:
        end, ends = 0, b""
        for message in messages:
            end += len(message)
            ends += end.to_bytes(4, "little")
        body = ends + b"".join(messages)
        return self.put(Kind.RAW, stream, body, rows=len(messages), t_first_ns=t_ns)

    def pieces(
        self, stream: int, pieces: Sequence[bytes], *, has_first: bool = True, has_last: bool = True
    ) -> None:
        for index, piece in enumerate(pieces):
            is_last = has_last and index == len(pieces) - 1
            is_first = has_first and index == 0
            flags = FLAG_PIECE | (FLAG_FIRST if is_first else 0) | (0 if is_last else FLAG_CONTINUES)
            self.put(Kind.RAW, stream, piece, rows=int(is_last), flags=flags, t_first_ns=T0_NS)

    def gap(self, stream: int, frames: int, rows: int | None, reason: str) -> None:
        first = self._seq[stream]
        row0 = self._row[stream]
        body = pack_map({"last": first + frames - 1, "rows": rows, "reason": reason})
        self.put(Kind.GAP, stream, body, row0=row0)
        self._seq[stream] = first + frames
        self._row[stream] = row0 + (rows or 0)

    def skip(self, stream: int, frames: int, rows: int) -> None:
        """Let frames be missing without a word."""
        self._seq[stream] += frames
        self._row[stream] += rows

    def close(self, stream: int, *, tail_unknown: bool = False) -> None:
        rows = self._row[stream]
        body = pack_map({"rows": rows, "tail_unknown": tail_unknown, "bound_s": 0.2 if tail_unknown else 0.0})
        self.put(Kind.CLOSE, stream, body)

    def since(self, position: int) -> list[Record | Hole]:
        return [r for r in self.records if (r.position if isinstance(r, Record) else r.first) >= position]

    def table_at(self, position: int) -> StreamTable:
        table = StreamTable()
        for record in self.records:
            if (
                isinstance(record, Record)
                and record.end <= position
                and table.judge(record.frame) is Verdict.ACCEPT
            ):
                table.apply(record.frame)
        return table


class FeedFollower:
    """Follows a ``Feed`` as a store follows the journal."""

    def __init__(self, feed: Feed, position: int | None, wants: Callable[[int], bool]) -> None:
        self._feed = feed
        self._wants = wants
        self._start = position or 0
        self.position: int | None = self._start
        self.reported: list[int] = []

    @property
    def tail(self) -> int:
        return self._feed.position

    def table_at_start(self) -> StreamTable:
        return self._feed.table_at(self._start)

    def read(self, timeout_ms: int) -> list[Record | Hole]:  # noqa: ARG002 -- never waits
        found = self._feed.since(self.position or 0)[:100]
        if found:
            last = found[-1]
            self.position = last.end if isinstance(last, Record) else last.last
        return [entry for entry in found if isinstance(entry, Hole) or self._is_wanted(entry.frame)]

    def _is_wanted(self, frame: Frame) -> bool:
        return frame.kind is Kind.OPEN or self._wants(frame.stream)

    def report(self, position: int) -> None:
        self.reported.append(position)

    def close(self) -> None:
        pass


def _frame(kind: Kind, stream: int, seq: int, body: bytes, **fields: Any) -> Frame:
    return decode(memoryview(encode(kind, stream, seq, body, **fields)))


def flat(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return [item for part in parts for item in part]
