"""Reading back: what an aggregator has stored, as Arrow tables, whatever store it is in.

::

    from edgedaq_aggregator.reading import open_out

    out = open_out("out")                     # or the directory of the aggregator's TOML files
    for stream in out.streams(node="node1"):
        print(stream.job, stream.tag, stream.rows)
    table = out.read(node="node1", job="pc_metrics", start="2026-05-01", end="2026-05-02T12:00Z")
    frame = table.to_pandas()
    gaps = out.marks(job="pc_metrics", kind="gap")

Only what is committed is seen, as of ``open_out``; the aggregator may be running. Bytes that are not those
that were stored are never returned: that raises ``StoreError``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from edgedaq.errors import StoreError, WireError, nearest
from edgedaq.frame import decode
from edgedaq.open_info import OpenInfo, decode_open

from edgedaq_aggregator.stored import Stored, find_stored
from edgedaq_aggregator.stores.marks import MARKS_HEADER

__all__ = ["Out", "StoredStream", "open_out"]

_FIRST_CHOICE = ("parquet", "sqlite", "hdf5", "root", "csv", "mysql", "redis", "raw")
_NS_PER_S = 1_000_000_000


class StoredStream(NamedTuple):
    """One stream in one store; ``rows`` are stored, ``gap_rows`` are known to be missing.

    ``t_open_ns`` is UTC. ``info`` has everything that its producer said of it.
    """

    store: str
    node: str
    job: str
    life: str
    stream: str
    tag: str
    form: str
    rows: int
    gap_rows: int
    is_closed: bool
    t_open_ns: int
    info: OpenInfo


def open_out(path: str | Path) -> Out:
    """Open what an aggregator has stored.

    Args:
        path: Its ``out_dir``, with the state within, or the directory of its TOML files.

    Raises:
        ConfigError: It is neither.
    """
    return Out(find_stored(Path(path)))


class Out:
    """The stored streams of an aggregator; nothing is read before it is asked for."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @property
    def stores(self) -> dict[str, str]:
        """The stores that can be read, and the key of each in ``store_config``."""
        return {name: key for name, (key, _) in self._stored.readers.items()}

    @property
    def silent(self) -> dict[str, str]:
        """The stores that cannot be read, and why."""
        return dict(self._stored.silent)

    def streams(
        self, *, store: str = "", node: str = "", job: str = "", tag: str = "", stream: str = ""
    ) -> list[StoredStream]:
        """Return the streams that are all of what is given, oldest first.

        Args:
            store: Name of a store, or its key in ``store_config``.
            stream: Its id, 16 hex digits.
        """
        found = [
            one
            for one in self._all_streams()
            if store in ("", one.store, self.stores[one.store])
            and node in ("", one.node)
            and job in ("", one.job)
            and tag in ("", one.tag)
            and stream in ("", one.stream)
        ]
        return sorted(found, key=lambda one: one.t_open_ns)

    def read(
        self,
        *,
        store: str = "",
        node: str = "",
        job: str = "",
        tag: str = "",
        stream: str = "",
        start: str | datetime | int | None = None,
        end: str | datetime | int | None = None,
        time_column: str = "",
    ) -> pa.Table:
        """Return the rows of streams, in the order in which they were stored.

        Without ``store``, of several that have them one that keeps types is taken.

        Args:
            start: First time that is wanted: ISO 8601, UTC where it says no zone; a datetime; or UTC ns.
            end: First time that is no longer wanted.
            time_column: What ``start`` and ``end`` speak of; without it, the first column of timestamps.

        Raises:
            StoreError: There is no such stream; rows of other streams lie among its own and cannot be told
                apart; the columns of the streams do not fit together; or the data is damaged.
        """
        chosen = self._choose(
            self.streams(store=store, node=node, job=job, tag=tag, stream=stream),
            f"store={store!r}, node={node!r}, job={job!r}, tag={tag!r}, stream={stream!r}",
        )
        reader = self._stored.readers[chosen[0].store][1]
        wanted = {int(one.stream, 16) for one in chosen}
        tables = []
        for part in reader.parts(wanted):
            others = sorted(set(part.streams) - wanted)
            if others:
                named = ", ".join(f"{other:016x}" for other in others)
                message = (
                    f"rows of stream {named} lie among these and cannot be told apart: read them together"
                )
                raise StoreError(message)
            tables.append(part.table)
        if not tables:
            return pa.table({})
        try:
            table = pa.concat_tables(_widened(tables), promote_options="permissive")
        except pa.ArrowException as e:
            message = f"the columns of these streams do not fit together, read them one by one: {e}"
            raise StoreError(message) from e
        return table if start is None and end is None else _between(table, start, end, time_column)

    def marks(
        self, *, store: str = "", node: str = "", job: str = "", kind: str = "", stream: str = ""
    ) -> pa.Table:
        """Return the marks of streams: gaps, unknown ends, run boundaries; see ``docs/stores.md``."""
        rows = [
            {**mark, "store": name}
            for name, (key, reader) in self._stored.readers.items()
            if store in ("", name, key)
            for mark in reader.marks()
            if node in ("", mark["node"])
            and job in ("", mark["job"])
            and kind in ("", mark["kind"])
            and stream in ("", mark["stream"])
        ]
        names = ["store", *MARKS_HEADER.decode().strip().split(",")]
        columns: dict[str, Any] = {
            name: pa.array([row.get(name) for row in rows], pa.string()) for name in names
        }
        for name in ("first_seq", "last_seq", "rows"):
            texts = [text or None for text in columns[name].to_pylist()]
            columns[name] = pa.array(texts, pa.string()).cast(pa.int64())
        times = [text or None for text in columns["time"].to_pylist()]
        columns["time"] = pa.array(times, pa.string()).cast(pa.timestamp("ns", tz="UTC"))
        return pa.table(columns)

    def _all_streams(self) -> Iterator[StoredStream]:
        for name, (_, reader) in self._stored.readers.items():
            table = reader.table
            for account in [*table.tombstones.values(), *table.streams.values()]:
                try:
                    info = decode_open(decode(memoryview(account.open_raw)))
                except WireError:
                    continue
                yield StoredStream(
                    name,
                    info.node,
                    info.job,
                    info.life,
                    f"{account.stream:016x}",
                    info.tag,
                    info.form,
                    account.rows,
                    account.gap_rows,
                    account.closed,
                    info.t_open_ns,
                    info,
                )

    def _choose(self, found: list[StoredStream], asked: str) -> list[StoredStream]:
        """Return the streams of one store.

        Raises:
            StoreError: There are none.
        """
        if not found:
            known = sorted({f"{one.node}/{one.job}" for one in self._all_streams()})
            jobs = {one.job for one in self._all_streams()}
            hint = nearest(asked.partition("job='")[2].partition("'")[0], jobs)
            message = f"no stream is stored of {asked}{hint}; there are {', '.join(known) or 'none'}"
            raise StoreError(message)
        keys = {one.store: self.stores[one.store] for one in found}
        best = min(keys, key=lambda name: (_rank(keys[name], _FIRST_CHOICE), name))
        return [one for one in found if one.store == best]


