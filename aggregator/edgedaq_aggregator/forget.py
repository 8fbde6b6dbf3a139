"""``forget STORE``: the journal waits no longer for a store that is gone, and its ledger is closed.

The aggregator may be running, the store not. What the store has stored stays where it is; its records are put
away, with its last account beside them.
"""

from __future__ import annotations

from pathlib import Path

import zmq
from edgedaq.errors import ConfigError, StoreError, nearest
from edgedaq.segment_pool import LogError, take_directory
from edgedaq.storage import OsStorage

from edgedaq_aggregator.app import Aggregator
from edgedaq_aggregator.journal_messages import MESSAGE_BYTES_MAX, Forget, encode, socket_address
from edgedaq_aggregator.journal_registry import StoreRegistry
from edgedaq_aggregator.ledger import LedgerRow, format_ledger, read_ledger
from edgedaq_aggregator.stores.put_away import put_away
from edgedaq_aggregator.stores.reader import StorePlace

__all__ = ["forget"]

_LEDGER = "ledger.txt"
_ANSWER_LIMIT_MS = 5000


def forget(aggregator: Aggregator, store: str) -> str:
    """Forget a store; return its last account, in words.

    Raises:
        ConfigError: It is still configured, or was never known.
        StoreError: It runs, or the journal does not answer, or the disk does not take it.
    """
    place = aggregator.place
    for file in aggregator.files:
        if file.unique_id == store:
            message = (
                f"{file.path}: is still there, and {store} would be back at the next start; remove it first"
            )
            raise ConfigError(message)
    journal_dir, own = place.state_dir / "journal", place.state_dir / "stores" / store
    registered = StoreRegistry(journal_dir).positions if journal_dir.is_dir() else {}
    known = {*registered, *(path.name for path in own.parent.glob("*"))}
    if store not in known:
        message = f"no store {store!r} is known{nearest(store, known)}; there are: {', '.join(sorted(known))}"
        raise ConfigError(message)
    rows = [row for row in read_ledger(place.state_dir) if row.store == store]
    if own.is_dir():
        (own / _LEDGER).write_text(format_ledger(rows, limit=len(rows)) + "\n", encoding="utf-8")
        put_away(StorePlace(store, own, place.out_dir))
    if store in registered:
        _tell_journal(journal_dir, place.runtime_dir, store)
    return _account(store, rows)


def _tell_journal(journal_dir: Path, runtime_dir: Path, store: str) -> None:
    storage = OsStorage()
    try:
        lock = take_directory(storage, journal_dir)
    except LogError:
        _ask_intake(runtime_dir, store)
        return
    try:
        StoreRegistry(journal_dir, storage=storage).forget(store)
    finally:
        storage.close(lock)


def _ask_intake(runtime_dir: Path, store: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.connect(socket_address(runtime_dir))
        socket.send(encode(Forget(store)))
        if not socket.poll(_ANSWER_LIMIT_MS):
            message = f"{runtime_dir}/journal.sock: the intake does not answer; try again"
            raise StoreError(message)


def _account(store: str, rows: list[LedgerRow]) -> str:
    stored, waiting = sum(row.stored for row in rows), sum(row.waiting for row in rows)
    text = f"{store}: forgotten; it has stored {stored} rows of {len(rows)} streams"
    return f"{text}, {waiting} rows that waited for it are not stored there" if waiting else text
