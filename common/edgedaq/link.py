"""One end of the channel between a supervisor and a worker: msgpack maps over a socket pair.

::

    u32 length, little-endian | msgpack map of that length | u32 length | ...

It ends when the other process ends, however it ended; so a worker knows of its supervisor's death, and the
other way round. ``send`` never blocks: what the other side does not read is held up to a bound, beyond which
messages are refused to the sender, who may try again or leave it. Both ends may be used from several threads.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Any, Self

import msgpack

from edgedaq.errors import EdgeDAQError

__all__ = ["MESSAGE_BYTES_MAX", "PENDING_BYTES_MAX", "Link", "LinkClosed"]

MESSAGE_BYTES_MAX = 8 << 20
PENDING_BYTES_MAX = 16 << 20
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_READS_MAX = 64


class LinkClosed(EdgeDAQError):  # noqa: N818  # it is an end, not a failure
    """The other process has ended, or what it sent is not a message; nothing more will come."""


class Link:
    """One end; owns its socket. A context manager."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)  # noqa: FBT003
        self._sock = sock
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._received = bytearray()
        self._ended = ""

    @classmethod
    def pair(cls) -> tuple[Link, socket.socket]:
        """Return this side's link and the socket that the other process is to inherit."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    @classmethod
    def from_fd(cls, fd: int) -> Link:
        """Return the link over an inherited descriptor, which it then owns."""
        return cls(socket.socket(fileno=fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading; -1 once closed."""
        return self._sock.fileno()

    @property
    def has_pending(self) -> bool:
        """True while something that was sent has not left yet: poll for writing too, then ``flush``."""
        return bool(self._pending)

    def send(self, message: dict[str, Any]) -> bool:
        """Send a map, or hold it until the other side reads.

        Returns:
            False if it was refused, because the other side has not read for long.

        Raises:
            LinkClosed: The other process has ended.
            ValueError: The message is too large or not plain data: a defect of the caller.
        """
        try:
            packed: bytes = msgpack.packb(message, use_bin_type=True)
        except (TypeError, OverflowError) as e:
            text = f"a message must be plain data: {e}"
            raise ValueError(text) from e
        if len(packed) > MESSAGE_BYTES_MAX:
            text = f"a message must be at most {MESSAGE_BYTES_MAX} bytes, got {len(packed)}"
            raise ValueError(text)
        with self._lock:
            if len(self._pending) + len(packed) > PENDING_BYTES_MAX:
                self._flush()
                if len(self._pending) + len(packed) > PENDING_BYTES_MAX:
                    return False
            self._pending += _LENGTH.pack(len(packed))
            self._pending += packed
            self._flush()
            return True

    def flush(self, limit_s: float = 0.0) -> bool:
        """Send what is pending; wait up to ``limit_s`` for the other side to read; True if nothing is left.

        Raises:
            LinkClosed: The other process has ended.
        """
        deadline = time.monotonic() + limit_s
        while True:
            with self._lock:
                self._flush()
                if not self._pending:
                    return True
                fd = self._sock.fileno()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll(min(left_s, 0.1) * 1000)

    def _flush(self) -> None:
        while self._pending:
            if self._sock.fileno() < 0:
                text = "the link was closed"
                raise LinkClosed(text)
            try:
                sent = self._sock.send(self._pending)
            except BlockingIOError:
                return
            except OSError as e:
                text = f"the other side has ended: {e.strerror}"
                raise LinkClosed(text) from e
            del self._pending[:sent]

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived, in order; empty if none.

        Raises:
            LinkClosed: There are none and there will be none.
        """
        with self._lock:
            if not self._ended:
                self._read()
            messages = self._split()
        if not messages and self._ended:
            raise LinkClosed(self._ended)
        return messages

    def _read(self) -> None:
        for _ in range(_READS_MAX):
            try:
                chunk = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                self._ended = f"the other side has ended: {e.strerror}"
                return
            if not chunk:
                self._ended = "the other side has ended"
                return
            self._received += chunk

    def _split(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        position = 0
        held = self._received
        while len(held) - position >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(held, position)
            if length > MESSAGE_BYTES_MAX:
                self._ended = f"the other side sent a message of {length} bytes"
                position = len(held)
                break
            end = position + _LENGTH.size + length
            if end > len(held):
                break
            try:
                message = msgpack.unpackb(bytes(held[position + _LENGTH.size : end]), strict_map_key=True)
            except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as e:
                message = e
            if not isinstance(message, dict):
                self._ended = f"the other side sent what is not a map: {message!r:.100}"
                position = len(held)
                break
            messages.append(message)
            position = end
        del held[:position]
        return messages

    def close(self) -> None:
        """Send what can be sent at once, and end the link; the other side sees its end."""
        with self._lock:
            if self._sock.fileno() >= 0:
                with contextlib.suppress(LinkClosed):
                    self._flush()
            self._sock.close()
