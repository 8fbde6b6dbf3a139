"""A device job that witnesses what ``put`` returned for, so that a ``kill -9`` cannot blur the obligation.

After each put has returned, the number of rows put so far is written with ``pwrite`` into
``<witness_dir>/<job>.<life>.witness``: the page cache outlives the process.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from pathlib import Path

from edgedaq import DAQJob, StorableDAQJobConfig

from tests.system.payload import COLUMNS, message_of, row_of


class WitnessConfig(StorableDAQJobConfig, kw_only=True):
    """``form`` is "table" or "raw"; a rate of 0 puts as fast as it goes; a limit of 0 never ends."""

    witness_dir: str
    form: str = "table"
    rate_hz: float = 0.0
    batch_count: int = 1
    payload_bytes: int = 1024
    limit_count: int = 0


class DAQJobWitness(DAQJob):
    """Puts rows or messages that follow from (life, sequence)."""

    config_type = WitnessConfig
    config: WitnessConfig

    def start(self) -> None:
        config = self.config
        life = secrets.randbits(63)
        path = Path(config.witness_dir) / f"{self.daq_job_unique_id}.{life:016x}.witness"
        witness = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        begun_s = time.monotonic()
        sequence = 0
        while not config.limit_count or sequence < config.limit_count:
            following = sequence + config.batch_count
            if config.form == "raw":
                for number in range(sequence, following):
                    message = message_of(life, number, config.payload_bytes)
                    self.put_raw(message, store_config=config.store_config)
            else:
                rows = [row_of(life, number) for number in range(sequence, following)]
                self.put_rows(rows, COLUMNS, store_config=config.store_config)
            sequence = following
            os.pwrite(witness, struct.pack("<Q", sequence), 0)
            if config.rate_hz:
                ahead_s = begun_s + sequence / config.rate_hz - time.monotonic()
                if ahead_s > 0:
                    self.sleep(ahead_s)
        while True:
            self.sleep(3600.0)
