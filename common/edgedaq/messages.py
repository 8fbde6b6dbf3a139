"""What jobs put, and what they are handed: data with where it is to go.

A message is handed to ``DAQJob._put_message_out``, or comes to ``DAQJob.handle_message`` with ``source`` set.
Its topics are those it names and one for each store that its ``store_config`` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from edgedaq.batch import BatchDecoder, event_of, raw_messages
from edgedaq.errors import ConfigError
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, Frame, Kind
from edgedaq.schema import OpenInfo, Schema, decode_columns, unpack_rows
from edgedaq.store_config import DAQJobStoreConfig

__all__ = [
    "DAQJobMessage",
    "DAQJobMessageEvent",
    "DAQJobMessageGap",
    "DAQJobMessageStorePyArrow",
    "DAQJobMessageStoreRaw",
    "DAQJobMessageStoreTabular",
    "MessageReader",
    "Source",
]


class Source(msgspec.Struct, frozen=True):
    """Where a message came from: the stream, and when its first row was put (UTC ns)."""

    node: str
    job: str
    stream: int
    seq: int
    t_first_ns: int


class DAQJobMessage(msgspec.Struct, kw_only=True):
    """What all messages have.

    ``tag`` tells streams of one job apart that are otherwise alike; ``is_live`` that it came as a live topic,
    where others before it may have been left out.
    """

    store_config: DAQJobStoreConfig | None = None
    tag: str = ""
    topics: Sequence[str] = ()
    source: Source | None = None
    is_live: bool = False


class DAQJobMessageStoreTabular(DAQJobMessage, kw_only=True):
    """A table: names of columns, and either rows in ``data`` or columns in ``data_columns``."""

    keys: Sequence[str]
    data: Sequence[Sequence[Any]] | None = None
    data_columns: dict[str, Sequence[Any]] | None = None
    schema: Schema | None = None


class DAQJobMessageStorePyArrow(DAQJobMessage, kw_only=True):
    """A ``pyarrow.Table`` or ``pyarrow.RecordBatch``."""

    table: Any


class DAQJobMessageStoreRaw(DAQJobMessage, kw_only=True):
    """Bytes of any size."""

    data: Any


class DAQJobMessageEvent(DAQJobMessage, kw_only=True):
    """Facts, and a payload."""

    metadata: dict[str, Any]
    data: Any = b""


class DAQJobMessageGap(DAQJobMessage, kw_only=True):
    """Messages that a consumer does not get, from ``source.seq`` to ``last``; see ``DAQJob.handle_gap``.

    ``rows`` counts rows of tables and messages of the rest; it is None when nobody knows.
    """

    last: int
    rows: int | None
    reason: str


class MessageReader:
    """Turns frames of any number of streams back into messages, in order.

    A RAW message in pieces is given when its last piece has come; one that is not completed is left out.

    Args:
        views: Give the data of large frames as views of them.
    """

    def __init__(self, *, is_live: bool = False, views: bool = False) -> None:
        self._is_live = is_live
        self._pieces: dict[int, list[bytes]] = {}
        self._views = views

    def forget(self, stream: int) -> None:
        """Leave out the message of a stream that is not complete: something of it does not come."""
        self._pieces.pop(stream, None)

    def read(self, info: OpenInfo, frame: Frame, *, in_place: bool = False) -> Iterator[DAQJobMessage]:
        """Yield the messages of one frame; they do not refer to its memory, unless it is ``in_place``.

        Args:
            in_place: The memory stays as it is while anyone refers to it.

        Raises:
            WireError: The body is not valid.
        """
        pieces = self._pieces.pop(frame.stream, None)
        store_config = _store_config(info)
        source = Source(info.node, info.job, frame.stream, frame.seq, frame.t_first_ns)
        common: dict[str, Any] = {
            "store_config": store_config,
            "tag": info.tag,
            "topics": info.topics,
            "source": source,
            "is_live": self._is_live,
        }
        if frame.kind is Kind.RAW:
            for data in self._raw(frame, pieces, as_views=in_place and self._views):
                yield DAQJobMessageStoreRaw(data=data, **common)
        elif frame.kind is Kind.PACKED and info.schema is not None:
            rows = unpack_rows(info.schema, frame.body)
            yield DAQJobMessageStoreTabular(keys=info.schema.names, data=rows, schema=info.schema, **common)
        elif frame.kind is Kind.COLUMNS and info.schema is not None:
            columns, dtypes = decode_columns(info.schema, frame.body)
            schema = info.schema.with_dtypes(dtypes)
            rows = list(zip(*columns, strict=True))
            yield DAQJobMessageStoreTabular(keys=schema.names, data=rows, schema=schema, **common)
        elif frame.kind is Kind.ARROW:
            batch = BatchDecoder(info, in_place=in_place).batches([frame])[0]
            yield DAQJobMessageStorePyArrow(table=batch, **common)
        elif frame.kind is Kind.EVENT:
            metadata, payload = event_of(frame)
            data = payload if in_place and self._views else bytes(payload)
            yield DAQJobMessageEvent(metadata=metadata, data=data, **common)

    def _raw(
        self, frame: Frame, pieces: list[bytes] | None, *, as_views: bool
    ) -> Iterator[bytes | memoryview]:
        if frame.flags & FLAG_PIECE:
            if frame.flags & FLAG_FIRST:
                pieces = []
            elif pieces is None:
                return  # its begin was lost
            held = [*pieces, bytes(frame.body)]
            if frame.flags & FLAG_CONTINUES:
                self._pieces[frame.stream] = held
            else:
                yield b"".join(held)
            return
        for view in raw_messages(frame):
            yield view if as_views else bytes(view)


def _store_config(info: OpenInfo) -> DAQJobStoreConfig | None:
    """Return where the producer wants it stored; None also for options that this version does not know."""
    try:
        return DAQJobStoreConfig.from_map(info.store_config) if info.store_config else None
    except ConfigError:
        return None
