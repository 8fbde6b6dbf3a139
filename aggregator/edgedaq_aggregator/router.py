"""The listening socket of the intake: messages in, messages out, without ever waiting for a peer.

With keys, each message bears the key that its connection was let in with; what a peer says of itself, its
routing id included, proves nothing. A connection is *cut* by shutting its descriptor down, which libzmq tells
with each message: libzmq itself has no way to end one connection of a ROUTER.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import zmq
from edgedaq.errors import StoreError
from edgedaq.keys import set_server_keys
from edgedaq.monitor_events import read_event
from edgedaq.session_messages import Bye, encode_message
from edgedaq.transport import set_router_options

__all__ = ["Connection", "Received", "Router"]

_STRANGERS_MAX = 256
_EVENTS_PER_STEP = 256
_CUTS_MAX = 256
_CUT_AFTER_NS = 300_000_000
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_REASONS = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "keys on one side only",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "meant for another aggregator's key",
}


class Connection(NamedTuple):
    """What names a TCP connection as long as it lives."""

    fd: int
    peer: tuple[Any, ...]

    @property
    def address(self) -> str:
        """Where it comes from, for a person."""
        return f"{self.peer[0]}:{self.peer[1]}"


class Received(NamedTuple):
    """One message: a control message where ``part`` is None, DATA otherwise.

    ``key`` is what the connection was let in with, empty where there are no keys. ``part`` is memory of its
    own, kept as long as something refers to it. ``is_sound`` is False when the message had more parts than
    any has.
    """

    peer: bytes
    head: bytes
    part: memoryview | None
    is_sound: bool
    key: str
    envelope: zmq.Frame

    def connection(self) -> Connection | None:
        """Return the connection that it came by; None if that has ended."""
        try:
            fd = int(self.envelope.get("__fd"))
            with socket.socket(fileno=os.dup(fd)) as held:
                return Connection(fd, held.getpeername())
        except (OSError, ValueError, zmq.ZMQError):
            return None


class Router:
    """A bound ROUTER. Must be closed.

    Args:
        secret_key: With one, connections are encrypted and let in by the ZAP handler of the context.

    Raises:
        StoreError: The address cannot be listened on, e.g. because another process does.
    """

    def __init__(self, address: str, context: zmq.Context[Any], secret_key: str = "") -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._has_keys = bool(secret_key)
        self._strangers: deque[bytes] = deque(maxlen=_STRANGERS_MAX)
        self._cuts: deque[tuple[int, Connection]] = deque()
        set_router_options(self.socket, address)
        if secret_key:
            set_server_keys(self.socket, secret_key)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as e:
            self.socket.close(0)
            text = "another process listens there" if e.errno == zmq.EADDRINUSE else str(e)
            message = f"{address} cannot be listened on: {text}"
            raise StoreError(message) from e
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(_FAILED)

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; safe to call again."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)

    def failed_handshakes(self) -> Iterator[str]:
        """Yield why connections ended before they began, except by the ZAP handler."""
        for _ in range(_EVENTS_PER_STEP):
            try:
                event = read_event(self.monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            yield _REASONS.get(event.value, "no handshake of ours")

    def cut(self, connection: Connection | None) -> None:
        """End a connection at once; nothing that it has sent and was not received is."""
        if connection is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as held:
            if held.getpeername() == connection.peer:  # the number may be another's by now
                held.shutdown(socket.SHUT_RDWR)

    def cut_soon(self, connection: Connection | None, now_ns: int) -> None:
        """End a connection, but give the last words to it a moment to leave."""
        if connection is not None:
            self._cuts.append((now_ns + _CUT_AFTER_NS, connection))

    def tick(self, now_ns: int) -> None:
        """End the connections whose moment is over."""
        while self._cuts and (self._cuts[0][0] <= now_ns or len(self._cuts) > _CUTS_MAX):
            self.cut(self._cuts.popleft()[1])

    def receive(self, count: int) -> Iterator[Received]:
        """Yield up to ``count`` messages that have arrived."""
        router, has_keys = self.socket, self._has_keys
        for _ in range(count):
            try:
                envelope = router.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = envelope.bytes
            key = str(envelope.get("User-Id")) if has_keys else ""
            head = router.recv() if router.getsockopt(zmq.RCVMORE) else b""
            if not router.getsockopt(zmq.RCVMORE):
                yield Received(peer, head, None, is_sound=True, key=key, envelope=envelope)
                continue
            part = router.recv(copy=False)
            is_sound = not part.more
            while router.getsockopt(zmq.RCVMORE):
                router.recv()
            yield Received(peer, head, part.buffer, is_sound, key, envelope)

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
