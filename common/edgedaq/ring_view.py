"""One ring as one consumer sees it: first what its producer tells on the socket, after its death the rest.

Used through ``inlet.Inlet``, by one thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from edgedaq.claim_files import Wants
from edgedaq.errors import WireError
from edgedaq.frame import decode
from edgedaq.names import matches_any
from edgedaq.ring import is_alive, map_ring
from edgedaq.ring_control import (
    CopiesTold,
    Release,
    RingBegin,
    Runs,
    Subscribe,
    decode_from_producer,
    encode_control,
)
from edgedaq.ring_frames import read_opens
from edgedaq.ring_layout import Identity
from edgedaq.salvage import salvage
from edgedaq.schema import OpenInfo, decode_open

__all__ = ["RUN_BYTES_MAX", "RingView", "Run"]

RUN_BYTES_MAX = 1 << 20
"""Runs of a dead producer are cut at about this size."""

_RECEIVE_MAX = 256


@dataclass(frozen=True, slots=True)
class Run:
    """Whole frames of one ring, back to back.

    ``frames`` is a view of the ring and may be read until ``ring.release(end)`` or later; or, where it is not
    ``in_ring`` (copies, what was salvaged), memory of its own. ``count`` is the number of frames.
    """

    ring: RingView
    end: int
    frames: memoryview
    count: int
    in_ring: bool = True


class RingView:
    """A mapped ring of another process, and how far this consumer is with it.

    ``account`` is, per stream, the seq and row that come first, None as long as nobody has told; ``ends`` the
    same of where the streams have ended, once the producer is dead.

    Raises:
        FileNotFoundError: The file is gone.
        WireError: It is not a ring.
    """

    def __init__(self, path: Path, consumer: str, wants: Wants, context: zmq.Context[Any]) -> None:
        self.path = path
        self._fd, self._map, self.layout = map_ring(path)
        self._buffer = memoryview(self._map)
        self._size = self.layout.ring_bytes
        self._data = self._buffer[self.layout.data_offset : self.layout.data_offset + self._size]
        self._topics = wants.topics
        self._is_follower = wants.policy != "wait"
        self._opens: dict[int, bytes] = {}
        self._opens_parsed = self._opens_known = 0
        self._infos: dict[int, OpenInfo] = {}
        self._begin: int | None = None
        self.account: dict[int, tuple[int, int]] | None = None
        self.ends: dict[int, tuple[int, int]] = {}
        self._cursor = self._told = self._released = 0
        self._tail: list[Run] = []
        self.damage: list[str] = []
        self.socket: zmq.Socket[bytes] | None = None
        self.is_dead = not is_alive(self._fd)
        if not self.is_dead:
            self.socket = context.socket(zmq.DEALER)
            self.socket.linger = 0
            self.socket.rcvhwm = self.socket.sndhwm = 0  # bounded by the ring: no region is told of twice
            self.socket.reconnect_ivl = 10
            self.socket.reconnect_ivl_max = 200
            self.socket.connect(f"ipc://{path.with_suffix('.sock')}")
            self._send(Subscribe(consumer, self._topics, wants.policy, wants.limit_bytes))

    @property
    def identity(self) -> Identity:
        """Whose ring it is."""
        return self.layout.identity

    @property
    def life(self) -> str:
        """Life of the producer, 16 hex digits."""
        return self.layout.identity.life

    @property
    def job(self) -> str:
        """Unique id of the producing job."""
        return self.layout.identity.job

    @property
    def is_drained(self) -> bool:
        """The producer is dead, and all that it left for this consumer was received and released."""
        return self.is_dead and not self._tail and self._released >= self._told

    @property
    def unreleased_bytes(self) -> int:
        """Bytes from what this consumer has released to the end of what it was told of."""
        return max(self._told - self._released, 0)

    @property
    def released(self) -> int:
        """Position up to which this consumer has released."""
        return self._released

    def release(self, up_to: int) -> None:
        """Tell that nothing before ``up_to`` (a run's ``end``) will be read again. Cumulative, repeatable.

        Raises:
            ValueError: It is beyond what was delivered.
        """
        if up_to > self._told:
            message = f"ring {self.life}: nothing beyond {self._told} was delivered, got {up_to}"
            raise ValueError(message)
        if up_to <= self._released:
            return
        self._released = up_to
        if not self.is_dead:
            self._send(Release(up_to))

    def open_frame(self, stream: int) -> bytes | None:
        """Return the OPEN frame of a stream of this life; None when there was none so far."""
        if stream not in self._opens and self._opens_parsed < self._opens_known:
            self._opens |= read_opens(self._buffer, self.layout, self._opens_parsed, self._opens_known)
            self._opens_parsed = self._opens_known
        return self._opens.get(stream)

    def open_info(self, stream: int) -> OpenInfo | None:
        """Return what the OPEN of a stream tells; None when there was none so far."""
        info = self._infos.get(stream)
        if info is None:
            raw = self.open_frame(stream)
            if raw is None:
                return None
            info = self._infos[stream] = decode_open(decode(memoryview(raw)))
        return info

    def take(self) -> list[Run]:
        """Return what has arrived since the last call, in order. Does not block.

        Raises:
            WireError: The producer tells what cannot be.
        """
        if self.socket is None:
            runs, self._tail = self._tail, []
            if runs:
                self._told = runs[-1].end
            return runs
        runs = []
        for _ in range(_RECEIVE_MAX):
            try:
                head, *parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=not self._is_follower)
            except zmq.Again:
                break
            raw = head if isinstance(head, bytes) else head.bytes
            runs += self._on_message(decode_from_producer(raw), parts)
        return runs

    def find_death(self, resume_at: int = 0) -> bool:
        """Ask the kernel whether the producer has died; if so, salvage. True when that is news.

        Args:
            resume_at: Position up to which an earlier inlet had released.

        Raises:
            WireError: The memory of the dead cannot be read; this ring gives nothing more. What of it is
                damaged otherwise is in ``damage``.
        """
        early: list[Run] = []
        if self.socket is not None:
            if is_alive(self._fd):
                return False
            # What is still in the socket is not read: the walk finds it again, but for copies.
            if self._is_follower:
                early = self.take()
            self.socket.close()
            self.socket = None
        self.is_dead = True
        left = salvage(self._buffer, since=self._cursor if self._is_follower else None)
        self.damage = left.damage
        self._opens = left.opens | self._opens
        self._opens_parsed = self._opens_known
        begin = max(self._cursor, left.released, resume_at)
        if self._begin is None:
            self._begin = self._released = self._told = begin
        self._tail = early
        self._tail += self._ring_runs((frame.position, frame.length, frame.stream) for frame in left.frames)
        self._tail += self._tail_runs(left.published, left.tail, begin)
        self.ends = {stream: end for stream, end in left.ends.items() if self._wants(stream)}
        return True

    def close(self) -> None:
        """Let the ring go; views that someone holds stay valid."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        self._tail = []
        os.close(self._fd)
        self._data.release()
        self._buffer.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def _send(self, message: Subscribe | Release) -> None:
        if self.socket is not None:
            with contextlib.suppress(zmq.Again):
                self.socket.send(encode_control(message), zmq.NOBLOCK)

    def _on_message(self, message: RingBegin | Runs | CopiesTold, parts: list[Any]) -> list[Run]:
        if not self._opens_known <= message.opens_bytes <= self.layout.opens_bytes:
            text = f"ring {self.life}: opens_bytes went from {self._opens_known} to {message.opens_bytes}"
            raise WireError(text)
        self._opens_known = message.opens_bytes
        if isinstance(message, RingBegin):
            if self._begin is None:
                self._begin = self._cursor = self._told = self._released = message.begin
                self.account = message.next
            return []
        if isinstance(message, CopiesTold):
            return self._copies(message, parts)
        found: list[Run] = []
        for position, length, count in message.runs:
            end = position + length
            if end <= self._cursor:
                continue
            at = position % self._size
            if position < self._cursor or position % 8 or not 0 < length <= self._size - at or not count:
                text = f"ring {self.life}: a run of {length} bytes at {position} cannot be"
                raise WireError(text)
            found.append(Run(self, end, self._data[at : at + length], count))
            self._cursor = self._told = end
        return found

    def _copies(self, message: CopiesTold, parts: list[Any]) -> list[Run]:
        if message.end <= self._cursor:
            return []
        if not self._is_follower or len(parts) != 1 or not message.count:
            text = f"ring {self.life}: copies without frames, or that nobody asked for"
            raise WireError(text)
        self._cursor = self._told = message.end
        return [Run(self, message.end, memoryview(parts[0]), message.count, in_ring=False)]

    def _wants(self, stream: int) -> bool:
        info = self.open_info(stream)
        return info is not None and matches_any(self._topics, info.topics)

    def _ring_runs(self, frames: Iterable[tuple[int, int, int]]) -> list[Run]:
        """Return runs of the frames in the data area that were not received yet and are wanted."""
        spans: list[list[int]] = []
        begin = max(self._cursor, self._released)
        for position, length, stream in frames:
            if position < begin or not self._wants(stream):
                continue
            last = spans[-1] if spans else None
            adjoins = last is not None and last[0] + last[1] == position and position % self._size
            if last is not None and adjoins and last[1] + length <= RUN_BYTES_MAX:
                last[1] += length
                last[2] += 1
            else:
                spans.append([position, length, 1])
        found = []
        for position, length, count in spans:
            at = position % self._size
            found.append(Run(self, position + length, self._data[at : at + length], count))
        return found

    def _tail_runs(self, published: int, tail: list[bytes], begin: int) -> list[Run]:
        """Return runs of salvaged frames; they are numbered on from ``published``."""
        found: list[Run] = []
        held: list[bytes] = []
        end, size = published, 0
        for raw in tail:
            end += len(raw)
            stream = decode(memoryview(raw)).stream
            if end <= begin or not self._wants(stream):
                continue
            held.append(raw)
            size += len(raw)
            if size >= RUN_BYTES_MAX:
                found.append(Run(self, end, memoryview(b"".join(held)), len(held), in_ring=False))
                held, size = [], 0
        if held:
            found.append(Run(self, end, memoryview(b"".join(held)), len(held), in_ring=False))
        return found
