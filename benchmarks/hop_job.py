"""The producing side of ``ring_hop``: puts as fast as it can, and tells how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from edgedaq import Column, DAQJob, DAQJobConfig, Schema

TOPICS = ("bench",)
SCHEMA = Schema((Column("n", "i8"), *(Column(f"v{index}", "f8") for index in range(8))))
ROW = (1.5, -2.25, 3.125, 4.0, 5.5, -6.0, 7.75, 8.5)
_CHUNK = 1000
_WAIT_S = 30.0


class HopConfig(DAQJobConfig, kw_only=True):
    """What to put: for ``seconds``, once ``consumers`` are connected."""

    mode: Literal["raw", "open_raw", "row", "open_table", "rows", "arrow"] = "raw"
    payload_bytes: int = 128
    seconds: float = 1.0
    consumers: int = 0


class HopJob(DAQJob):
    """Puts numbered data; ``{"type": "measured", ...}`` goes to whoever supervises it."""

    config_type = HopConfig
    config: HopConfig

    def start(self) -> None:
        """Wait for the consumers, put, wait until all was taken."""
        outlet = self.context.outlet()
        put, records = self._put()
        put()
        self._until(lambda: self._connected() >= self.config.consumers)
        self._until(lambda: not outlet.queued_count)
        cpu_ns, begun_ns = time.process_time_ns(), time.monotonic_ns()
        end_ns = begun_ns + int(self.config.seconds * 1e9)
        puts = 0
        while time.monotonic_ns() < end_ns:
            put()
            puts += 1
        put_ns = time.monotonic_ns() - begun_ns
        self._until(lambda: not outlet.queued_count, step_s=0.0002)
        self.send_to_supervisor(
            {
                "type": "measured",
                "records": puts * records,
                "put_s": put_ns / 1e9,
                "hop_s": (time.monotonic_ns() - begun_ns) / 1e9,
                "cpu_s": (time.process_time_ns() - cpu_ns) / 1e9,
                "consumers": outlet.consumers(),
            }
        )

    def _connected(self) -> int:
        outlet = self.context.outlet()
        return sum(facts["is_connected"] for facts in outlet.consumers())

    def _put(self) -> tuple[Callable[[], None], int]:
        """Return what puts some records, and how many."""
        mode, size = self.config.mode, self.config.payload_bytes
        if mode == "arrow":
            batch = record_batch(size)
            return (lambda: self.put_table(batch, topics=TOPICS)), 1
        if mode == "rows":
            rows = [(n, *ROW) for n in range(100)]
            return (lambda: self.put_rows(rows, topics=TOPICS, schema=SCHEMA)), 100
        put: Callable[[Any], None]
        records: list[Any]
        if mode in ("raw", "open_raw"):
            put = self.open_raw(topics=TOPICS)
            if mode == "raw":
                put = partial(self.put_raw, topics=TOPICS)
            messages = list(fillers(size))
            records = [messages[n % len(messages)] for n in range(max(1, min(_CHUNK, (8 << 20) // size)))]
        else:
            put = self.open_table(SCHEMA, topics=TOPICS)
            records = [(n, *ROW) for n in range(_CHUNK)]
            if mode == "row":
                put, records = (
                    partial(self.put_rows, topics=TOPICS, schema=SCHEMA),
                    [[row] for row in records],
                )

        def put_all() -> None:
            for record in records:
                put(record)

        return put_all, len(records)

    def _until(self, condition: Callable[[], bool], *, step_s: float = 0.005) -> None:
        end_s = time.monotonic() + _WAIT_S
        while not condition():
            if time.monotonic() > end_s:
                message = f"waited {_WAIT_S} s in vain"
                raise TimeoutError(message)
            self.sleep(step_s)


def fillers(payload_bytes: int) -> Iterator[bytes]:
    """Yield messages that differ, together large enough to be no cache's."""
    for index in range(max(2, min(64, (4 << 20) // payload_bytes))):
        block = bytes((index * 37 + position * 11) & 0xFF for position in range(min(payload_bytes, 4093)))
        yield (block * (payload_bytes // len(block) + 1))[:payload_bytes]


def record_batch(payload_bytes: int) -> Any:
    """Return a batch of about that many bytes."""
    import pyarrow as pa  # noqa: PLC0415  # only this mode needs it

    rows = max(payload_bytes // 64, 1)
    columns = [pa.array([float(n % 977) for n in range(rows)]) for _ in range(8)]
    return pa.RecordBatch.from_arrays(columns, names=[f"v{index}" for index in range(8)])
