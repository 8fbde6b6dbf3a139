"""Rows per node, counted from the accounts of single streams: exact over restarts of whoever keeps the accounts.

Intake and stores keep per stream how many rows they have, for ever and durably. Here the *growth* of each account
is added to its node's total, so an account that is told again, or by the next life of its keeper, adds nothing.
An account that was forgotten (beyond ``STREAMS_MAX``, those that were told longest ago) is not told again by
its keeper either, which forgets ended streams sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["STREAMS_MAX", "Arrived", "StreamCounts", "StreamsOfStores", "arrived_of", "stored_of"]

STREAMS_MAX = 4096


class Arrived(msgspec.Struct):
    """A stream as the intake has it. ``stores`` are the keys of its ``store_config``."""

    node: str
    rows: int
    gap_rows: int
    stores: list[str]


class StreamCounts(msgspec.Struct):
    """Totals per node, and the accounts that are in them."""

    totals: dict[str, int] = {}
    seen: dict[str, int] = {}

    def update(self, stream: str, node: str, rows: int) -> None:
        """Take the account of one stream."""
        before = self.seen.pop(stream, 0)
        self.totals[node] = self.totals.get(node, 0) + max(rows - before, 0)
        self.seen[stream] = max(rows, before)
        while len(self.seen) > STREAMS_MAX:
            del self.seen[next(iter(self.seen))]
