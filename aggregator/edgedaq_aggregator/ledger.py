"""The ledger: per stream and store, what was produced is stored, waiting, or dropped with a reason.

Read from files alone (the journal's accounts and the stores' commit records), of a running aggregator or a
dead one. Each number is counted where it arises, so that a sum that is right says something::

    produced   rows before the stream's next one as the journal has it; the producer numbers them (``row0``
               of its frames), dropped ones included
    stored     rows that the store's commits have counted
    dropped    rows of GAPs and refusals that the store has marked
    waiting    rows between the store's next one and the journal's
    balances   produced = stored + waiting + dropped

A stream that names a store of which there is none has a row too: all of it waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import decode
from edgedaq.open_info import OpenInfo, decode_open
from edgedaq.segment_reader import read_table
from edgedaq.storage import OsStorage, Storage
from edgedaq.tables import table

from edgedaq_aggregator.stores.commits import LOG_NAME, read_commits

__all__ = ["LedgerRow", "StoreAccounts", "format_ledger", "ledger_of", "read_ledger"]

_COLUMNS = ("job", "stream", "tag", "store", "produced", "stored", "waiting", "dropped", "state")


_WIDTH = 120


class LedgerRow(NamedTuple):
    """One stream in one store; numbers are rows, or messages of raw streams.

    ``closed``: it has ended, and the store has its end.
    """

    node: str
    job: str
    life: str
    stream: str
    tag: str
    store: str
    produced: int
    stored: int
    waiting: int
    dropped: int
    closed: bool
    balances: bool


class StoreAccounts(NamedTuple):
    """What a store has of each stream, and its key in ``store_config``."""

    key: str
    table: StreamTable


def read_ledger(state_dir: Path, *, storage: Storage | None = None) -> list[LedgerRow]:
    """Return the ledger of an aggregator, oldest streams first; empty where nothing ever arrived.

    Raises:
        OSError: Its files cannot be read.
    """
    storage = storage or OsStorage()
    stores: dict[str, StoreAccounts] = {}
    for path in sorted((state_dir / "stores").glob(f"*/{LOG_NAME}")):
        committed = read_commits(path.parent, storage)[0]
        stores[path.parent.name] = StoreAccounts(committed.store, committed.table)
    return ledger_of(read_table(state_dir / "journal", storage=storage), stores)


def ledger_of(journal: StreamTable, stores: Mapping[str, StoreAccounts]) -> list[LedgerRow]:
    """Return the ledger of accounts, oldest streams first.

    Args:
        journal: Read no earlier than those of the stores.
    """
    rows: list[LedgerRow] = []
    seen: set[int] = set()
    for state in _accounts(journal):
        seen.add(state.stream)
        rows += _rows_of(state, stores)
    for name, committed in stores.items():
        for account in _accounts(committed.table):
            info = _info_of(account)
            if account.stream not in seen and info is not None:
                rows.append(_row(info, name, None, account))
    return rows


def format_ledger(rows: Sequence[LedgerRow], *, limit: int = 40) -> str:
    """Return the ledger as an aligned table; its last line says whether it balances.

    Args:
        limit: Rows to show; the oldest that are complete are left out first, and summed up.
    """
    wrong = [row for row in rows if not row.balances]
    waiting = sum(row.waiting for row in rows)
    settled = [row for row in rows if row.balances and row.closed and not row.waiting]
    hidden = set(settled[: max(len(rows) - limit, 0)])
    shown = [row for row in rows if row not in hidden]
    streams = len({row.stream for row in rows})
    parts = (
        [
            table(
                _COLUMNS,
                [(f"{row.node}/{row.job}", row.stream, *row[4:10], _state_of(row)) for row in shown],
                width=_WIDTH,
            )
        ]
        if shown
        else []
    )
    if hidden:
        stored, dropped = sum(row.stored for row in hidden), sum(row.dropped for row in hidden)
        parts.append(f"and {len(hidden)} older ones that are complete: {stored} stored, {dropped} dropped")
    verdict = "balanced"
    if wrong:
        off = ", ".join(
            f"{row.node}/{row.job} {row.stream} in {row.store} is off by "
            f"{row.produced - row.stored - row.waiting - row.dropped}"
            for row in wrong[:5]
        )
        verdict = f"{len(wrong)} do not balance: {off}"
    rest = f", {waiting} rows wait to be stored" if waiting else ""
    parts.append(f"ledger: {streams} {'stream' if streams == 1 else 'streams'}, {verdict}{rest}")
    return "\n".join(parts)


def _accounts(held: StreamTable) -> Iterator[StreamState]:
    yield from held.tombstones.values()
    yield from held.streams.values()


def _rows_of(state: StreamState, stores: Mapping[str, StoreAccounts]) -> Iterator[LedgerRow]:
    info = _info_of(state)
    if info is None:
        return
    for key in info.store_config:
        takers = {name: found for name, found in stores.items() if found.key == key}
        if not takers:
            yield _row(info, f"{key} (none)", state, None)
        for name, committed in takers.items():
            table_ = committed.table
            account = table_.streams.get(state.stream) or table_.tombstones.get(state.stream)
            yield _row(info, name, state, account)


def _row(info: OpenInfo, store: str, journal: StreamState | None, account: StreamState | None) -> LedgerRow:
    known = [state for state in (journal, account) if state is not None]
    produced = max(state.next_row for state in known)
    reached = account.next_row if account is not None else 0
    stored = account.rows if account is not None else 0
    dropped = account.gap_rows if account is not None else 0
    waiting = produced - reached
    return LedgerRow(
        info.node,
        info.job,
        info.life,
        f"{known[0].stream:016x}",
        info.tag,
        store,
        produced,
        stored,
        waiting,
        dropped,
        closed=account is not None and account.closed,
        balances=produced == stored + waiting + dropped,
    )


def _info_of(state: StreamState) -> OpenInfo | None:
    try:
        return decode_open(decode(memoryview(state.open_raw)))
    except WireError:
        return None


def _state_of(row: LedgerRow) -> str:
    if not row.balances:
        return "OFF"
    if row.waiting:
        return "waiting"
    return "closed" if row.closed else "open"
