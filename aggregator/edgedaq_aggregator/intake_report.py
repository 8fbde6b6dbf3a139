"""What the intake reports of itself, once a second, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgedaq.clock import iso_utc, mono_ns
from edgedaq.delivery import StreamTable
from edgedaq.frame import Frame, Kind

from edgedaq_aggregator.gatekeeper import Gatekeeper
from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.judging import StreamOwners
from edgedaq_aggregator.lag import JournalFill
from edgedaq_aggregator.nodes import NodeCounts
from edgedaq_aggregator.refusals import Refusals

__all__ = ["Unstored", "journal_facts", "note_fill", "security_facts", "stream_accounts"]

_OPEN_MAX = 2000
_ENDED_MAX = 256
_CLONED_MAX = 10
_TOLD_MAX = 1000
_NAMED_MAX = 5


def stream_accounts(table: StreamTable, owners: StreamOwners) -> dict[str, list[Any]]:
    """Return the accounts of the newest streams, by stream id in hex.

    Each is ``[node, job, next seq, rows, rows in gaps, gaps of unknown size, closed, stores]``.
    """
    accounts: dict[str, list[Any]] = {}
    ended = list(table.tombstones.items())[-_ENDED_MAX:]
    for stream, state in [*ended, *list(table.streams.items())[-_OPEN_MAX:]]:
        facts = owners.facts.get(stream)
        if facts is not None:
            accounts[f"{stream:016x}"] = [
                facts.node,
                facts.job,
                state.next_seq,
                state.rows,
                state.gap_rows,
                state.gaps_unknown,
                state.closed,
                list(facts.stores),
            ]
    return accounts


class Unstored:
    """Jobs whose streams name a store that there is none of.

    Args:
        stores: Keys in ``store_config`` that there are stores for; None: unknown.
    """

    def __init__(self, stores: Sequence[str] | None) -> None:
        self._stores = stores
        self._told: dict[str, None] = {}

    @property
    def problem(self) -> str:
        """What is wrong, in words; empty: nothing."""
        names = ", ".join(list(self._told)[:_NAMED_MAX])
        return f"there is no store for {names}: kept for a while only" if names else ""

    def note(self, frames: Iterable[Frame], owners: StreamOwners, log: Any) -> None:
        """Look at the streams that frames open, and log each job and store once."""
        if self._stores is None:
            return
        for frame in frames:
            facts = owners.facts.get(frame.stream) if frame.kind is Kind.OPEN else None
            for key in facts.stores if facts is not None else ():
                name = "" if facts is None else f"{key} (of {facts.node}/{facts.job})"
                if key not in self._stores and name not in self._told and len(self._told) < _TOLD_MAX:
                    self._told[name] = None
                    log.warning(
                        "store.missing", reason=f"there is no store for {name}; kept for a while only"
                    )


def note_fill(journal: Journal, fill: JournalFill, log: Any) -> None:
    """Look how full the journal is, and log what is news."""
    positions = journal.stores
    slowest = min(positions, key=lambda store: positions[store], default="")
    waiting_bytes = max(journal.durable - max(positions.get(slowest, 0), journal.begin), 0) if slowest else 0
    told = fill.note(mono_ns() / 1e9, waiting_bytes, journal.limit_bytes, slowest)
    if told is not None:
        log.warning(told.event, **told.facts)


def journal_facts(journal: Journal, problem: str, full_in_s: float | None) -> dict[str, Any]:
    """Return the state of the journal; ``problem`` says why it takes nothing, if so."""
    return {
        "begin": journal.begin,
        "end": journal.end,
        "durable": journal.durable,
        "used_bytes": journal.used_bytes,
        "disk_bytes": journal.disk_bytes,
        "stores": journal.stores,
        "left_behind": journal.left_behind,
        "limit_bytes": journal.limit_bytes,
        "full_in_s": full_in_s,
        "problem": problem,
    }


def security_facts(
    gatekeeper: Gatekeeper | None, refusals: Refusals, nodes: Mapping[str, NodeCounts]
) -> dict[str, Any]:
    """Return who is let in how, and who was not; ``told`` says it to a person, a line each."""
    problem = "" if gatekeeper is None else gatekeeper.problem
    cloned = {name: node.cloned_ns for name, node in nodes.items() if node.cloned_ns}
    told = [
        f"node {name} is cloned: two agents displace each other, last {iso_utc(cloned[name])}"
        for name in sorted(cloned, key=lambda name: -cloned[name])[:_CLONED_MAX]
    ]
    return {
        "key": "" if gatekeeper is None else gatekeeper.keys.public,
        "problem": problem,
        "refused": refusals.to_map(),
        "cut_off": refusals.barred_count,
        "told": ([problem] if problem else []) + told + refusals.lines(),
    }
