"""The job: what a user derives from, one class per device, operator or store.

::

    class MyJob(DAQJob):
        config_type = MyJobConfig
        config: MyJobConfig

        def start(self) -> None:
            while True:
                self.put_rows([[time.time(), read()]], ["timestamp", "value"])
                self.sleep(self.config.interval_seconds)

``start`` runs in the main thread of a process of its own. What a ``put_...`` has returned for survives that
process. A put waits while the job's ring is full; with ``timeout_s`` it raises ``PutTimeout`` instead, and
nothing is recorded of what it had not taken by then (``accepted`` says how much it had).

Columns that are not declared by a ``schema`` are those of the first rows: int64 while every value is an int,
else float64, text, bytes, lists. What does not fit later is not refused: its column is widened from there on.

A job is stopped by ``JobStopped``, raised in its main thread: out of ``sleep``, out of a put that waits or
is about to write, or out of the job's own code wherever it is, never in the midst of a put. It is raised
once; ``finally`` and ``with`` clean up as usual, and may still put.

Puts may come from other threads too. Those of the main thread are in order, and those of all other threads
among each other; data that both kinds put under the same name are two streams. A put is refused within a put
(by a handler of a signal), in a process that the job forked off, and after ``start`` has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from edgedaq.clock import mono_ns
from edgedaq.config import DAQJobConfig, InputOptions
from edgedaq.errors import DeviceError, JobError
from edgedaq.job_context import JobContext, JobStopped
from edgedaq.job_puts import JobPuts
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.messages import (
    DAQJobMessage,
    DAQJobMessageEvent,
    DAQJobMessageGap,
    DAQJobMessageStorePyArrow,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
)
from edgedaq.schema import Schema
from edgedaq.store_config import DAQJobStoreConfig
from edgedaq.table_rows import columns_to_rows

__all__ = ["DAQJob", "JobStopped"]

_RESET_LIMIT_S = 30.0


class DAQJob:
    """One job; lives as long as its process.

    Attributes:
        config_type: Type of its TOML, derived from ``DAQJobConfig``.
        topics_to_subscribe: What the default ``start`` hands to ``handle_message`` of the other jobs on this
            host, and in the control room of all nodes, from the journal; ``"store"`` covers
            ``store.DAQJobStoreCSV``. Without loss, unless ``[input]`` in its TOML lets it rather miss
            something than hold jobs up; ``handle_gap`` is told what does not come.
        live_topics: What it is handed as far as it keeps up, of the other jobs on this host: for plots and
            monitors. ``"job.hv"`` covers all that job ``hv`` puts.
        takes_views: ``handle_message`` is handed large raw data as read-only views of shared memory, not as
            bytes. What it keeps of them makes the producer wait once its ring is full.
        stops_itself: It watches ``stop_fd`` or ``is_stopping`` and ends by itself; nothing is raised.
        stop_fd: Readable once the job is to end.
    """

    config_type: ClassVar[type[DAQJobConfig]] = DAQJobConfig
    topics_to_subscribe: Sequence[str] = ()
    live_topics: Sequence[str] = ()
    takes_views: ClassVar[bool] = False
    stops_itself: ClassVar[bool] = False

    config: Any

    def __init__(self, config: Any, context: JobContext) -> None:
        self.config = config
        self.context = context
        context.stops_itself = self.stops_itself
        self.logger = get_logger()
        self.stop_fd = context.stop_fd
        self._stop_requested = context.stop_requested
        self._owed = ""
        self._gap_limit = LogLimit()
        self._puts = JobPuts(context, getattr(config, "store_config", None))

    # What a job overrides.

    def start(self) -> None:
        """Do the job's work; the process ends when it returns.

        The default hands what ``topics_to_subscribe`` and ``live_topics`` cover to ``handle_message``, until
        it is stopped.

        Raises:
            JobError: The class has neither a ``start`` nor any of these.
        """
        options: InputOptions = getattr(self.config, "input", None) or InputOptions()
        topics = self.topics_to_subscribe if options.topics is None else options.topics
        if not topics and not self.live_topics:
            message = (
                f"job {self.daq_job_unique_id}: {type(self).__name__} needs start(), topics_to_subscribe or "
                "live_topics"
            )
            raise JobError(message)
        from edgedaq.job_input import consume  # noqa: PLC0415  # who takes nothing needs no sockets

        consume(self, tuple(topics), options)

    def handle_message(self, message: DAQJobMessage) -> None:
        """Take one message; when it returns, the producer may forget it.

        After a crash of this job, messages that it had taken shortly before may come again: ``source`` tells
        (stream, seq). What came as a live topic says so: ``is_live``.
        """
        text = (
            f"job {self.daq_job_unique_id}: {type(self).__name__} needs handle_message() for {message!r:.80}"
        )
        raise JobError(text)

    def handle_gap(self, gap: DAQJobMessageGap) -> None:
        """Take note of messages that do not come: missed by this job, or lost before they came to it.

        It is called before the message that follows. The default logs it and, where the job puts data of its
        own, writes it down in the stream that was put to last, as a loss of nobody knows how much. An
        operator that knows what ``gap.rows`` mean for its output overrides this and calls ``report_loss``.
        """
        source = gap.source
        where = f"{source.node}/{source.job}" if source is not None else ""
        count = self._gap_limit.note(mono_ns())
        if count:
            self.logger.warning(
                "input.missed", source=where, rows=gap.rows, reason=gap.reason, gaps_count=count
            )
        rows = "unknown" if gap.rows is None else gap.rows
        self._owed = f"input of {where}: {rows} rows: {gap.reason}"
        self.write_down_missed()

    def write_down_missed(self) -> None:
        """Write down what ``handle_gap`` was told of, once something was put; called after each message."""
        if self._owed and self._puts.has_put:
            self._puts.report_loss(None, self._owed)
            self._owed = ""

    def reset_device(self) -> None:
        """Reset a device that is stuck, e.g. by switching its power; by default run ``reset_command``.

        Called where ``start`` hangs, by another thread beside it, and first in a life after one that failed.

        Raises:
            DeviceError: It cannot be reset.
        """
        command = list(self.config.reset_command)
        if not command:
            return
        import subprocess  # noqa: PLC0415  # rarely needed

        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=_RESET_LIMIT_S)
        except (OSError, subprocess.SubprocessError) as e:
            raise DeviceError(f"job {self.daq_job_unique_id}: reset_command {command} failed: {e}") from e

    def on_link_message(self, message: Mapping[str, Any]) -> None:
        """Take a message of the supervisor; called by the service thread, so be quick and share with care."""

    def report(self) -> dict[str, Any]:
        """Return facts beside the usual counts, plain data; called once a second by the service thread."""
        return {}

    # What a job calls.

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
        """Put rows of a table.

        Args:
            keys: Names of the columns; with a ``schema`` they may be left out.
            store_config: Where to store it; by default what the job's TOML says.
            tag: Tells streams of one job apart that are otherwise alike.
            topics: Beside those of the stores.

        Raises:
            JobError: A row has another number of values than the table has columns, or nothing says where
                the data is to go.
            PutTimeout: The ring was full for ``timeout_s``.
        """
        self._puts.put_rows(
            rows, keys, store_config=store_config, tag=tag, topics=topics, schema=schema, timeout_s=timeout_s
        )

    def put_table(
        self,
        table: Any,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        schema: Schema | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Put a table: columns by name, a structured numpy array, or a pyarrow Table or RecordBatch.

        Raises like ``put_rows``. Arrow data keeps its own types; its dictionary columns become plain ones.
        """
        where: dict[str, Any] = {
            "store_config": store_config,
            "tag": tag,
            "topics": topics,
            "timeout_s": timeout_s,
        }
        if hasattr(table, "num_rows"):
            self._puts.put_arrow(table, **where)
            return
        columns, names = _columns_of(table)
        if schema is not None:
            names = schema.names
        self._puts.put_rows(columns_to_rows(names, columns), names, schema=schema, **where)

    def put_raw(
        self,
        data: Any,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        """Put one message: bytes or anything with contiguous memory, of any size. Raises like ``put_rows``.

        The memory may be used again when it returns.
        """
        self._puts.put_raw(data, store_config=store_config, tag=tag, topics=topics, timeout_s=timeout_s)

    def open_table(
        self,
        schema: Schema,
        *,
        store_config: DAQJobStoreConfig | None = None,
        tag: str = "",
        topics: Sequence[str] = (),
    ) -> Callable[[Sequence[Any]], None]:
        """Return what puts one row, ``put(row)``: for millions of rows per second that come one by one.

        It is the same stream as that of ``put_rows`` with these arguments, and waits and raises like it. Only
        for the main thread, and never for a handler of a signal.
        """
        return self._puts.open_table(schema, store_config=store_config, tag=tag, topics=topics)

    def open_raw(
        self, *, store_config: DAQJobStoreConfig | None = None, tag: str = "", topics: Sequence[str] = ()
    ) -> Callable[[Any], None]:
        """Return what puts one message, ``put(data)``; like ``open_table``."""
        return self._puts.open_raw(store_config=store_config, tag=tag, topics=topics)

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
        """Put one event: a map of plain data, and a payload. Raises like ``put_rows``."""
        self._puts.put_event(
            metadata, data, store_config=store_config, tag=tag, topics=topics, timeout_s=timeout_s
        )

    def report_loss(self, count: int | None, reason: str, *, tag: str | None = None) -> None:
        """Write down that rows or messages were lost before they could be put, e.g. by an overrun.

        It is stored as a gap in the stream that was put to last, or last with that ``tag``.

        Args:
            count: None when nobody knows.

        Raises:
            JobError: Nothing was put to such a stream yet.
        """
        self._puts.report_loss(count, reason, tag=tag)

    def sleep(self, seconds: float) -> None:
        """Wait, and let it be seen that the job is alive.

        Raises:
            JobStopped: The job is to end; at once, however long the wait. With ``stops_itself`` it returns
                early instead.
        """
        self.context.sleep(seconds)

    def beat(self) -> None:
        """Let it be seen that the job is alive, where it neither puts nor sleeps for long."""
        self.context.beats += 1

    def _put_message_out(self, message: DAQJobMessage, timeout_s: float | None = None) -> None:
        """Put a message; raises like ``put_rows``."""
        where: dict[str, Any] = {
            "store_config": message.store_config,
            "tag": message.tag,
            "topics": message.topics,
            "timeout_s": timeout_s,
        }
        match message:
            case DAQJobMessageStoreTabular(data_columns=None):
                self._puts.put_rows(message.data or (), message.keys, schema=message.schema, **where)
            case DAQJobMessageStoreTabular(data=None, data_columns=columns):
                rows = columns_to_rows(message.keys, columns or {})
                self._puts.put_rows(rows, message.keys, schema=message.schema, **where)
            case DAQJobMessageStorePyArrow():
                self.put_table(message.table, **where)
            case DAQJobMessageStoreRaw():
                self._puts.put_raw(message.data, **where)
            case DAQJobMessageEvent():
                self._puts.put_event(message.metadata, message.data, **where)
            case _:
                text = (
                    f"job {self.daq_job_unique_id}: a message must be one of edgedaq's, with either data or "
                    f"data_columns, got {message!r:.200}"
                )
                raise JobError(text)

    def send_to_supervisor(self, message: dict[str, Any]) -> bool:
        """Send plain data with a ``type`` to the supervisor; False if it did not take it. Never blocks."""
        return self.context.send(message)

    # What a job knows.

    @property
    def daq_job_unique_id(self) -> str:
        """Name of this job on its node."""
        return self.context.spec.unique_id

    @property
    def node(self) -> str:
        """The supervisor's id."""
        return self.context.spec.node

    @property
    def life(self) -> str:
        """This process's life, 16 hex digits."""
        return self.context.life

    @property
    def runtime_dir(self) -> Path:
        """Directory of sockets and rings, gone after a reboot."""
        return Path(self.context.spec.runtime_dir)

    @property
    def rings_dir(self) -> Path:
        """Directory of the rings."""
        return self.context.rings_dir

    @property
    def state_dir(self) -> Path:
        """Directory for what must survive."""
        return Path(self.context.spec.state_dir)

    @property
    def out_dir(self) -> Path:
        """Directory of stored data."""
        return Path(self.context.spec.out_dir)

    @property
    def is_stopping(self) -> bool:
        """The job is to end."""
        return self._stop_requested.is_set()


def _columns_of(table: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    if isinstance(table, Mapping):
        return table, tuple(table)
    names = getattr(getattr(table, "dtype", None), "names", None)
    if names:
        return {name: table[name] for name in names}, tuple(names)
    message = (
        "a table must be columns by name, a structured numpy array, or a pyarrow Table or RecordBatch, "
        f"got {type(table).__name__}"
    )
    raise JobError(message)
