"""Random integers at a steady pace, numbered: what shows whether every row arrived.

Columns: ``timestamp`` (UTC), ``sequence`` (0, 1, 2, ... from the start of this life of the job, so that a
hole or a repetition is seen in the stored file), and ``A``, ``B``, ``C``, each uniform in ``rand_min`` to
``rand_max``, both included.
"""

from __future__ import annotations

import itertools
import random
import time

from edgedaq.clock import utc_ns
from edgedaq.config import Seconds, StorableDAQJobConfig
from edgedaq.errors import ConfigError
from edgedaq.job import DAQJob
from edgedaq.schema import Column, Schema

__all__ = ["COLUMNS", "SCHEMA", "DAQJobTest", "DAQJobTestConfig", "row_of"]

SCHEMA = Schema(
    (
        Column("timestamp", "timestamp"),
        Column("sequence", "i8"),
        Column("A", "i8"),
        Column("B", "i8"),
        Column("C", "i8"),
    )
)
COLUMNS = SCHEMA.names


class DAQJobTestConfig(StorableDAQJobConfig, kw_only=True):
    """``interval_seconds`` lies between two rows; 0 puts as fast as it can."""

    rand_min: int
    rand_max: int
    interval_seconds: Seconds = 1.0

    def __post_init__(self) -> None:
        """Refuse an empty range and a negative pace."""
        if self.rand_min > self.rand_max:
            message = f"rand_max must be at least rand_min, which is {self.rand_min}, got {self.rand_max}"
            raise ConfigError(message)
        if self.interval_seconds < 0:
            message = f"interval_seconds must be 0 or more, got {self.interval_seconds}"
            raise ConfigError(message)


class DAQJobTest(DAQJob):
    """Puts a numbered row of random integers per interval."""

    config_type = DAQJobTestConfig
    config: DAQJobTestConfig

    def start(self) -> None:
        """Put rows until stopped. A late row does not move the ones after it."""
        config = self.config
        source = random.Random()  # noqa: S311 -- test data, nothing is protected by it
        due_s = time.monotonic()
        for sequence in itertools.count():
            row = row_of(source, utc_ns(), sequence, config.rand_min, config.rand_max)
            self.put_rows([row], COLUMNS, schema=SCHEMA)
            due_s = max(due_s + config.interval_seconds, time.monotonic() - 1.0)
            self.sleep(max(due_s - time.monotonic(), 0.0))


def row_of(source: random.Random, t_utc_ns: int, sequence: int, low: int, high: int) -> list[int]:
    """Return one row in the order of ``COLUMNS``."""
    return [
        t_utc_ns,
        sequence,
        source.randint(low, high),
        source.randint(low, high),
        source.randint(low, high),
    ]
