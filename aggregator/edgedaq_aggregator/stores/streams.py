"""What all backends below ``out_dir`` do alike with their streams: open them again, redirect them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import decode
from edgedaq.open_info import OpenInfo, decode_open

from edgedaq_aggregator.stores.commits import CommitState
from edgedaq_aggregator.stores.marks import Mark

__all__ = ["REFUSED", "redirected_to", "redirection", "reopened"]

REFUSED = "_refused/"
"""Where streams go whose own place cannot be had."""


def reopened(state: CommitState, open_stream: Callable[[int, OpenInfo], None], log: Any) -> StreamTable:
    """Return what is committed, after each of its streams was opened again."""
    table = StreamTable.restore(state.table.snapshot())
    for account in list(table.streams.values()):
        try:
            open_stream(account.stream, decode_open(decode(memoryview(account.open_raw))))
        except WireError as e:
            stream = f"{account.stream:016x}"
            log.error("stream.unreadable", stream=stream, reason=str(e))  # noqa: TRY400 -- told, not debugged
            del table.streams[account.stream]
    return table


def redirected_to(stream: int, key: str) -> str:
    """Return the file path of a stream whose own cannot be had."""
    return f"{REFUSED}{stream:016x}.{key}"


def redirection(stream: int, info: OpenInfo, reason: str, path: str, log: Any) -> Mark:
    """Tell of a stream whose rows go elsewhere; return the mark that says so."""
    log.error("stream.redirected", node=info.node, job=info.job, path=path, reason=reason)
    return Mark(info, stream, "redirected", info.t_open_ns, 0, 0, 0, f"{reason}; see {path}")
