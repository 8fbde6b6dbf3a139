"""The listener's side of the live plane: frames of the topics asked for, as far as it keeps up.

::

    with LiveFeed(runtime_dir, ["job.hv"]) as feed:
        poll(feed.pollables())
        for shown in feed.receive():        # never blocks
            print(shown.info.job, shown.missed_rows, shown.frames)

It may be made before the broker, and outlives it: when a supervisor begins again it goes on. What comes twice
(for two topics) is given once; what was left out between two frames of a stream is told with the later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import zmq

from edgedaq.errors import WireError
from edgedaq.frame import Frame, Kind
from edgedaq.live_messages import (
    LIVE_BYTES_MAX,
    LIVE_QUEUE,
    LivePart,
    decode_live,
    looking_address,
    subscription,
)
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo

__all__ = ["LiveFeed", "Shown"]

_RECEIVE_MAX = 16
_STREAMS_MAX = 1024


class Shown(NamedTuple):
    """Frames of one stream, in order, without its OPEN.

    ``missed_rows`` of the stream were left out just before them: the live plane had no room for them, or they
    were put before this listener came back. 0 for the first that is seen of a stream.
    """

    info: OpenInfo
    frames: list[Frame]
    missed_rows: int
    is_continuous: bool


class LiveFeed:
    """One listener. A context manager; used by one thread.

    Args:
        topics: Whole dotted segments; ``""`` is everything.
        apart_from_life: A life whose own data is left out.
        context: For the socket; one of its own by default.
    """

    def __init__(
        self,
        runtime_dir: Path,
        topics: Iterable[str],
        *,
        apart_from_life: str = "",
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self.refused_count = 0
        self._apart_from = apart_from_life
        self._owns_context = context is None
        self._context: zmq.Context[Any] = zmq.Context() if context is None else context
        self._known: dict[bytes, OpenInfo] = {}
        self._next: dict[int, tuple[int, int | None]] = {}
        self._log = get_logger()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.rcvhwm = LIVE_QUEUE
        self._socket.maxmsgsize = LIVE_BYTES_MAX
        self._socket.reconnect_ivl = 50
        self._socket.reconnect_ivl_max = 500
        for topic in topics:
            self._socket.subscribe(subscription(topic))
        self._socket.connect(looking_address(runtime_dir))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def pollables(self) -> list[Any]:
        """Return what to poll for reading."""
        return [self._socket]

    def receive(self) -> list[Shown]:
        """Return some of what has arrived; nothing when nothing has. Never blocks."""
        found: list[Shown] = []
        for _ in range(_RECEIVE_MAX):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                found += self._take(decode_live(parts, self._known))
            except WireError as e:
                self.refused_count += 1
                self._log.debug("live.refused", reason=str(e))
            while len(self._known) > _STREAMS_MAX:
                del self._known[next(iter(self._known))]
        return found

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        if self._owns_context:
            self._context.term()

    def _take(self, part: LivePart) -> list[Shown]:
        if part.info.life == self._apart_from:
            return []
        new: list[Frame] = []
        missed_rows, is_continuous = 0, True
        for frame in part.frames:
            seq, row = self._next.pop(frame.stream, (0, None))
            if frame.seq < seq:
                self._next[frame.stream] = seq, row  # it came for another topic
                continue
            if not new:
                missed_rows = max(frame.row0 - row, 0) if row is not None else 0
                is_continuous = frame.seq == seq
            self._next[frame.stream] = frame.seq + 1, frame.row0 + frame.rows
            if frame.kind is not Kind.OPEN:
                new.append(frame)
        while len(self._next) > _STREAMS_MAX:
            del self._next[next(iter(self._next))]
        return [Shown(part.info, new, missed_rows, is_continuous)] if new else []
