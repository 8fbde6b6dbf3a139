"""Consumers that would rather miss something than hold a producer back: its account of them. No I/O.

A *follower* has policy ``drop_oldest`` or ``drop_newest``. It holds nothing in the ring, so that nothing it
does, or fails to do, makes a put wait; what it gets are copies::

    published ─► waiting ............................. ─► in flight .......... ─► released
                 at most limit_bytes                      at most IN_FLIGHT_BYTES
                 drop_oldest: positions in the ring;      copies, held until the follower
                   what is overwritten there is dropped     has released them: sent again
                 drop_newest: copies, made when published   when it comes back

A follower that is stuck costs the producer nothing more once that much is in flight: with ``drop_oldest``
only positions change, with ``drop_newest`` nothing is copied any more. Every frame that is dropped is counted
here; the follower derives the same from the frames that it gets (``missing``).

Called with the outlet's lock held: only then the positions that wait are of memory that nobody writes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgedaq.names import matches_any
from edgedaq.ring_control import InputPolicy

__all__ = ["IN_FLIGHT_BYTES", "Copies", "Follower", "Followers"]

IN_FLIGHT_BYTES = 1 << 20
"""Beyond this nothing more is sent before something is released."""

_PART_BYTES = 256 << 10
_AWAY_MAX = 32
_IDENTITY = struct.Struct("<QQQ")
_IDENTITY_AT = 24


@dataclass(slots=True)
class _Waiting:
    position: int
    length: int
    rows: int
    copy: bytes | None


@dataclass(slots=True)
class Copies:
    """Frames as they are sent, in order; ``end`` is the position behind the last of them."""

    frames: list[_Waiting] = field(default_factory=list)
    size: int = 0

    @property
    def end(self) -> int:
        """Position behind the last frame."""
        return self.frames[-1].position + self.frames[-1].length

    @property
    def parts(self) -> list[bytes]:
        """The bytes of the frames."""
        return [frame.copy for frame in self.frames if frame.copy is not None]

    def had(self) -> dict[int, tuple[int, int]]:
        """Return per stream the seq and row that come next to who had these."""
        found = {}
        for frame in self.frames:
            if frame.copy is not None:
                stream, seq, row0 = _IDENTITY.unpack_from(frame.copy, _IDENTITY_AT)
                found[stream] = (seq + 1, row0 + frame.rows)
        return found


@dataclass(slots=True, eq=False)
class Follower:
    """One follower.

    ``had`` is, per stream, the seq and row behind what it has released. Of what waits, ``copied`` comes
    first, then ``waiting``, which lies in the ring.
    """

    name: str
    topics: Sequence[str]
    policy: InputPolicy
    limit_bytes: int
    had: dict[int, tuple[int, int]] = field(default_factory=dict)
    route: bytes | None = None
    copied: deque[_Waiting] = field(default_factory=deque)
    waiting: deque[_Waiting] = field(default_factory=deque)
    waiting_bytes: int = 0
    in_flight: deque[Copies] = field(default_factory=deque)
    in_flight_bytes: int = 0
    dropped_frames: int = 0
    dropped_rows: int = 0
    wants: dict[int, bool] = field(default_factory=dict)

    def drop(self, rows: int) -> None:
        """Count a frame that the follower will not get."""
        self.dropped_frames += 1
        self.dropped_rows += rows


class Followers:
    """All followers of one ring.

    Args:
        data: The ring's data area.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._size = len(data)
        self.held: dict[str, Follower] = {}

    def add(self, name: str, topics: Sequence[str], policy: InputPolicy, limit_bytes: int) -> Follower:
        """Return the follower of that name, with these wishes from now on; make it if need be."""
        follower = self.held.get(name)
        if follower is None:
            follower = self.held[name] = Follower(name, topics, policy, limit_bytes)
        follower.topics, follower.policy, follower.limit_bytes = topics, policy, limit_bytes
        follower.wants = {}
        return follower

    @property
    def is_anyone_there(self) -> bool:
        """Some follower is connected."""
        return any(follower.route is not None for follower in self.held.values())

    def connect(self, follower: Follower, route: bytes) -> int | None:
        """Let a follower be sent what it has not released; return where that begins (None: nothing)."""
        follower.route = route
        for copies in reversed(follower.in_flight):
            follower.copied.extendleft(reversed(copies.frames))
            follower.waiting_bytes += copies.size
        follower.in_flight.clear()
        follower.in_flight_bytes = 0
        first = next(iter(follower.copied or follower.waiting), None)
        return None if first is None else first.position

    def on_publish(
        self,
        stream: int,
        topics: Sequence[str],
        position: int,
        length: int,
        rows: int,
        *,
        only: Follower | None = None,
    ) -> None:
        """Note a frame that was just written, for all who want its stream (or for one of them)."""
        overwritten = position + length - self._size
        for follower in self.held.values() if only is None else (only,):
            wanted = follower.wants.get(stream)
            if wanted is None:
                wanted = follower.wants[stream] = matches_any(follower.topics, topics)
            while follower.waiting and follower.waiting[0].position < overwritten:
                _drop_first(follower, follower.waiting)
            if wanted:
                self._add(follower, position, length, rows)

    def take(self) -> list[tuple[Follower, bytes, Copies]]:
        """Return what each connected follower is to be sent now."""
        found = []
        for follower in self.held.values():
            while follower.route is not None and (follower.copied or follower.waiting):
                if follower.in_flight_bytes >= IN_FLIGHT_BYTES:
                    break
                copies = self._copies(follower)
                follower.in_flight.append(copies)
                follower.in_flight_bytes += copies.size
                found.append((follower, follower.route, copies))
        return found

    def release(self, route: bytes, position: int) -> bool:
        """Take a follower's word that it has what lies before ``position``; False if it is none of them."""
        follower = next((held for held in self.held.values() if held.route == route), None)
        if follower is None:
            return False
        while follower.in_flight and follower.in_flight[0].end <= position:
            copies = follower.in_flight.popleft()
            follower.in_flight_bytes -= copies.size
            follower.had |= copies.had()
        return True

    def disconnect(self, route: bytes) -> None:
        """Note that a follower is gone. It may come back; of those that do not, the oldest are forgotten."""
        for follower in list(self.held.values()):
            if follower.route == route:
                follower.route = None
                self.held[follower.name] = self.held.pop(follower.name)
        away = [name for name, follower in self.held.items() if follower.route is None]
        for name in away[:-_AWAY_MAX]:
            del self.held[name]

    def forget(self, name: str) -> None:
        """Forget a follower that has failed or was removed."""
        self.held.pop(name, None)

    def _add(self, follower: Follower, position: int, length: int, rows: int) -> None:
        if follower.policy == "drop_newest":
            if follower.waiting_bytes + length > follower.limit_bytes:
                follower.drop(rows)
                return
            at = position % self._size
            follower.copied.append(_Waiting(position, length, rows, bytes(self._data[at : at + length])))
            follower.waiting_bytes += length
            return
        follower.waiting.append(_Waiting(position, length, rows, None))
        follower.waiting_bytes += length
        while follower.waiting_bytes > follower.limit_bytes:
            _drop_first(follower, follower.copied or follower.waiting)

    def _copies(self, follower: Follower) -> Copies:
        copies = Copies()
        while not copies.frames or copies.size < _PART_BYTES:
            held = follower.copied or follower.waiting
            if not held:
                break
            frame = held.popleft()
            follower.waiting_bytes -= frame.length
            if frame.copy is None:
                at = frame.position % self._size
                frame.copy = bytes(self._data[at : at + frame.length])
            copies.frames.append(frame)
            copies.size += frame.length
        return copies


def _drop_first(follower: Follower, held: deque[_Waiting]) -> None:
    first = held.popleft()
    follower.waiting_bytes -= first.length
    follower.drop(first.rows)