def _widened(tables: list[pa.Table]) -> list[pa.Table]:
    """Return tables whose columns are text where that of some table is: it became so while the job ran."""
    kinds: dict[str, set[Any]] = {}
    for table in tables:
        for field in table.schema:
            kinds.setdefault(field.name, set()).add(field.type)
    texts = {name for name, held in kinds.items() if len(held) > 1 and pa.string() in held}
    if not texts:
        return tables
    found = []
    for table in tables:
        fields = [pa.field(f.name, pa.string()) if f.name in texts else f for f in table.schema]
        found.append(table.cast(pa.schema(fields)))
    return found


def _rank(key: str, order: Collection[str]) -> int:
    return list(order).index(key) if key in order else len(order)


def _between(
    table: pa.Table, start: str | datetime | int | None, end: str | datetime | int | None, name: str
) -> pa.Table:
    if not name:
        timed = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
        if not timed:
            message = f"there is no column of timestamps, name one by time_column, of {table.column_names}"
            raise StoreError(message)
        name = timed[0]
    if name not in table.column_names:
        message = f"time_column must be one of {table.column_names}, got {name!r}"
        raise StoreError(message)
    column: Any = table.column(name)
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ns", tz="UTC")).cast(pa.int64())
    is_wanted: Any = pc.is_valid(column)
    if start is not None:
        is_wanted = pc.and_(is_wanted, pc.greater_equal(column, pa.scalar(_utc_ns(start))))
    if end is not None:
        is_wanted = pc.and_(is_wanted, pc.less(column, pa.scalar(_utc_ns(end))))
    return table.filter(is_wanted)


def _utc_ns(moment: str | datetime | int) -> int:
    """Return UTC ns of a moment.

    Raises:
        StoreError: It is none.
    """
    if isinstance(moment, int):
        return moment
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError as e:
            message = f"a time must be ISO 8601, e.g. 2026-05-01T12:00:00Z, got {moment!r}"
            raise StoreError(message) from e
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _NS_PER_S + since.microseconds * 1000
