"""As much data as this machine can put, each byte of which can be checked in the stored file.

What message ``sequence`` (0, 1, 2, ... per life) holds is a pure function of ``sequence`` and
``payload_size``, so a verifier needs nothing but the stored file. By ``mode``:

``raw``
    ``payload_size`` bytes: ``sequence`` as little-endian u64, then a filler. There are ``filler_count``
    different fillers, built once and used in turn, so putting a message costs a stamp and a copy; a message
    that was torn, mixed with its neighbour, lost, repeated or moved is seen. ``raw_message`` builds one
    from scratch.
``rows``
    ``payload_size`` rows of the columns ``sequence, row, v0 .. v6`` put as Python rows; ``row_of`` builds
    one. All values are exact in float64.
``table``
    The same rows, put as one table of columns.

``rate_limit`` is in messages per second, 0 puts as fast as it goes. After ``messages`` messages (0: never)
the job ends by itself.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from edgedaq.config import StorableDAQJobConfig
from edgedaq.errors import ConfigError
from edgedaq.job import DAQJob
from edgedaq.schema import Column, Schema
from msgspec import Meta

__all__ = [
    "COLUMNS",
    "SCHEMA",
    "DAQJobBenchmark",
    "DAQJobBenchmarkConfig",
    "columns_of",
    "filler",
    "filler_count",
    "raw_message",
    "raw_messages",
    "row_of",
    "rows_of",
]

SCHEMA = Schema(
    (Column("sequence", "i8"), Column("row", "i8"), *(Column(f"v{index}", "f8") for index in range(7)))
)
COLUMNS = SCHEMA.names

_STAMP = struct.Struct("<Q")
_FILLERS_MAX = 64
_FILLERS_BYTES = 4 << 20
_BLOCK_BYTES = 4093  # a prime: what was moved by any power of two is seen
_PACE_S = 0.002


class DAQJobBenchmarkConfig(StorableDAQJobConfig, kw_only=True):
    """``payload_size``: rows per message, or bytes in mode ``raw``."""

    payload_size: Annotated[int, Meta(ge=1, le=1 << 30)] = 1000
    mode: Literal["rows", "raw", "table"] = "rows"
    rate_limit: Annotated[float, Meta(ge=0)] = 0.0
    messages: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse a raw message that has no room for its number."""
        if self.mode == "raw" and self.payload_size < _STAMP.size:
            message = f"payload_size must be at least {_STAMP.size} in mode 'raw', got {self.payload_size}"
            raise ConfigError(message)


class DAQJobBenchmark(DAQJob):
    """Puts numbered messages, as many and as fast as it is told to."""

    config_type = DAQJobBenchmarkConfig
    config: DAQJobBenchmarkConfig

    def start(self) -> None:
        """Put ``messages`` messages, or until stopped."""
        size = self.config.payload_size
        if self.config.mode == "raw":
            put = self.open_raw()
            for message in raw_messages(size, self._sequences()):
                put(message)
        elif self.config.mode == "table":
            for sequence in self._sequences():
                self.put_table(columns_of(sequence, size), schema=SCHEMA)
        else:
            for sequence in self._sequences():
                self.put_rows(rows_of(sequence, size), COLUMNS, schema=SCHEMA)

    def _sequences(self) -> Iterable[int]:
        """Return the numbers to put, each when it is due."""
        messages = self.config.messages
        numbers = range(messages) if messages else itertools.count()
        return self._paced(numbers) if self.config.rate_limit else numbers

    def _paced(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield numbers at ``rate_limit``, in bunches where a wait would be shorter than a sleep can be.

        After a time in which nothing could be put it catches up one second's worth, not all.
        """
        interval_s = 1 / self.config.rate_limit
        due_s = time.monotonic()
        for number in numbers:
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                self.sleep(max(wait_s, _PACE_S))
            yield number
            due_s = max(due_s + interval_s, time.monotonic() - 1.0)


def filler_count(payload_size: int) -> int:
    """Return how many different fillers raw messages of a size use in turn."""
    return min(max(_FILLERS_BYTES // payload_size, 2), _FILLERS_MAX)


def filler(index: int, payload_size: int) -> bytes:
    """Return what follows the number in messages with ``sequence % filler_count == index``."""
    count = payload_size - _STAMP.size
    length = min(count, _BLOCK_BYTES)
    block = bytes((index * 37 + position * 11 + (position >> 8) * 7) & 0xFF for position in range(length))
    return (block * (count // _BLOCK_BYTES + 1))[:count]


def raw_message(sequence: int, payload_size: int) -> bytes:
    """Return what ``raw`` puts as message ``sequence``."""
    return _STAMP.pack(sequence) + filler(sequence % filler_count(payload_size), payload_size)


def raw_messages(payload_size: int, sequences: Iterable[int]) -> Iterator[bytearray]:
    """Yield the messages of consecutive numbers from 0, fast: the buffers are used again and again."""
    stamp = _STAMP.pack_into
    buffers = [
        bytearray(_STAMP.size) + filler(index, payload_size) for index in range(filler_count(payload_size))
    ]
    for sequence, buffer in zip(sequences, itertools.cycle(buffers), strict=False):
        stamp(buffer, 0, sequence)
        yield buffer


def row_of(sequence: int, row: int) -> tuple[float, ...]:
    """Return row ``row`` of message ``sequence``, in the order of ``COLUMNS``."""
    base = sequence * 0.5 + row
    return (sequence, row, base, base + 0.25, base + 1.5, -base, base * 2, base * 0.125, 0.75)


def rows_of(sequence: int, payload_size: int) -> list[tuple[float, ...]]:
    """Return all rows of message ``sequence``."""
    return [row_of(sequence, row) for row in range(payload_size)]


def columns_of(sequence: int, payload_size: int) -> dict[str, list[float]]:
    """Return the rows of message ``sequence`` as columns."""
    return dict(zip(COLUMNS, map(list, zip(*rows_of(sequence, payload_size), strict=True)), strict=True))
