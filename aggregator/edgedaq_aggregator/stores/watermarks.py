"""The account of one stream as bytes, for stores that keep it in their backend.

A msgpack list of the fields of ``StreamState`` in order, without ``open_raw`` (its OPEN frame, kept beside
it, because it never changes). A reader passes over fields at the end that it does not know.
"""

from __future__ import annotations

import msgspec
from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import WireError

__all__ = ["table_of", "watermark", "watermark_state"]

_FIELDS = tuple(name for name in StreamState.__slots__ if name != "open_raw")
_TYPES = [bool if name in ("closed", "tail_unknown") else int for name in _FIELDS]


def watermark(account: StreamState) -> bytes:
    """Return an account as bytes."""
    return msgspec.msgpack.encode([getattr(account, name) for name in _FIELDS])


def watermark_state(data: bytes, open_raw: bytes) -> StreamState:
    """Return the account that ``watermark`` wrote.

    Raises:
        WireError: It is none.
    """
    try:
        values = msgspec.msgpack.decode(data, type=list)[: len(_FIELDS)]
    except msgspec.DecodeError as e:
        message = f"a watermark is damaged: {e}"
        raise WireError(message) from e
    if [type(value) for value in values] != _TYPES:
        message = f"a watermark must have {', '.join(_FIELDS)}, got {values}"
        raise WireError(message)
    return StreamState(values[0], open_raw, *values[1:])


def table_of(accounts: list[StreamState]) -> StreamTable:
    """Return a table of accounts, those committed last being last."""
    table = StreamTable()
    for account in accounts:
        (table.tombstones if account.closed else table.streams)[account.stream] = account
    return table
