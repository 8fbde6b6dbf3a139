"""The benchmark job, held back until everything else runs, so that start-up is not measured."""

from __future__ import annotations

import time
from pathlib import Path

from edgedaq_agent.jobs.benchmark import COLUMNS, SCHEMA, DAQJobBenchmark, DAQJobBenchmarkConfig, rows_of


class WaitingConfig(DAQJobBenchmarkConfig, kw_only=True):
    """The job begins when ``go_path`` exists, and writes when that was into ``begun_path``."""

    go_path: str
    begun_path: str
    streams: int = 1


class WaitingBenchmark(DAQJobBenchmark):
    """Puts what ``DAQJobBenchmark`` puts, once it may."""

    config_type = WaitingConfig  # type: ignore[assignment]  # more required fields than its base
    config: WaitingConfig

    def start(self) -> None:
        """Wait, note the monotonic time, then put."""
        while not Path(self.config.go_path).exists():
            self.sleep(0.005)
        Path(self.config.begun_path).write_text(str(time.monotonic_ns()), encoding="ascii")
        if self.config.streams == 1:
            super().start()
            return
        for sequence in self._sequences():
            tag = str(sequence % self.config.streams)
            self.put_rows(rows_of(sequence, self.config.payload_size), COLUMNS, schema=SCHEMA, tag=tag)
