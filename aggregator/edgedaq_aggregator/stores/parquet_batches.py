"""Frames to record batches as Parquet takes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from edgedaq.errors import WireError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.tables import TableDecoder

__all__ = ["BatchEncoder"]

_PLAIN = (pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.binary())


class BatchEncoder:
    """Turns the frames of one stream into batches that Parquet can hold."""

    def __init__(self, info: OpenInfo) -> None:
        self._decoder = TableDecoder(info)

    def encode(self, frames: Sequence[Frame]) -> list[pa.RecordBatch]:
        """Return the rows of frames in order; of RAW pieces, all of their message are there.

        Raises:
            WireError: A body is not what OPEN says, or Parquet has no form for it.
        """
        batches = [batch.replace_schema_metadata() for batch in self._decoder.batches(frames)]
        for batch in batches:
            if not all(map(_is_plain, batch.schema.types)):
                _try(batch)
        # A lone column may be a view of what was read from the journal, which would stay in memory with it.
        return [b.take(pa.array(range(len(b)))) if b.num_columns == 1 else b for b in batches]


def _is_plain(kind: Any) -> bool:
    """Tell whether Parquet holds every value of a type."""
    types = pa.types
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_timestamp(kind):
        return bool(kind.unit == "ns")
    return kind in _PLAIN or types.is_integer(kind)


def _try(batch: pa.RecordBatch) -> None:
    """Write a batch to nowhere: better that it fails here, where it is refused, than in its part.

    Raises:
        WireError: It fails.
    """
    try:
        pq.write_table(pa.Table.from_batches([batch]), io.BytesIO(), version="2.6")
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as e:
        message = f"Parquet has no form for it: {e}"
        raise WireError(message) from e
