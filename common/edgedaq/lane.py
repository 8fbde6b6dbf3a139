"""A lane: what a node still owes the aggregator, in order, and where each piece of it lies. No I/O.

::

    acknowledged │ spool on disk ............ │ memory: runs in rings .........│ arriving
                 ▲                            ▲                                ▲
            spool_acked                   spool_end                      newest entry
                      ▲ cursor: what the session sends next, in either part

Entries arrive at the right end and leave by the acknowledgement of the session, or into the spool, always
the oldest first. Of what is in the spool nothing is held here but positions. What the rings may forget is
returned as ``Release``s: when an entry is acknowledged, or durable in the spool, whichever comes first.

A session starts at position 0 with the oldest unacknowledged byte. What was sent and not acknowledged is a
row of
*flights*; each knows at which address of the lane it begins and ends, also when entries move to the spool
while they fly. So a cumulative acknowledgement, or going back to a position, is a step to the address of a
flight.

An address is (spool position, index of an entry); it is in memory iff its spool position is ``spool_end``.
While the cursor is in the spool no entry of memory is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from edgedaq.errors import WireError
from edgedaq.lane_parts import AgeMarks, Entry, FromMemory, FromSpool, Release

__all__ = ["Lane"]


@dataclass(slots=True)
class _Address:
    spool: int
    index: int


@dataclass(slots=True)
class _Flight:
    start: int
    end: int
    begin: _Address
    finish: _Address


class Lane:
    """The state of one lane. Used by one thread.

    Args:
        spool_acked: Position up to which the spool is known to be acknowledged.
        spool_end: Position of the spool's end.
        spool_after_ns: Age at which an entry goes to the spool.
        crowded_after_ns: Age for the same while a holder is short of room and no acknowledgement has come for
            as long. While some come, a holder that is full makes its producer wait for them, not for the
            disk.
        part_bytes: Up to this entries are joined; a larger one goes alone.
    """

    def __init__(
        self,
        spool_acked: int = 0,
        spool_end: int = 0,
        *,
        spool_after_ns: int = 200_000_000,
        crowded_after_ns: int = 50_000_000,
        part_bytes: int = 1 << 20,
    ) -> None:
        self.spool_acked = spool_acked
        self.spool_end = spool_end
        self.sent = 0
        """Position of the session: what ends there was sent."""
        self.acked = 0
        """Position of the session: what ends there was acknowledged."""
        self.resent_bytes = 0
        self.memory_bytes = 0
        """What the entries hold together."""
        self._spool_after_ns = spool_after_ns
        self._crowded_after_ns = crowded_after_ns
        self._part_bytes = part_bytes
        self._cursor = spool_acked
        self._flown: deque[Entry] = deque()
        self._waiting: deque[Entry] = deque()
        self._flights: deque[_Flight] = deque()
        self._undurable: deque[tuple[int, list[Release]]] = deque()
        self._held_bytes: dict[Hashable, int] = {}
        self._next_index = 0
        self._moved_ns = 0
        self._ages = AgeMarks()

    @property
    def is_empty(self) -> bool:
        """Everything that ever arrived is acknowledged."""
        return not self._waiting and not self._flown and self.spool_acked >= self.spool_end

    @property
    def is_in_spool(self) -> bool:
        """What is sent next lies in the spool."""
        return self._cursor < self.spool_end

    @property
    def has_unsent(self) -> bool:
        """There is something that this session has not sent."""
        return self.is_in_spool or bool(self._waiting)

    def may_send(self, credit: int) -> bool:
        """Tell whether ``next_part`` has something for this credit."""
        room = credit - self.sent
        first = len(self._waiting[0].frames) if self._waiting else room + 1
        return room > 0 and (self.is_in_spool or first <= room)

    @property
    def in_flight_bytes(self) -> int:
        """Sent in this session and not acknowledged."""
        return self.sent - self.acked

    def held_bytes(self, holder: Hashable) -> int:
        """Return how much of a holder's memory is neither acknowledged nor in the spool."""
        return self._held_bytes.get(holder, 0)

    def is_crowded(self, is_crowded: Callable[[Hashable, int], bool]) -> bool:
        """Tell whether a holder, by the bytes of it that are here, is short of room."""
        return any(is_crowded(holder, size) for holder, size in self._held_bytes.items())

    def oldest_ns(self) -> int | None:
        """Return when the oldest owed byte arrived (to a second if spooled); None if there is none."""
        if self.spool_acked < self.spool_end:
            return self._ages.oldest_ns()
        front = self._front()
        return None if front is None else front.t_ns

    def arrive(self, entry: Entry) -> None:
        """Take an entry, whose time is not before that of the entry before it."""
        entry.index = self._next_index
        self._next_index += 1
        self._hold(entry)
        self._waiting.append(entry)

    def note_backlog(self, t_ns: int) -> None:
        """Say how old the spool's content is that was there from the start."""
        if self.spool_acked < self.spool_end:
            self._ages.add_first(self.spool_acked, t_ns)

    def begin_session(self) -> None:
        """Start a new session: position 0 is the oldest unacknowledged byte."""
        self.resent_bytes += self.in_flight_bytes
        self.sent = self.acked = 0
        self._flights.clear()
        self._waiting.extendleft(reversed(self._flown))
        self._flown.clear()
        self._cursor = self.spool_acked

    def next_part(self, credit: int, part_bytes: int | None = None) -> FromSpool | FromMemory | None:
        """Return what to send now if the credit allows; None when there is nothing, or no credit.

        Args:
            credit: Position of the session up to which may be sent.
            part_bytes: Joins entries up to this only; otherwise up to the lane's own.
        """
        room = credit - self.sent
        if room <= 0:
            return None
        if self._cursor < self.spool_end:
            return FromSpool(self._cursor, self.spool_end)
        entries: list[Entry] = []
        size = 0
        limit = min(room, part_bytes or self._part_bytes)
        for entry in self._waiting:
            more = len(entry.frames)
            if size + more > limit and (entries or more > room):
                break
            entries.append(entry)
            size += more
        return FromMemory(entries, size) if entries else None

    def split_front(self, pieces: Sequence[Entry]) -> None:
        """Put pieces, which together are it, in the place of the entry that is sent next."""
        whole = self._waiting.popleft()
        for entry in self._waiting:
            entry.index += len(pieces) - 1
        for at, piece in enumerate(pieces):
            piece.index = whole.index + at
        self._next_index += len(pieces) - 1
        self._waiting.extendleft(reversed(pieces))

    def sent_memory(self, part: FromMemory, size: int) -> None:
        """Record that a part of ``size`` bytes was sent for what ``next_part`` has just returned."""
        begin = self._here()
        for _ in part.entries:
            self._flown.append(self._waiting.popleft())
        self._fly(begin, size)

    def sent_spool(self, upto: int, size: int) -> None:
        """Record that a part of ``size`` bytes was sent for the spool from the cursor to ``upto``."""
        begin = self._here()
        self._cursor = upto
        self._fly(begin, size)

    def ack(self, position: int, now_ns: int) -> list[Release]:
        """Take an acknowledgement of everything before a position of the session. Cumulative.

        Raises:
            WireError: So much was never sent.
        """
        if position > self.sent:
            message = f"position {position} was acknowledged, only {self.sent} was sent"
            raise WireError(message)
        if position > self.acked:
            self.acked = position
            self._moved_ns = now_ns
        finish: _Address | None = None
        while self._flights and self._flights[0].end <= position:
            finish = self._flights.popleft().finish
        if finish is None:
            return []
        releases: dict[Hashable, int] = {}
        if finish.spool == self.spool_end:
            while self._flown and self._flown[0].index < finish.index:
                self._leave(self._flown.popleft(), releases)
        self.spool_acked = max(self.spool_acked, finish.spool)
        self._ages.forget_before(self.spool_acked)
        if self.spool_acked >= self.spool_end:
            self._ages.clear()
        spooled = self.durable(self.spool_acked)
        return spooled + [Release(*item) for item in releases.items()]

    def go_back(self, position: int) -> bool:
        """Send again from a position at which an unacknowledged part began; False when none did."""
        for flight in self._flights:
            if flight.start == position:
                break
        else:
            return position == self.sent
        self.resent_bytes += self.sent - position
        while self._flights and self._flights[-1] is not flight:
            self._flights.pop()
        self._flights.pop()
        self.sent = position
        self._cursor = flight.begin.spool
        while self._flown and self._flown[-1].index >= flight.begin.index:
            self._waiting.appendleft(self._flown.pop())
        return True

    def due_ns(self, is_crowded: Callable[[Hashable, int], bool]) -> int | None:
        """Return when the oldest entry in memory is to be spooled; None when there is none.

        Args:
            is_crowded: Tells for a holder, and the bytes of it that are here, whether it is short of room.
        """
        limit = self._limit(is_crowded)
        return None if limit is None else limit[0]

    def plan_spooling(
        self, now_ns: int, is_crowded: Callable[[Hashable, int], bool], *, all_of_it: bool = False
    ) -> list[list[Entry]]:
        """Return the entries to append to the spool now, in order, in groups.

        The position behind each group is needed, because a flight or the cursor is there.
        """
        limit = self._limit(is_crowded)
        if limit is None or (now_ns < limit[0] and not all_of_it):
            return []
        due: list[Entry] = []
        for part in (self._flown, self._waiting):
            for entry in part:
                if not all_of_it and now_ns - entry.t_ns < limit[1]:
                    break
                due.append(entry)
        borders = {flight.begin.index for flight in self._flights} | {f.finish.index for f in self._flights}
        if self._waiting:
            borders.add(self._waiting[0].index)
        groups: list[list[Entry]] = []
        size = 0
        for entry in due:
            if not groups or entry.index in borders or size >= self._part_bytes:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += len(entry.frames)
        return groups

    def spooled(self, groups: list[list[Entry]], ends: list[int]) -> None:
        """Record that groups of the plan, the first ones of it, now end at these positions of the spool."""
        if not ends:
            return
        old_end, new_end = self.spool_end, ends[-1]
        starts: dict[int, int] = {}
        position = old_end
        for group, end in zip(groups, ends, strict=False):
            starts[group[0].index] = position
            position = end
        done = groups[: len(ends)]
        behind = done[-1][-1].index + 1
        was_in_spool = self._cursor < old_end
        next_index = self._waiting[0].index if self._waiting else behind
        for flight in self._flights:
            for address in (flight.begin, flight.finish):
                if address.spool == old_end:
                    address.spool = starts.get(address.index, new_end)
                    address.index = max(address.index, behind)
        if not was_in_spool:
            self._cursor = starts.get(next_index, new_end)
        self._ages.add(old_end, done[0][0].t_ns)
        for group, end in zip(done, ends, strict=True):
            releases: dict[Hashable, int] = {}
            for _ in group:
                self._leave((self._flown or self._waiting).popleft(), releases)
            self._undurable.append((end, [Release(*item) for item in releases.items()]))
        self.spool_end = new_end

    def drop_front(
        self, keep: Callable[[Entry], Entry | None], is_enough: Callable[[], bool]
    ) -> tuple[list[Entry], list[Release]]:
        """Drop the oldest entries in memory that were not sent, until it is enough; those in flight stay.

        What is in flight is copied, because its holder releases all that lies before what is dropped.

        Args:
            keep: Returns what of an entry must not be dropped, in memory of its own; None: nothing.

        Returns:
            The entries that were dropped, and what may be released for it.
        """
        releases: dict[Hashable, int] = {}
        for entry in self._flown:
            if entry.holder is not None:
                self._leave(entry, releases)
                entry.holder, entry.release_to = None, None
                entry.frames = memoryview(bytes(entry.frames))
                self._hold(entry)
        dropped: list[Entry] = []
        kept: list[Entry] = []
        while self._waiting and not is_enough():
            entry = self._waiting.popleft()
            rest = keep(entry)
            if rest is not None:
                rest.index, rest.t_ns = entry.index, entry.t_ns
                kept.append(rest)
            if entry.holder is not None:
                dropped.append(entry)
            self._leave(entry, releases)
        for entry in reversed(kept):
            self._hold(entry)
            self._waiting.appendleft(entry)
        return dropped, [Release(*item) for item in releases.items()]

    def spool_moved(self, end: int) -> None:
        """Take that the spool was written anew, behind all old positions; everything in it is sent again."""
        self.begin_session()
        self.spool_end = max(self.spool_end, end)

    def durable(self, position: int) -> list[Release]:
        """Take that the spool is durable up to a position (or acknowledged, which is as good)."""
        found: list[Release] = []
        while self._undurable and self._undurable[0][0] <= position:
            found += self._undurable.popleft()[1]
        return found

    def _here(self) -> _Address:
        return _Address(self._cursor, self._waiting[0].index if self._waiting else self._next_index)

    def _fly(self, begin: _Address, size: int) -> None:
        start = self.sent
        self.sent += size
        self._flights.append(_Flight(start, self.sent, begin, self._here()))

    def _front(self) -> Entry | None:
        if self._flown:
            return self._flown[0]
        return self._waiting[0] if self._waiting else None

    def _hold(self, entry: Entry) -> None:
        size = len(entry.frames)
        self.memory_bytes += size
        self._held_bytes[entry.holder] = self._held_bytes.get(entry.holder, 0) + size

    def _leave(self, entry: Entry, releases: dict[Hashable, int]) -> None:
        size = len(entry.frames)
        self.memory_bytes -= size
        left = self._held_bytes[entry.holder] - size
        if left:
            self._held_bytes[entry.holder] = left
        else:
            del self._held_bytes[entry.holder]
        if entry.release_to is not None:
            releases[entry.holder] = entry.release_to

    def _limit(self, is_crowded: Callable[[Hashable, int], bool]) -> tuple[int, int] | None:
        """Return when the oldest entry is to be spooled, and the age from which others go with it then."""
        front = self._front()
        if front is None:
            return None
        limit = (front.t_ns + self._spool_after_ns, self._spool_after_ns)
        if self.is_crowded(is_crowded):
            crowded_ns = max(front.t_ns, self._moved_ns) + self._crowded_after_ns
            return min(limit, (crowded_ns, min(self._crowded_after_ns, self._spool_after_ns)))
        return limit
