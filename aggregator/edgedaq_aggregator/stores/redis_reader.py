"""Streams of a Redis server, read again: entries by their key, which does not say whose they are.

So all entries of a key are compared with the journal at once (``joint.py``). Packed entries say whose they
are. Time series have samples, not rows: they are not asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.delivery import StreamState, StreamTable
from edgedaq.errors import ConfigError, StoreError, WireError
from edgedaq.open_info import OpenInfo
from edgedaq.store_config import DAQJobStoreConfigRedis

from edgedaq_aggregator.stores.alike import Group, Placed, info_of
from edgedaq_aggregator.stores.column_types import column_types, typed
from edgedaq_aggregator.stores.compared import accounts_of, compare, sum_marks
from edgedaq_aggregator.stores.marks import MARKS_COLUMNS
from edgedaq_aggregator.stores.reader import Checked, Part, Retained, StorePlace
from edgedaq_aggregator.stores.redis_keys import accounts_in, marks_key, options_of, own_key, refuge_of
from edgedaq_aggregator.stores.redis_session import DAQJobStoreRedisConfig, Session
from edgedaq_aggregator.stores.server_backend import known_store_id
from edgedaq_aggregator.stores.server_config import config_of
from edgedaq_aggregator.stores.watermarks import table_of

__all__ = ["RedisReader"]

_ENTRIES_AT_ONCE = 5_000
_KEYS_MAX = 999
_PACKED = {b"stream", b"first_seq", b"rows", b"arrow"}
_UNREADABLE = (pa.ArrowException, OSError, ValueError)

Entry = tuple[bytes, dict[bytes, bytes]]


class _Stream(NamedTuple):
    account: StreamState
    info: OpenInfo
    options: DAQJobStoreConfigRedis


class _Key(NamedTuple):
    """A key, the streams whose rows are there, and which of them cannot be told apart."""

    name: str
    streams: dict[int, _Stream]

    @property
    def groups(self) -> list[tuple[int, ...]]:
        in_order = sorted(self.streams, key=lambda stream: self.streams[stream].info.t_open_ns)
        return [(stream,) for stream in in_order] if self.is_packed else [tuple(in_order)]

    @property
    def is_packed(self) -> bool:
        return all(held.options.packed for held in self.streams.values())


class RedisReader:
    """See ``StoreReader``.

    Raises:
        StoreError: The server cannot be asked, or nobody knows where it is.
    """

    def __init__(self, place: StorePlace) -> None:
        self._config = config_of(place, DAQJobStoreRedisConfig)
        self._id = known_store_id(place.state_dir)
        self.position: int | None = None
        self.table = StreamTable()
        if self._id:
            with self._connected() as session:
                found = _hash(session.call("HGETALL", own_key(self._id)))
            self.table = table_of(accounts_in(found))
            self.position = int(found["position"]) if "position" in found else None
        self._accounts = accounts_of(self.table)

    def check(self, retained: Retained) -> Checked:
        """See ``StoreReader``."""
        found = Checked()
        if not self._id:
            return found
        with self._connected() as session:
            marks = self._marks(session)
            sum_marks(marks, found)
            groups: list[Group] = []
            for key in self._keys(session, found):
                groups += self._check_key(session, key, found)
            compare(groups, self.table, marks, retained, found)
        return found

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """See ``StoreReader``."""
        unread = Checked()
        with self._connected() as session:
            keys = self._keys(session, unread)
            told = {stream for key in keys for stream in key.streams}
            if unread.unasked and set(streams) - told:
                raise StoreError("; ".join(unread.unasked))
            for key in keys:
                for group in key.groups:
                    left = sum(key.streams[stream].account.rows for stream in group)
                    if not left or not set(group) & set(streams):
                        continue
                    for placed in _read(session, key, group, 0):
                        table = placed.table.slice(0, left)
                        left -= table.num_rows
                        if table.num_rows:
                            yield Part(group, table)

    def marks(self) -> list[dict[str, str]]:
        """See ``StoreReader``."""
        if not self._id:
            return []
        with self._connected() as session:
            return self._marks(session)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Session]:
        session = Session(self._config)
        try:
            yield session
        finally:
            session.close()

    def _marks(self, session: Session) -> list[dict[str, str]]:
        streams = {f"{stream:016x}" for stream in self._accounts}
        infos = [info for account in self._accounts.values() if (info := info_of(account)) is not None]
        found = []
        for node in sorted({info.node for info in infos}):
            for _, fields in _entries(session, marks_key(node)):
                mark = {name: fields.get(name.encode(), b"").decode() for name in MARKS_COLUMNS}
                if mark["stream"] in streams:
                    found.append(mark)
        return found

    def _keys(self, session: Session, found: Checked) -> list[_Key]:
        """Return the keys that have rows; what is in time series is told as unasked."""
        has_series: bool | None = None
        held: dict[str, dict[int, _Stream]] = {}
        for stream, account in self._accounts.items():
            info = info_of(account)
            if info is None:
                continue
            try:
                options = options_of(info)
            except ConfigError:
                options = refuge_of(stream)
            wanted = f"{info.node}:{options.key}"
            if options.use_timeseries:
                if has_series is None:
                    has_series = "unknown command" not in session.refusal("TS.MADD").lower()
                if has_series:
                    found.unasked.append(f"stream {stream:016x}: the time series {wanted} have no rows")
                    found.rows[stream] = account.rows
                    continue
            held.setdefault(wanted, {})[stream] = _Stream(account, info, options)
        return [_Key(_located(session, wanted), streams) for wanted, streams in held.items()]

    def _check_key(self, session: Session, key: _Key, found: Checked) -> list[Group]:
        """Count what is there; return what can be compared."""
        where = f"{self._config.place}, key {key.name}"
        there = _count_packed(session, key) if key.is_packed else self._count(session, key)
        groups = []
        for group in key.groups:
            stored = sum(key.streams[stream].account.rows for stream in group)
            count = there.get(group, 0)
            may_expire = any(key.streams[s].options.key_expiration_days is not None for s in group)
            for stream in group:
                found.rows[stream] = key.streams[stream].account.rows
            if count < stored and may_expire:
                found.notes.append(f"{where}: {stored - count} rows have expired, as was asked for")
                found.counted += count
                continue
            found.rows[group[-1]] += count - stored
            groups.append(self._group(session, key, group, where, count))
        return groups

    def _count(self, session: Session, key: _Key) -> dict[tuple[int, ...], int]:
        """Return how many entries there are that this view has accounts of."""
        asked = [("MULTI",), ("HGETALL", own_key(self._id)), ("XLEN", key.name), ("EXEC",)]
        held, count = session.pipeline(asked)[-1]
        now = _hash(held)
        accounts = accounts_of(table_of(accounts_in(now)))
        stored = sum(held.account.rows for held in key.streams.values())
        newer = sum(accounts[stream].rows for stream in key.streams if stream in accounts) - stored
        is_ahead = any(f"d:{stream:016x}" in now for stream in key.streams)
        is_mixed = any(held.options.packed for held in key.streams.values())
        if is_mixed:
            count = sum(_rows_of(fields) for _, fields in _entries(session, key.name))
        return {key.groups[0]: min(count - newer, stored) if is_ahead or is_mixed else count - newer}

    def _group(self, session: Session, key: _Key, group: tuple[int, ...], where: str, there: int) -> Group:
        def read(skip: int) -> Iterator[Placed]:
            for placed in _read(session, key, group, skip):
                yield placed._replace(where=where)

        return Group(group, where, there, read)


def _located(session: Session, key: str) -> str:
    """Return where entries are that were to go to a key: it may hold something else."""
    for number in range(1, _KEYS_MAX + 1):
        name = key if number == 1 else f"{key}.{number}"
        if session.call("TYPE", name).decode() in ("none", "stream"):
            return name
    return key


def _rows_of(fields: dict[bytes, bytes]) -> int:
    return int(fields[b"rows"]) if set(fields) == _PACKED else 1


def _count_packed(session: Session, key: _Key) -> dict[tuple[int, ...], int]:
    """Return how many rows there are of each stream that this view has accounts of."""
    found: dict[tuple[int, ...], int] = {}
    for _, fields in _entries(session, key.name):
        stream = key.streams.get(int(fields.get(b"stream", b"0"), 16))
        if set(fields) == _PACKED and stream and int(fields[b"first_seq"]) < stream.account.next_seq:
            group = (stream.account.stream,)
            found[group] = found.get(group, 0) + _rows_of(fields)
    return found


def _read(session: Session, key: _Key, group: tuple[int, ...], skip: int) -> Iterator[Placed]:
    """Yield the rows of streams, from so many on, with the types that they were put with."""
    types = _types([key.streams[stream].info for stream in group])
    held: list[Entry] = []
    for number, fields in _entries(session, key.name):
        if set(fields) != _PACKED:
            if skip:
                skip -= 1
                continue
            held.append((number, fields))
            if len(held) == _ENTRIES_AT_ONCE:
                yield _typed_entries(held, types)
                held = []
            continue
        if int(fields[b"stream"], 16) not in group:
            continue
        if held:
            yield _typed_entries(held, types)
            held = []
        rows = _rows_of(fields)
        if skip >= rows:
            skip -= rows
            continue
        table = _unpacked(key.name, number, fields[b"arrow"]).slice(skip)
        places = [f"{number.decode()}, row {row}" for row in range(skip, rows)]
        skip = 0
        yield Placed(f"key {key.name}", places, table)
    if held:
        yield _typed_entries(held, types)


def _unpacked(key: str, number: bytes, data: bytes) -> pa.Table:
    try:
        return pa.ipc.open_stream(data).read_all()
    except _UNREADABLE as e:
        message = f"key {key}, entry {number.decode()}: cannot be read as Arrow: {e}"
        raise StoreError(message) from e


def _types(infos: Sequence[OpenInfo]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in infos:
        try:
            for name, kind in column_types(info).items():
                found.setdefault(name, kind)
        except WireError:
            continue
    return found


def _typed_entries(entries: Sequence[Entry], types: dict[str, Any]) -> Placed:
    names = list(types) or sorted({name.decode() for _, fields in entries for name in fields} - {"_"})
    columns = [typed([fields.get(name.encode()) for _, fields in entries], types.get(name)) for name in names]
    places = [number.decode() for number, _ in entries]
    return Placed("", places, pa.Table.from_arrays(columns, names=names))


def _entries(session: Session, key: str) -> Iterator[Entry]:
    first: bytes = b"-"
    while found := session.call("XRANGE", key, first, "+", "COUNT", _ENTRIES_AT_ONCE):
        for number, flat in found:
            yield number, dict(zip(flat[::2], flat[1::2], strict=True))
        first = b"(" + found[-1][0]


def _hash(held: Sequence[bytes]) -> dict[str, bytes]:
    return dict(zip(map(bytes.decode, held[::2]), held[1::2], strict=True))
