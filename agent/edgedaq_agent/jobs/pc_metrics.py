"""How the machine itself is doing: CPU, memory, disk, load, network, and temperatures where there are any.

The columns are fixed when the job starts: a sensor that this machine lacks is no column, and one that stops
answering later gives None (an empty field in CSV), never 0. All rates are per second since the row before.

======================== ====== ==========================================================================
column                   unit   meaning
======================== ====== ==========================================================================
timestamp                UTC    when the row was read
cpu_percent              %      busy share of all CPUs since the row before
load_1min                1      processes that run or wait, averaged over a minute
memory_used_percent      %      what programs cannot have
memory_available_mib     MiB    what programs can have without swapping
swap_used_percent        %      absent where there is no swap
disk_used_percent        %      of the file system of ``disk_path``
disk_free_mib            MiB    of the file system of ``disk_path``, for an ordinary user
disk_read_mib_per_s      MiB/s  all disks; absent where the kernel does not tell
disk_write_mib_per_s     MiB/s  all disks
network_in_mib_per_s     MiB/s  all interfaces
network_out_mib_per_s    MiB/s  all interfaces
temperature_<chip>_c     °C     hottest sensor of each chip; absent on machines without any
======================== ====== ==========================================================================
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from edgedaq.clock import utc_ns
from edgedaq.config import Seconds, StorableDAQJobConfig
from edgedaq.errors import ConfigError
from edgedaq.job import DAQJob
from edgedaq.schema import Column, Schema

__all__ = [
    "DAQJobPCMetrics",
    "DAQJobPCMetricsConfig",
    "Metric",
    "metrics_of",
    "per_second",
    "read_row",
    "schema_of",
]

_MIB = 1 << 20


class DAQJobPCMetricsConfig(StorableDAQJobConfig, kw_only=True):
    """``disk_path`` says which file system is watched."""

    interval_seconds: Seconds = 1.0
    disk_path: str = "/"

    def __post_init__(self) -> None:
        """Refuse a pace at which the CPU share means nothing."""
        if self.interval_seconds < 0.1:
            message = f"interval_seconds must be at least 0.1, got {self.interval_seconds}"
            raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class Metric:
    """One column and how it is read; ``read`` returns None when the sensor does not answer."""

    name: str
    unit: str
    read: Callable[[], float | None]


class DAQJobPCMetrics(DAQJob):
    """Puts one row about this machine per interval."""

    config_type = DAQJobPCMetricsConfig
    config: DAQJobPCMetricsConfig

    def start(self) -> None:
        """Put rows until stopped."""
        interval_s = self.config.interval_seconds
        metrics = metrics_of(self.config.disk_path)
        schema = schema_of(metrics)
        psutil.cpu_percent()
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + interval_s, time.monotonic())
            self.sleep(due_s - time.monotonic())
            self.put_rows([[utc_ns(), *read_row(metrics)]], schema.names, schema=schema)


def schema_of(metrics: list[Metric]) -> Schema:
    """Return the columns of the table."""
    return Schema(
        (
            Column("timestamp", "timestamp"),
            *(Column(metric.name, "f8", unit=metric.unit) for metric in metrics),
        )
    )


def read_row(metrics: list[Metric]) -> list[float | None]:
    """Return one value per metric; a sensor that fails gives None and leaves the others alone."""
    row: list[float | None] = []
    for metric in metrics:
        try:
            value = metric.read()
        except (OSError, psutil.Error):
            value = None
        row.append(None if value is None else float(value))
    return row


def metrics_of(disk_path: str, clock: Callable[[], float] = time.monotonic) -> list[Metric]:
    """Return what this machine can measure now, in the order of the columns."""
    metrics = [
        Metric("cpu_percent", "%", psutil.cpu_percent),
        Metric("load_1min", "", lambda: psutil.getloadavg()[0]),
        Metric("memory_used_percent", "%", lambda: psutil.virtual_memory().percent),
        Metric("memory_available_mib", "MiB", lambda: psutil.virtual_memory().available / _MIB),
    ]
    if psutil.swap_memory().total:
        metrics.append(Metric("swap_used_percent", "%", lambda: psutil.swap_memory().percent))
    metrics += [
        Metric("disk_used_percent", "%", lambda: psutil.disk_usage(disk_path).percent),
        Metric("disk_free_mib", "MiB", lambda: psutil.disk_usage(disk_path).free / _MIB),
    ]
    if psutil.disk_io_counters() is not None:
        metrics += [
            Metric("disk_read_mib_per_s", "MiB/s", per_second(_disk_read, clock)),
            Metric("disk_write_mib_per_s", "MiB/s", per_second(_disk_written, clock)),
        ]
    metrics += [
        Metric(
            "network_in_mib_per_s", "MiB/s", per_second(lambda: psutil.net_io_counters().bytes_recv, clock)
        ),
        Metric(
            "network_out_mib_per_s", "MiB/s", per_second(lambda: psutil.net_io_counters().bytes_sent, clock)
        ),
    ]
    return metrics + [Metric(column, "°C", _hottest(chip)) for column, chip in _chips().items()]


def per_second(
    read_total: Callable[[], float | None], clock: Callable[[], float]
) -> Callable[[], float | None]:
    """Return a reader of how fast a total in bytes grows, in MiB/s; None when unknown, or it went back."""
    last: list[tuple[float, float | None]] = [(clock(), read_total())]

    def read() -> float | None:
        now, total = clock(), read_total()
        before, total_before = last[0]
        last[0] = (now, total)
        if total is None or total_before is None or total < total_before or now <= before:
            return None
        return (total - total_before) / _MIB / (now - before)

    return read


def _disk_read() -> float | None:
    counters = psutil.disk_io_counters()
    return None if counters is None else counters.read_bytes


def _disk_written() -> float | None:
    counters = psutil.disk_io_counters()
    return None if counters is None else counters.write_bytes


def _chips() -> dict[str, str]:
    """Return column name → chip, for every chip that tells a temperature."""
    chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return {
        f"temperature_{re.sub('[^a-z0-9]+', '_', chip.lower()).strip('_')}_c": chip for chip in sorted(chips)
    }


def _hottest(chip: str) -> Callable[[], float | None]:
    def read() -> float | None:
        return max((sensor.current for sensor in psutil.sensors_temperatures().get(chip, ())), default=None)

    return read
