"""The writer of tables of pyarrow record batches: they are written in place, into the ring itself.

Arrow writes a batch behind a message with its schema, which is in OPEN already. So one stream of Arrow's is
kept per writer, whose begin goes nowhere; from then on what it writes goes where the next frame's body lies.
"""

from __future__ import annotations

from typing import Any

from edgedaq.errors import JobError
from edgedaq.frame import Kind
from edgedaq.open_frames import FRAME_TARGET_BYTES, Body
from edgedaq.stream_writer import StreamWriter

__all__ = ["ArrowWriter"]


class ArrowWriter(StreamWriter):
    """One stream of pyarrow record batches."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._in_place: _InPlace | None = None

    def put_batch(self, batch: Any, timeout_s: float | None = None) -> None:
        """Put a ``pyarrow.RecordBatch`` of this stream's schema, split by rows into frames.

        Raises:
            JobError: One row is larger than a frame may be.
            PutTimeout: There was no room in time; it says how many rows were taken.
        """
        self.gate.interrupt()
        if not batch.num_rows:
            return
        if self._in_place is None:
            self._in_place = _InPlace(batch.slice(0, 0))
        step = max(1, int(batch.num_rows * FRAME_TARGET_BYTES // max(batch.nbytes, 1)))
        with self.limit(timeout_s):
            for at in range(0, batch.num_rows, step):
                self._put_slice(self._in_place, batch.slice(at, step))

    def _put_slice(self, in_place: _InPlace, batch: Any) -> None:
        part = _BatchPart(in_place, batch)
        size, rows = len(part), batch.num_rows
        if size <= min(self.sealer.limit, 2 * FRAME_TARGET_BYTES) or rows == 1:
            if size > self.sealer.limit:
                message = f"one row must have at most {self.sealer.limit} bytes, got {size}"
                raise JobError(message)
            self.append([Body(Kind.ARROW, (part,), rows)])
            return
        self._put_slice(in_place, batch.slice(0, rows // 2))
        self._put_slice(in_place, batch.slice(rows // 2))


class _Sink:
    """A file as Arrow wants it, that lies in memory; until there is some, what is written goes nowhere."""

    closed = False

    def __init__(self) -> None:
        self.data: memoryview | None = None
        self.at = 0

    def write(self, part: Any) -> int:
        """Take bytes or an Arrow buffer, which is not copied before it comes here."""
        size = len(part)
        if self.data is not None:
            self.data[self.at : self.at + size] = memoryview(part).cast("B")
        self.at += size
        return size

    def tell(self) -> int:
        """Return where the next bytes go."""
        return self.at

    def flush(self) -> None:
        """Do nothing: it is written."""


class _InPlace:
    """One stream of Arrow's, begun with a batch of no rows, whose batches go into a ring's data area."""

    def __init__(self, nothing: Any) -> None:
        import pyarrow as pa  # noqa: PLC0415  # who puts a batch has it

        self.size_of = pa.ipc.get_record_batch_size
        self._sink = _Sink()
        target: Any = self._sink
        self._writer = pa.ipc.new_stream(target, nothing.schema)
        self._writer.write_batch(nothing)

    def write(self, batch: Any, data: memoryview, at: int) -> None:
        """Write a batch at an offset."""
        self._sink.data, self._sink.at = data, at
        self._writer.write_batch(batch)
        self._sink.data = None


class _BatchPart:
    """A batch as a part of a body: its size, and how it is written."""

    def __init__(self, in_place: _InPlace, batch: Any) -> None:
        self._in_place = in_place
        self._batch = batch
        self._size = int(in_place.size_of(batch))

    def __len__(self) -> int:
        return self._size

    def write_into(self, data: memoryview, at: int) -> None:
        """Write the batch at an offset of the ring's data area."""
        self._in_place.write(self._batch, data, at)
