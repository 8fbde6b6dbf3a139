"""Who holds a ring, and up to where: the producer's account of its consumers.

Called with the outlet's lock held. A consumer's
*floor* is the first position that it may still read: what it has released while more of its frames are out,
else the end of all that was published (it has no claim on frames of topics that it did not ask for). The
least floor of all is what the ring is released up to.

A claim outlives its connection: a consumer that comes back under the same name gets everything from its floor
on. It ends when its claim file (see ``inlet``) is removed; those named in the ring's header never end. Of a
claim that was withdrawn the account is kept, so that a consumer that comes back knows what it has missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from edgedaq.errors import WireError
from edgedaq.names import matches_any

__all__ = ["Account", "Claim", "Claims"]

_RUN_BYTES_MAX = 1 << 20
_WITHDRAWN_MAX = 32

Account = dict[int, tuple[int, int]]
"""Per stream, the seq and the row that come next."""


@dataclass(slots=True, eq=False)
class Claim:
    """One consumer.

    ``is_lasting``: named in the ring's header. ``pending`` are runs [position, bytes, count] that it was not
    told of yet, ``told`` the ends of those that it was told of and has not released.
    """

    name: str
    topics: Sequence[str]
    is_lasting: bool
    released: int
    last_end: int
    has_file: bool = False
    route: bytes | None = None
    pending: list[list[int]] = field(default_factory=list)
    told: deque[int] = field(default_factory=deque)
    wants: dict[int, bool] = field(default_factory=dict)

    def floor(self, head: int) -> int:
        """Return the first position that it may still read."""
        return self.released if self.released < self.last_end else head


class Claims:
    """All consumers of one ring.

    Args:
        births: Name and topics of those that hold the ring from its birth.
    """

    def __init__(self, births: dict[str, list[str]], ring_bytes: int) -> None:
        self._size = ring_bytes
        self.claims = {name: Claim(name, topics, True, 0, 0) for name, topics in births.items()}  # noqa: FBT003
        self.withdrawn: dict[str, Account] = {}

    def on_publish(self, stream: int, topics: Sequence[str], position: int, length: int) -> None:
        """Note a frame for all who want its stream."""
        for claim in self.claims.values():
            wanted = claim.wants.get(stream)
            if wanted is None:
                wanted = claim.wants[stream] = matches_any(claim.topics, topics)
            if wanted:
                self._add(claim, position, length)

    def floor(self, head: int) -> int:
        """Return the position up to which nobody needs the ring."""
        return min((claim.floor(head) for claim in self.claims.values()), default=head)

    def add(self, name: str, topics: Sequence[str]) -> None:
        """Hold the ring for a consumer that is known by a file, before anything is published."""
        if name not in self.claims:
            self.claims[name] = Claim(name, topics, is_lasting=False, released=0, last_end=0, has_file=True)

    @property
    def is_anyone_there(self) -> bool:
        """Some consumer is connected."""
        return any(claim.route is not None for claim in self.claims.values())

    def subscribe(
        self,
        name: str,
        topics: Sequence[str],
        route: bytes,
        oldest: int,
        walk: Callable[[int], Iterable[tuple[int, int, int, Sequence[str]]]],
    ) -> Claim:
        """Connect a consumer; all from its floor on becomes pending.

        Args:
            oldest: What the ring is released up to: where a new consumer begins.
            walk: From a position to the (position, length, stream, topics) of all frames behind it.
        """
        claim = self.claims.get(name)
        if claim is None:
            claim = self.claims[name] = Claim(
                name, topics, is_lasting=False, released=oldest, last_end=oldest
            )
        begin = max(claim.released, oldest)
        claim.topics, claim.route, claim.wants = topics, route, {}
        claim.released = claim.last_end = begin
        claim.pending = []
        claim.told.clear()
        for position, length, stream, stream_topics in walk(begin):
            wanted = claim.wants.get(stream)
            if wanted is None:
                wanted = claim.wants[stream] = matches_any(topics, stream_topics)
            if wanted:
                self._add(claim, position, length)
        return claim

    def release(self, route: bytes, position: int) -> None:
        """Take a consumer's word that it needs nothing before ``position``.

        Raises:
            WireError: Nobody has a claim there, or it names what it was not told of.
        """
        claim = next((claim for claim in self.claims.values() if claim.route == route), None)
        if claim is None:
            message = f"a release of {position} from somebody who did not subscribe"
            raise WireError(message)
        if position > (claim.told[-1] if claim.told else claim.released):
            message = f"consumer {claim.name} released {position}, which it was not told of"
            raise WireError(message)
        # Only ends of runs count: what is released begins with a whole frame, always.
        while claim.told and claim.told[0] <= position:
            claim.released = claim.told.popleft()

    def disconnect(self, route: bytes) -> None:
        """Note that a consumer is gone; its claim stays."""
        for claim in self.claims.values():
            if claim.route == route:
                claim.route = None
                claim.pending = []
                claim.told.clear()

    def withdraw(
        self, has_file: Callable[[str], bool], account_at: Callable[[int], Account], head: int
    ) -> list[str]:
        """End the claims whose file is gone, and those without one whose consumer is; return their names.

        Args:
            account_at: From a position that is not released yet to the account there.
        """
        ended = [
            name
            for name, claim in self.claims.items()
            if not claim.is_lasting and (not has_file(name) if claim.has_file else claim.route is None)
        ]
        for name in ended:
            claim = self.claims.pop(name)
            self.remember(name, account_at(claim.floor(head)))
        return ended

    def remember(self, name: str, account: Account) -> None:
        """Keep what a consumer has had that is not one any more; of many, the newest."""
        self.withdrawn[name] = account
        if len(self.withdrawn) > _WITHDRAWN_MAX:
            del self.withdrawn[next(iter(self.withdrawn))]

    def holder(self, head: int) -> Claim | None:
        """Return who holds the ring's oldest frames."""
        held = [claim for claim in self.claims.values() if claim.floor(head) < head]
        return min(held, key=lambda claim: claim.released, default=None)

    def take_pending(self) -> list[tuple[Claim, bytes, list[list[int]]]]:
        """Return what each connected consumer is to be told now."""
        found = []
        for claim in self.claims.values():
            if claim.route is not None and claim.pending:
                claim.told.extend(position + length for position, length, _ in claim.pending)
                found.append((claim, claim.route, claim.pending))
                claim.pending = []
        return found

    def _add(self, claim: Claim, position: int, length: int) -> None:
        claim.last_end = position + length
        if claim.route is None:
            return
        last = claim.pending[-1] if claim.pending else None
        adjoins = last is not None and last[0] + last[1] == position and position % self._size
        if last is not None and adjoins and last[1] + length <= _RUN_BYTES_MAX:
            last[1] += length
            last[2] += 1
        else:
            claim.pending.append([position, length, 1])
