"""The listening socket of the intake: messages in, messages out, without ever waiting for a peer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import zmq
from edgedaq.errors import StoreError
from edgedaq.session_messages import Bye, encode_message
from edgedaq.transport import set_router_options

__all__ = ["Received", "Router"]

_STRANGERS_MAX = 256


class Received(NamedTuple):
    """One message: a control message where ``part`` is None, DATA otherwise.

    ``part`` is memory of its own, kept as long as something refers to it. ``is_sound`` is False when the
    message had more parts than any has.
    """

    peer: bytes
    head: bytes
    part: memoryview | None
    is_sound: bool


class Router:
    """A bound ROUTER. Must be closed.

    Raises:
        StoreError: The address cannot be listened on, e.g. because another process does.
    """

    def __init__(self, address: str, context: zmq.Context[Any]) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._strangers: deque[bytes] = deque(maxlen=_STRANGERS_MAX)
        set_router_options(self.socket, address)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as e:
            self.socket.close(0)
            text = "another process listens there" if e.errno == zmq.EADDRINUSE else str(e)
            message = f"{address} cannot be listened on: {text}"
            raise StoreError(message) from e

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; safe to call again."""
        self.socket.close(linger_ms)

    def receive(self, count: int) -> Iterator[Received]:
        """Yield up to ``count`` messages that have arrived."""
        socket = self.socket
        for _ in range(count):
            try:
                peer = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            head = socket.recv() if socket.getsockopt(zmq.RCVMORE) else b""
            if not socket.getsockopt(zmq.RCVMORE):
                yield Received(peer, head, None, is_sound=True)
                continue
            part = socket.recv(copy=False)
            is_sound = not part.more
            while socket.getsockopt(zmq.RCVMORE):
                socket.recv()
            yield Received(peer, head, part.buffer, is_sound)

    def send(self, peer: bytes, raw: bytes) -> bool:
        """Send; False when the peer takes nothing now.

        Raises:
            ConnectionError: The peer is gone.
        """
        try:
            self.socket.send_multipart([peer, raw], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            message = "the connection was cut"
            raise ConnectionError(message) from e
        return True

    def send_once(self, peer: bytes, raw: bytes) -> None:
        """Send to one who need not get it."""
        try:
            self.send(peer, raw)
        except ConnectionError:
            return

    def turn_away(self, peer: bytes) -> None:
        """Tell one that has no session so, once."""
        if peer not in self._strangers:
            self._strangers.append(peer)
            self.send_once(peer, encode_message(Bye(code="no_session", text="say HELLO first")))
