"""A Redis server as a store: a transaction per commit has rows, marks and watermarks.

What rows look like is drawn in ``redis_rows.py``. The keys::

    <node>:<key>             stream: the rows; <key>.2, ... where a key holds something else already
    <node>:<key>:<column>    time series, with ``use_timeseries`` where the server has them
    <node>:_marks            stream: what is said about data, with the fields of ``_marks.csv``
    .edgedaq:<store id>      hash: position, epoch; w:<stream> account, o:<stream> its OPEN frame (16 hex
                             digits); d:<stream> last seq that is stored ahead of the account

A commit::

    WATCH .edgedaq:<id> <key> ...    what is written to
    HMGET epoch position, TYPE ...   still what this process has left there?
    MULTI
      XADD ...                       at most about ``_CHUNK`` rows: a server does nothing else meanwhile
      HSET d:<stream> ...            in all but the last one: what is stored ahead of the accounts
      HSET position w:... o:..., HDEL d:..., XADD _marks   in the last one
      TIME
    EXEC

EXEC does all or, if a watched key was changed by others, nothing; then it is tried again. A process that
connects raises the epoch, so that no EXEC of an earlier one that is still on its way can be done. Everything
that a command in EXEC could be refused for is asked before; every reply is checked nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from edgedaq.clock import iso_utc
from edgedaq.delivery import TOMBSTONES_MAX
from edgedaq.errors import StoreError
from edgedaq.frame import Frame
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.store_config import DAQJobStoreConfigRedis

from edgedaq_aggregator.stores.backend import Recovered
from edgedaq_aggregator.stores.marks import Mark
from edgedaq_aggregator.stores.redis_durability import Durability
from edgedaq_aggregator.stores.redis_keys import accounts_in, marks_key, options_of, own_key, refuge_of
from edgedaq_aggregator.stores.redis_rows import Commands, entries, packed_entry, samples, tells_time
from edgedaq_aggregator.stores.redis_session import DAQJobStoreRedisConfig, Session
from edgedaq_aggregator.stores.server_backend import Load, Work
from edgedaq_aggregator.stores.tables import TableDecoder
from edgedaq_aggregator.stores.watermarks import table_of, watermark

__all__ = ["RedisServer"]

_CHUNK = 20_000
_TRIES = 10
_KEYS_MAX = 999
_DAY_MS = 86_400_000


@dataclass(slots=True)
class _Destination:
    stream: int
    key: str
    options: DAQJobStoreConfigRedis
    info: OpenInfo
    decoder: TableDecoder


class _Payload(NamedTuple):
    destination: _Destination
    batch: pa.RecordBatch
    frame: Frame
    commands: Commands


@dataclass(slots=True)
class _Chunk:
    """What one EXEC does."""

    packed: list[Any] = field(default_factory=list)
    count: int = 0
    keys: set[str] = field(default_factory=set)
    ahead: dict[int, int] = field(default_factory=dict)
    days: dict[str, int] = field(default_factory=dict)
    commands: list[tuple[Any, ...]] = field(default_factory=list)


class RedisServer:
    """See ``Server``."""

    key = "redis"

    def __init__(self, config: DAQJobStoreRedisConfig) -> None:
        self._config = config
        self._log = get_logger().bind(store="redis", server=config.place)
        self._session: Session | None = None
        self._watch: Session | None = None
        self._counts = dict.fromkeys(("collision_count", "not_finite_count", "refused_reply_count"), 0)

    def connect(self, store: str) -> Recovered:
        """See ``Server``."""
        session = self._session = Session(self._config)
        self._own_key = own_key(store)
        persistence = session.persistence()
        if persistence.how == "none" and not self._config.accept_volatile:
            raise StoreError(persistence.doubt)
        if persistence.doubt:
            self._log.warning("store.weak", reason=persistence.doubt)
        self._persistence = persistence
        self._durability = Durability(persistence)
        self._has_series = "unknown command" not in session.refusal("TS.MADD").lower()
        self._located: dict[str, str] = {}
        self._series: set[str] = set()
        self._epoch = int(session.call("HINCRBY", self._own_key, "epoch", 1))
        held = session.call("HGETALL", self._own_key)
        found = dict(zip(map(bytes.decode, held[::2]), held[1::2], strict=True))
        position = int(found["position"]) if "position" in found else None
        self._ahead = {
            int(name.removeprefix("d:"), base=16): int(seq)
            for name, seq in found.items()
            if name.startswith("d:")
        }
        self._noted = dict(self._ahead)
        accounts = accounts_in(found)
        self._known = {account.stream for account in accounts}
        self._closed = {account.stream: None for account in accounts if account.closed}
        self._durability.note(session, position, int(session.call("TIME")[0]))
        return Recovered(table_of(accounts), position)

    def destination(self, stream: int, info: OpenInfo) -> _Destination:
        """See ``Server``."""
        options = options_of(info)
        if options.use_timeseries and not self._has_series:
            self._log.warning(
                "series.absent", key=options.key, reason="the server has no time series; a stream is used"
            )
        return self._destination(stream, options, info)

    def refuge(self, stream: int, info: OpenInfo) -> tuple[_Destination, str]:
        """See ``Server``."""
        options = refuge_of(stream)
        found = self._destination(stream, options, info)
        return found, found.key

    def encode(self, destination: _Destination, frames: Sequence[Frame]) -> list[tuple[int, Any]]:
        """See ``Server``."""
        ahead = self._ahead.get(destination.stream, -1)
        wanted = [frame for frame in frames if frame.seq > ahead]
        found: list[tuple[int, Any]] = []
        is_each = self._has_series_for(destination) and not tells_time(destination.info.schema)
        for group in [[frame] for frame in wanted] if is_each else [wanted] if wanted else []:
            for batch in destination.decoder.batches(group):
                if batch.num_rows:
                    commands = self._encode(destination, destination.key, batch, group[0])
                    found.append((batch.num_rows, _Payload(destination, batch, group[0], commands)))
        return found

    def commit(self, work: Work) -> None:
        """See ``Server``."""
        session = self._live
        *before, last = self._chunks(session, work.loads)
        for chunk in before:
            self._execute(session, chunk, work)
        self._finish(last, work)
        server_s = self._execute(session, last, work)
        self._known.update(account.stream for account in work.accounts)
        self._durability.note(session, work.position, server_s)

    def durable_position(self) -> int | None:
        """See ``Server``; asks the server by a connection of its own."""
        if self._durability.is_due():
            if self._watch is None:
                self._watch = Session(self._config)
            self._durability.ask(self._watch)
        return self._durability.durable_position

    def facts(self) -> dict[str, Any]:
        """See ``Server``."""
        told = {"server": self._config.place, "persistence": self._persistence.told}
        return {**told, **{name: count for name, count in self._counts.items() if count}}

    def close(self) -> None:
        """See ``Server``."""
        for session in (self._session, self._watch):
            if session is not None:
                session.close()
        self._session = self._watch = None

    @property
    def _live(self) -> Session:
        if self._session is None:
            message = "a backend must be recovered before it is used"
            raise RuntimeError(message)
        return self._session

    def _destination(self, stream: int, options: DAQJobStoreConfigRedis, info: OpenInfo) -> _Destination:
        return _Destination(stream, f"{info.node}:{options.key}", options, info, TableDecoder(info))

    def _has_series_for(self, destination: _Destination) -> bool:
        return destination.options.use_timeseries and self._has_series

    def _encode(self, destination: _Destination, key: str, batch: pa.RecordBatch, frame: Frame) -> Commands:
        """Return what stores a batch, entries under ``key``."""
        if destination.options.packed:
            return packed_entry(key.encode(), batch, destination.stream, frame)
        if not self._has_series_for(destination):
            return entries(key.encode(), batch)
        t_first_ns = frame.t_first_ns or destination.info.t_open_ns
        found = samples(destination.key, key, batch, t_first_ns)
        self._counts["collision_count"] += found.collided
        self._counts["not_finite_count"] += found.not_finite
        return found.commands

    def _chunks(self, session: Session, loads: list[Load]) -> Iterable[_Chunk]:
        """Yield loads as they fit into one EXEC each; at least one chunk, which may be empty."""
        chunk = _Chunk()
        for load in loads:
            payload: _Payload = load.payload
            if chunk.count + payload.commands.command_count > _CHUNK and chunk.count:
                yield chunk
                chunk = _Chunk()
            commands, destination = payload.commands, payload.destination
            self._make_series(session, payload)
            chunk.keys.update(commands.series)
            if commands.has_entries:
                key = self._locate(session, destination.key)
                if key != destination.key:
                    commands = self._encode(destination, key, payload.batch, payload.frame)
                chunk.keys.add(key)
                if destination.options.key_expiration_days is not None:
                    chunk.days[key] = destination.options.key_expiration_days
            chunk.packed += commands.data
            chunk.count += commands.command_count
            chunk.ahead[load.stream] = load.last_seq
        yield chunk

    def _locate(self, session: Session, key: str) -> str:
        """Return the key that is, or may be, a stream: the one wanted, or one with a number."""
        known = self._located.get(key)
        if known is not None:
            return known
        for number in range(1, _KEYS_MAX + 1):
            name = key if number == 1 else f"{key}.{number}"
            if session.call("TYPE", name).decode() in ("none", "stream"):
                if number > 1:
                    self._log.warning("key.numbered", key=key, path=name, reason="it holds something else")
                self._located[key] = name
                return name
        message = f"{_KEYS_MAX} keys {key!r} hold something else"
        raise StoreError(message)

    def _make_series(self, session: Session, payload: _Payload) -> None:
        destination = payload.destination
        info, days = destination.info, destination.options.key_expiration_days
        for name in payload.commands.series:
            if name in self._series:
                continue
            column = name[len(destination.key) + 1 :]
            options = ("RETENTION", (days or 0) * _DAY_MS, "DUPLICATE_POLICY", "LAST")
            labels = ("LABELS", "node", info.node, "job", info.job, "column", column)
            if session.call("EXISTS", name):
                session.call("TS.ALTER", name, *options, *labels)
            else:
                session.call("TS.CREATE", name, *options, *labels)
            self._series.add(name)

    def _finish(self, chunk: _Chunk, work: Work) -> None:
        """Add what makes the last chunk the commit."""
        chunk.ahead.clear()
        chunk.commands += [_mark_command(mark) for mark in work.marks]
        values: list[Any] = [] if work.position is None else ["position", work.position]
        gone: list[str] = []
        for account in work.accounts:
            name = f"{account.stream:016x}"
            if self._noted.get(account.stream, account.next_seq) < account.next_seq:
                del self._noted[account.stream]
                gone.append(f"d:{name}")
            values += [f"w:{name}", watermark(account)]
            if account.stream not in self._known:
                values += [f"o:{name}", account.open_raw]
            if account.closed:
                self._closed[account.stream] = None
        while len(self._closed) > TOMBSTONES_MAX:
            oldest = next(iter(self._closed))
            del self._closed[oldest]
            gone += [f"w:{oldest:016x}", f"o:{oldest:016x}"]
        if values:
            chunk.commands.append(("HSET", self._own_key, *values))
        if gone:
            chunk.commands.append(("HDEL", self._own_key, *gone))

    def _execute(self, session: Session, chunk: _Chunk, work: Work) -> int:
        """Do a chunk; return the server's time then, in seconds."""
        self._noted.update(chunk.ahead)
        ahead = [("HSET", self._own_key, f"d:{stream:016x}", seq) for stream, seq in chunk.ahead.items()]
        keys = sorted(chunk.keys)
        for _ in range(_TRIES):
            _, state, now, *kinds = session.pipeline(
                [
                    ("WATCH", self._own_key, *keys),
                    ("HMGET", self._own_key, "epoch", "position"),
                    ("TIME",),
                    *(("TYPE", key) for key in keys),
                ]
            )
            self._check(state, dict(zip(keys, kinds, strict=True)), work)
            commands = [*chunk.commands, *ahead, *_expiry(chunk, int(now[0])), ("TIME",)]
            replies = session.transaction(chunk.packed, chunk.count, commands)
            if replies is not None:
                self._check_replies(replies)
                return int(replies[-1][0])
        message = f"others change {', '.join(keys)} too often"
        raise StoreError(message)

    def _check(self, state: list[bytes | None], kinds: dict[str, bytes], work: Work) -> None:
        """Raise unless the server still has what this process left, and keys that take what is to come."""
        epoch, position = (None if value is None else int(value) for value in state)
        if (epoch, position) != (self._epoch, work.before):
            message = "another process writes as this store, or the server was set back"
            raise StoreError(message)
        for key, kind in kinds.items():
            if kind not in (b"none", b"stream") and key not in self._series:
                message = f"key {key!r} holds a {kind.decode()} now"
                raise StoreError(message)
            if key in self._series and kind == b"none":
                message = f"time series {key!r} was deleted"
                raise StoreError(message)

    def _check_replies(self, replies: list[Any]) -> None:
        refused = [reply for reply in _flat(replies) if isinstance(reply, Exception)]
        if refused:
            self._counts["refused_reply_count"] += len(refused)
            self._log.error("rows.refused", count=len(refused), reason=str(refused[0]))


def _expiry(chunk: _Chunk, now_s: int) -> Iterable[tuple[Any, ...]]:
    """Yield what lets streams lose entries older than asked, and vanish when nothing comes any more."""
    for key, days in chunk.days.items():
        yield ("PEXPIRE", key, days * _DAY_MS)
        yield ("XTRIM", key, "MINID", "~", max(now_s * 1000 - days * _DAY_MS, 0))


def _mark_command(mark: Mark) -> tuple[Any, ...]:
    info = mark.info
    fields = {
        "time": iso_utc(mark.t_utc_ns),
        "node": info.node,
        "job": info.job,
        "life": info.life,
        "stream": f"{mark.stream:016x}",
        "tag": info.tag,
        "kind": mark.kind,
        "first_seq": mark.first_seq,
        "last_seq": mark.last_seq,
        "rows": "" if mark.rows is None else mark.rows,
        "reason": mark.reason.encode("utf-8", "backslashreplace"),
    }
    pairs = [item for pair in fields.items() for item in pair]
    return ("XADD", marks_key(info.node), "*", *pairs)


def _flat(replies: Iterable[Any]) -> Iterable[Any]:
    for reply in replies:
        if isinstance(reply, list):
            yield from _flat(reply)
        else:
            yield reply
