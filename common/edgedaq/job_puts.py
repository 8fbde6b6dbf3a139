"""From what a job says when it puts (keys, store, tag, topics) to the writer of that stream.

Looking up a writer must cost little beside a put of one row, so objects that come again are known by identity
first, and by value only when they are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

from edgedaq.errors import JobError
from edgedaq.job_context import JobContext
from edgedaq.names import check_topic
from edgedaq.schema import Schema
from edgedaq.store_config import DAQJobStoreConfig
from edgedaq.table_rows import check_row

if TYPE_CHECKING:
    from edgedaq.raw_writer import RawWriter
    from edgedaq.stream_writer import StreamWriter
    from edgedaq.table_writer import TableWriter

__all__ = ["JobPuts"]

_KNOWN_MAX = 512


class JobPuts:
    """All puts of one job.

    Args:
        store_config: Where data goes for which the put names no store.
    """

    def __init__(self, context: JobContext, store_config: Any) -> None:
        self._context = context
        self._default = store_config if isinstance(store_config, DAQJobStoreConfig) else None
        self._main = get_ident()
        self._is_putting = False
        # Each entry keeps the objects alive by whose identity it is found.
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._inferred: dict[tuple[Any, ...], Schema] = {}
        # By whether the main thread put: a writer belongs to one kind of thread.
        self._last: list[StreamWriter | None] = [None, None]

    def put_rows(
        self,
        rows: Sequence[Sequence[Any]],
        keys: Sequence[str] | None = None,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        schema: Schema | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """See ``DAQJob.put_rows``."""
        names = keys if type(keys) is tuple else () if keys is None else tuple(keys)
        is_main = get_ident() == self._main
        key = (is_main, id(schema), names, id(store_config), tag, tuple(topics))
        known = self._known.get(key)
        writer = known[0] if known is not None else self._new_table(key, rows, schema, store_config)
        if writer is None:
            return
        self._last[is_main] = writer
        if not is_main or self._is_putting:
            with self._lane(is_main):
                writer.put_rows(rows, timeout_s)
            return
        self._is_putting = True
        try:
            writer.put_rows(rows, timeout_s)
        finally:
            self._is_putting = False

    def open_table(
        self,
        schema: Schema,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
    ) -> Callable[[Sequence[Any]], None]:
        """See ``DAQJob.open_table``."""
        self._check_main()
        writer = self._context.outlet().table(schema, **self._where(store_config, tag, topics))
        self._last[True] = writer
        return writer.put

    def open_raw(
        self, *, store_config: DAQJobStoreConfig | None = None, tag: str = "", topics: Sequence[str] = ()
    ) -> Callable[[Any], None]:
        """See ``DAQJob.open_raw``."""
        self._check_main()
        writer = self._context.outlet().raw(**self._where(store_config, tag, topics))
        self._last[True] = writer
        return writer.put

    def put_arrow(
        self,
        table: Any,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        """Put a pyarrow Table or RecordBatch; see ``DAQJob.put_table``."""
        batches, schema = _plain_batches(table)
        is_main = get_ident() == self._main
        with self._lane(is_main):
            writer = self._context.outlet().arrow(schema, **self._where(store_config, tag, topics))
            self._last[is_main] = writer
            for batch in batches:
                writer.put_batch(batch, timeout_s)

    def put_raw(
        self,
        data: Any,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        """See ``DAQJob.put_raw``."""
        is_main = get_ident() == self._main
        key = (is_main, id(store_config), tag, tuple(topics))
        known = self._known.get(key)
        writer = known[0] if known is not None else self._new_raw(key, store_config)
        self._last[is_main] = writer
        if not is_main or self._is_putting:
            with self._lane(is_main):
                writer.put_within(data, timeout_s)
            return
        self._is_putting = True
        try:
            if timeout_s is None:
                writer.put(data)
            else:
                writer.put_within(data, timeout_s)
        finally:
            self._is_putting = False

    def put_event(
        self,
        metadata: Mapping[str, Any],
        data: Any = b"",
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        """See ``DAQJob.put_event``."""
        is_main = get_ident() == self._main
        with self._lane(is_main):
            writer = self._context.outlet().event(**self._where(store_config, tag, topics))
            self._last[is_main] = writer
            writer.put(metadata, data, timeout_s)

    @property
    def has_put(self) -> bool:
        """The main thread has put something."""
        return self._last[True] is not None

    def report_loss(self, count: int | None, reason: str, *, tag: str | None = None) -> None:
        """See ``DAQJob.report_loss``."""
        is_main = get_ident() == self._main
        writer = self._last[is_main]
        if tag is not None or writer is None:
            found = [
                entry[0]
                for key, entry in list(self._known.items())
                if key[0] == is_main and tag in (None, entry[0].info.tag)
            ]
            writer = found[-1] if found else None
        if writer is None:
            named = "" if tag is None else f" with tag {tag!r}"
            message = (
                f"job {self._context.spec.unique_id}: a loss must follow a put to the stream that it is in, "
                f"nothing{named} was put"
            )
            raise JobError(message)
        with self._lane(is_main):
            self._context.outlet().report_loss(writer, count, reason)

    def _check_main(self) -> None:
        if get_ident() != self._main:
            message = f"job {self._context.spec.unique_id}: only its main thread can open a stream for itself"
            raise JobError(message)

    @contextmanager
    def _lane(self, is_main: bool) -> Iterator[None]:  # noqa: FBT001
        """Be where a put must be; the main thread's place is never waited for: only itself can be there."""
        if not is_main:
            with self._context.outlet().side():
                yield
            return
        if self._is_putting:
            message = (
                f"job {self._context.spec.unique_id}: a put within a put, e.g. by a handler of a signal: "
                "let it leave a note, and put from the main loop"
            )
            raise JobError(message)
        self._is_putting = True
        try:
            yield
        finally:
            self._is_putting = False

    def _new_table(
        self, key: tuple[Any, ...], rows: Sequence[Sequence[Any]], schema: Schema | None, store_config: Any
    ) -> TableWriter | None:
        """Return the writer of a stream that was not put to yet; None when there is nothing to put."""
        if not len(rows):
            return None
        is_main, _, names, _, tag, topics = key
        for row in rows:
            check_row(self._context.spec.unique_id, row)
        where = self._where(store_config, tag, topics)
        schema_now = schema or self._infer(names, rows, (is_main, tag, topics, store_config))
        if names and names != schema_now.names:
            message = (
                f"job {self._context.spec.unique_id}: keys must be the names of the schema "
                f"({', '.join(schema_now.names)}), got {', '.join(names)}"
            )
            raise JobError(message)
        with self._lane(is_main):
            writer = self._context.outlet().table(schema_now, **where)
        self._learn(key, (writer, schema, store_config))
        return writer

    def _new_raw(self, key: tuple[Any, ...], store_config: Any) -> RawWriter:
        is_main, _, tag, topics = key
        with self._lane(is_main):
            writer = self._context.outlet().raw(**self._where(store_config, tag, topics))
        self._learn(key, (writer, store_config))
        return writer

    def _learn(self, key: tuple[Any, ...], entry: tuple[Any, ...]) -> None:
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[key] = entry

    def _infer(self, names: tuple[str, ...], rows: Sequence[Sequence[Any]], key: tuple[Any, ...]) -> Schema:
        """Return the schema that the first rows under these names had."""
        if not names or not all(isinstance(name, str) for name in names):
            message = f"job {self._context.spec.unique_id}: rows need keys or a schema, got {names!r:.100}"
            raise JobError(message)
        schema = self._inferred.get((names, *key))
        if schema is None:
            schema = self._inferred[names, *key] = Schema.infer(names, rows)
        return schema

    def _where(
        self, store_config: DAQJobStoreConfig | None, tag: str, topics: Sequence[str]
    ) -> dict[str, Any]:
        """Return topics, tag and store options of a put, checked."""
        job = self._context.spec.unique_id
        config = store_config if store_config is not None else self._default
        if config is not None and not isinstance(config, DAQJobStoreConfig):
            message = f"job {job}: store_config must be a DAQJobStoreConfig, got {type(config).__name__}"
            raise JobError(message)
        named = [topics] if isinstance(topics, str) else list(topics)
        for topic in config.topics() if config is not None else ():
            if topic not in named:
                named.append(topic)
        if not named:
            message = (
                f"job {job}: a put must name a topic or a store, in the put or in its TOML's store_config"
            )
            raise JobError(message)
        for topic in named:
            check_topic(topic)
        if len(tag.encode()) > 256 or not tag.isprintable():
            message = f"job {job}: a tag must be printable text of at most 256 bytes, got {tag!r}"
            raise JobError(message)
        return {"topics": named, "tag": tag, "store_config": config.to_map() if config is not None else {}}


def _plain_batches(table: Any) -> tuple[list[Any], bytes]:
    """Return the record batches of a table without dictionary columns, and its schema as a message."""
    import pyarrow as pa  # noqa: PLC0415  # who hands one in has it

    if not isinstance(table, pa.Table):
        table = pa.Table.from_batches([table])
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    schema = pa.schema(fields)
    if schema != table.schema:
        table = table.cast(schema)
    table = table.replace_schema_metadata(None)
    return table.to_batches(), bytes(table.schema.serialize())
