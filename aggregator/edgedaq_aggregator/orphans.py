"""Streams that nobody will go on with: their node has lost their ring, in a power cut or to damage. Pure.

A job's stream ends by its CLOSE, written by the job itself or by who salvages its ring. Where the ring is
gone there is nobody left to write it. The node says which lives it still has something of (LIVES), once it
has sent everything else; the intake then closes the others itself, so that the stream says that its tail is
not known, and how many seconds of it at most.
"""

from __future__ import annotations

from collections.abc import Collection

from edgedaq.delivery import StreamTable
from edgedaq.frame import Frame, Kind, decode, encode, pack_map

from edgedaq_aggregator.judging import StreamOwners

__all__ = ["closing_frames"]


def closing_frames(
    table: StreamTable, owners: StreamOwners, node: str, lives: Collection[str], bound_s: float
) -> list[Frame]:
    """Return a CLOSE for each open stream of a node that is of none of the lives.

    Args:
        bound_s: How much of the tail can be missing at most, by the node's own word.
    """
    found = []
    for stream, state in table.streams.items():
        facts = owners.facts.get(stream)
        if facts is None or facts.node != node or facts.life in lives:
            continue
        body = pack_map({"rows": state.next_row, "tail_unknown": True, "bound_s": bound_s})
        raw = encode(Kind.CLOSE, stream, state.next_seq, body, row0=state.next_row)
        found.append(decode(memoryview(raw)))
    return found
