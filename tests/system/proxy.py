"""A TCP proxy on loopback that damages, cuts and refuses: the cable between an agent and its aggregator."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK = 256 * 1024
_SLOW_CHUNK = 4096


class Proxy:
    """Forwards connections to ``target_port`` from a thread of its own.

    Args:
        target_port: Where connections go, on loopback.
        flip_every_bytes: About how many bytes towards the target pass between two flipped bits; 0: none. Only
            chunks of at least 4 KiB are damaged, which is data rather than the words of the session: the
            session's own words are guarded by TCP alone until they are encrypted.
        seed: Of the choice of bits.
        rate_bytes_per_s: How much passes towards the target, all connections together; 0: no limit.
    """

    def __init__(
        self, target_port: int, *, flip_every_bytes: int = 0, seed: int = 0, rate_bytes_per_s: int = 0
    ) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self.flipped_count = 0
        self._target_port = target_port
        self._flip_every_bytes = flip_every_bytes
        self._until_flip = flip_every_bytes
        self._random = random.Random(seed)
        self._is_cut = self._is_mute = False
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._wake_in, self._wake_out = socket.socketpair()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._towards: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def cut(self) -> None:
        """Break every connection, and every new one, until ``mend``."""
        self._is_cut = True
        self._wake_in.send(b"c")

    def mute(self) -> None:
        """Swallow what the target answers, until ``mend``: what arrives is not acknowledged."""
        self._is_mute = True

    def mend(self) -> None:
        """Let new connections and all answers pass again."""
        self._is_cut = self._is_mute = False

    def close(self) -> None:
        """Break everything and end the thread."""
        self._wake_in.send(b"q")
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._listener:
                    self._accept()
                elif source is self._wake_out:
                    if b"q" in source.recv(64):
                        self._end()
                        return
                    self._drop_all()
                elif source in self._pairs:
                    self._forward(source)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._is_cut:
            near.close()
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        except OSError:
            near.close()
            return
        self._towards.add(near)
        for one, other in ((near, far), (far, near)):
            one.settimeout(5)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        try:
            chunk = source.recv(_CHUNK if not self._rate_bytes_per_s else _SLOW_CHUNK)
            if chunk:
                if source in self._towards:
                    if self._rate_bytes_per_s:
                        time.sleep(len(chunk) / self._rate_bytes_per_s)
                    self._pairs[source].sendall(self._damaged(chunk))
                elif not self._is_mute:
                    self._pairs[source].sendall(chunk)
                return
        except OSError:
            pass
        self._drop(source)

    def _damaged(self, chunk: bytes) -> bytes:
        self._until_flip -= len(chunk)
        if not self._flip_every_bytes or self._until_flip > 0 or len(chunk) < 4096:
            return chunk
        self._until_flip = self._random.randrange(self._flip_every_bytes, 2 * self._flip_every_bytes)
        changed = bytearray(chunk)
        changed[self._random.randrange(1024, len(chunk))] ^= 1 << self._random.randrange(8)
        self.flipped_count += 1
        return bytes(changed)

    def _drop(self, source: socket.socket) -> None:
        for end in (source, self._pairs.pop(source)):
            self._pairs.pop(end, None)
            self._towards.discard(end)
            with contextlib.suppress(KeyError):
                self._selector.unregister(end)
            end.close()

    def _drop_all(self) -> None:
        while self._pairs:
            self._drop(next(iter(self._pairs)))

    def _end(self) -> None:
        self._drop_all()
        self._selector.close()
        for end in (self._listener, self._wake_in, self._wake_out):
            end.close()
