"""Rows per node, counted from the accounts of single streams: exact over restarts of whoever keeps those.

The intake and the stores keep, per stream and durably, how many rows they have. Here the *growth* of each
account is added to its node's total; so an account that is told again, or by the next life of its keeper,
adds nothing. What waits is the difference of two accounts of one stream.

Accounts beyond ``STREAMS_MAX`` are forgotten, those first that were told longest ago. Their keepers tell
all open streams and the newest ended ones, far fewer, so a forgotten account does not come again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

__all__ = ["STREAMS_MAX", "Arrived", "Backlog", "Stored", "StreamCounts", "arrived_of", "stored_of"]

STREAMS_MAX = 4096


class Arrived(NamedTuple):
    """A stream as the intake has it: rows, rows that GAPs say are lost, keys of the stores it is for."""

    node: str
    rows: int
    gap_rows: int
    stores: tuple[str, ...]


class Stored(NamedTuple):
    """A stream as a store has committed it."""

    rows: int
    gap_rows: int


class StreamCounts(msgspec.Struct):
    """Totals per node, and the accounts that are in them; plain data, to be kept."""

    totals: dict[str, int] = {}
    seen: dict[str, int] = {}

    def update(self, stream: str, node: str, rows: int) -> None:
        """Take the account of one stream."""
        before = self.seen.pop(stream, 0)
        self.totals[node] = self.totals.get(node, 0) + max(rows - before, 0)
        self.seen[stream] = max(rows, before)
        if len(self.seen) > STREAMS_MAX:
            del self.seen[next(iter(self.seen))]


class Backlog:
    """What is in the journal and not in the stores that it is for, by the newest accounts of both."""

    def __init__(self) -> None:
        self.arrived: dict[str, Arrived] = {}
        self._stored: dict[str, tuple[str, dict[str, Stored]]] = {}

    def take_arrived(self, streams: Mapping[str, Arrived]) -> None:
        """Take what the intake tells."""
        for stream, account in streams.items():
            self.arrived.pop(stream, None)
            self.arrived[stream] = account
        while len(self.arrived) > STREAMS_MAX:
            del self.arrived[next(iter(self.arrived))]

    def take_stored(self, store: str, key: str, streams: Mapping[str, Stored]) -> None:
        """Take what a store of a kind (``csv``) tells."""
        held = self._stored.setdefault(store, (key, {}))[1]
        for stream, account in streams.items():
            held.pop(stream, None)
            held[stream] = account
        while len(held) > STREAMS_MAX:
            del held[next(iter(held))]

    def waiting_rows(self) -> dict[str, int]:
        """Return, per node, rows that wait; those for two stores count in both.

        What a store did not tell about has not arrived there; what no store is there for waits once.
        """
        waiting: dict[str, int] = {}
        for stream, account in self.arrived.items():
            waiting.setdefault(account.node, 0)
            for key in account.stores:
                takers = [held for kind, held in self._stored.values() if kind == key] or [{}]
                waiting[account.node] += sum(_lacking(account, held.get(stream)) for held in takers)
        return waiting

    def waiting_for(self, store: str) -> int | None:
        """Return rows that wait for one store; None when it has never told anything."""
        if store not in self._stored:
            return None
        key, held = self._stored[store]
        return sum(
            _lacking(account, held.get(stream))
            for stream, account in self.arrived.items()
            if key in account.stores
        )


def _lacking(arrived: Arrived, stored: Stored | None) -> int:
    """Return the rows of a stream that a store does not have yet."""
    reached = arrived.rows + arrived.gap_rows
    return max(reached - stored.rows - stored.gap_rows, 0) if stored else reached


def arrived_of(value: object) -> dict[str, Arrived]:
    """Return what the intake's report says of streams; entries that are not as agreed are left out.

    An entry is ``[node, job, next_seq, rows, gap_rows, gaps_unknown, closed, [store key, ...]]``.
    """
    found: dict[str, Arrived] = {}
    for stream, entry in _entries(value, 8):
        node, rows, gap_rows, stores = entry[0], entry[3], entry[4], entry[7]
        if isinstance(node, str) and isinstance(rows, int) and isinstance(gap_rows, int):
            found[stream] = Arrived(
                node, rows, gap_rows, tuple(map(str, stores)) if isinstance(stores, list) else ()
            )
    return found


def stored_of(value: object) -> dict[str, Stored]:
    """Return what a store's report says of streams; entries that are not as agreed are left out.

    An entry is ``[next_seq, rows, gap_rows, closed]``.
    """
    return {
        stream: Stored(entry[1], entry[2])
        for stream, entry in _entries(value, 4)
        if isinstance(entry[1], int) and isinstance(entry[2], int)
    }


def _entries(value: object, length: int) -> Iterable[tuple[str, list[Any]]]:
    if not isinstance(value, dict):
        return []
    return [
        (str(stream), entry)
        for stream, entry in value.items()
        if isinstance(entry, list) and len(entry) >= length
    ]
