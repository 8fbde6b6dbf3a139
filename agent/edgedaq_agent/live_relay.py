"""What the control room looks at of this node's live topics, sent along the session.

The intake says by SUBSCRIBE which topics somebody there wants now, and nothing is taken from this node's
broker otherwise. At most ``BYTES_PER_S`` are sent, whole messages, and none while the session takes no more:
the link is the data's. What is left out is told to who looks by the numbers of the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import zmq
from edgedaq.clock import mono_ns
from edgedaq.live_messages import LIVE_BYTES_MAX, LIVE_QUEUE, looking_address, subscription
from edgedaq.session_messages import Live

__all__ = ["LiveRelay"]

BYTES_PER_S = 256 << 10
BURST_BYTES = 1 << 20
_MESSAGES_PER_STEP = 8


class _Session(Protocol):
    live_topics: Sequence[str]

    def send(self, message: Live) -> bool:
        """Send it if there is room now."""


class LiveRelay:
    """A listener of this node's broker while somebody in the control room listens. A context manager."""

    def __init__(self, runtime_dir: Path, context: zmq.Context[Any]) -> None:
        self._address = looking_address(runtime_dir)
        self._context = context
        self._topics: tuple[str, ...] = ()
        self._socket: zmq.Socket[bytes] | None = None
        self._budget = BURST_BYTES
        self._budget_ns = mono_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._look_at(())

    def pollables(self) -> list[Any]:
        """Return the socket to poll for reading, while there is something to look at."""
        return [] if self._socket is None else [self._socket]

    def serve(self, session: _Session, now_ns: int) -> None:
        """Look at what the session wants, and send what has come. Never blocks."""
        if tuple(session.live_topics) != self._topics:
            self._look_at(tuple(session.live_topics))
        for _ in range(_MESSAGES_PER_STEP):
            if self._socket is None:
                return
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._budget += BYTES_PER_S * (now_ns - self._budget_ns) // 1_000_000_000
            self._budget, self._budget_ns = min(self._budget, BURST_BYTES), now_ns
            if len(parts) != 3 or self._budget <= 0:
                continue
            topic, opened, frames = parts
            if session.send(Live(topic=topic.decode("ascii", "replace")[:-1], opened=opened, frames=frames)):
                self._budget -= len(opened) + len(frames)

    def _look_at(self, topics: tuple[str, ...]) -> None:
        self._topics = topics
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if not topics:
            return
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.rcvhwm = LIVE_QUEUE
        self._socket.maxmsgsize = LIVE_BYTES_MAX
        self._socket.reconnect_ivl_max = 500
        for topic in topics:
            self._socket.subscribe(subscription(topic))
        self._socket.connect(self._address)
