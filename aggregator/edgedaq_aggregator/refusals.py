"""What was refused at the port: counted by reason, told once per interval, and when it is enough.

Every reason is one of a few constants, so that counts, logs and ``status`` stay small whatever is sent. Who
repeats what is refused is *barred* for a while; that is an alarm, because nothing of ours does so.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from edgedaq.clock import iso_utc, utc_ns
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger

__all__ = ["GARBAGE", "STRAY", "Refusals"]

GARBAGE = 100
"""Weight of a message that no version of ours sends."""

STRAY = 1
"""Weight of DATA outside of a session: what was on its way when that ended."""

_LIMIT = 1000
_WITHIN_NS = 10_000_000_000
_BARRED_NS = 30_000_000_000
_KNOWN_MAX = 1024


@dataclass(slots=True)
class _Count:
    count: int = 0
    last_ns: int = 0
    last: str = ""
    limit: LogLimit = field(default_factory=LogLimit)


class Refusals:
    """All refusals of one intake. Used by one thread."""

    def __init__(self) -> None:
        self.barred_count = 0
        self._counts: dict[str, _Count] = {}
        self._strikes: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._barred: OrderedDict[str, int] = OrderedDict()
        self._alarms = LogLimit()
        self._log = get_logger()

    def note(self, reason: str, now_ns: int, **facts: str) -> None:
        """Count a refusal.

        Args:
            reason: One of few.
            facts: Who and what, for a person: ``node``, ``address``, ``detail``.
        """
        held = self._counts.setdefault(reason, _Count())
        held.count += 1
        held.last_ns = utc_ns()
        held.last = ", ".join(f"{name} {value}" for name, value in facts.items() if value)[:300]
        count = held.limit.note(now_ns)
        if count:
            known = {name: value[:300] for name, value in facts.items() if value}
            self._log.warning("peer.refused", reason=reason, count=count, **known)

    def strike(self, who: str, weight: int, now_ns: int) -> bool:
        """Take that a peer sent what was refused; True when that was once too often.

        Args:
            who: Its key, or what names its connection.
            weight: ``GARBAGE`` or ``STRAY``.
        """
        total, begun_ns = self._strikes.pop(who, (0, now_ns))
        if now_ns - begun_ns > _WITHIN_NS:
            total, begun_ns = 0, now_ns
        total += weight
        if total < _LIMIT:
            self._strikes[who] = (total, begun_ns)
            _trim(self._strikes)
            return False
        return True

    def bar(self, who: str, now_ns: int, **facts: str) -> None:
        """Refuse everything of a peer for a while, and alarm."""
        self.barred_count += 1
        self._barred[who] = now_ns + _BARRED_NS
        _trim(self._barred)
        count = self._alarms.note(now_ns)
        if count:
            known = {name: value for name, value in facts.items() if value}
            reason = f"what it sends is refused again and again; not listened to for {_BARRED_NS // 10**9} s"
            self._log.error("peer.cut_off", reason=reason, count=count, **known)
        self.note("cut off", now_ns, **facts)

    def is_barred(self, who: str, now_ns: int) -> bool:
        """Tell whether a peer is."""
        until_ns = self._barred.get(who)
        if until_ns is None:
            return False
        if now_ns >= until_ns:
            del self._barred[who]
            return False
        return True

    def to_map(self) -> dict[str, dict[str, Any]]:
        """Return the counts by reason, for a report."""
        return {
            reason: {"count": held.count, "last": iso_utc(held.last_ns), "who": held.last}
            for reason, held in self._counts.items()
        }

    def lines(self) -> list[str]:
        """Return the same for a person, newest first."""
        held = sorted(self._counts.items(), key=lambda item: -item[1].last_ns)
        return [
            f"refused {one.count} times: {reason}, last {iso_utc(one.last_ns)} ({one.last or 'nameless'})"
            for reason, one in held
        ]


def _trim(held: OrderedDict[str, Any]) -> None:
    while len(held) > _KNOWN_MAX:
        held.popitem(last=False)
