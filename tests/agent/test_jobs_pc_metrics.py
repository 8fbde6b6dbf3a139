from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import psutil
import pytest
from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError
from edgedaq_agent.jobs.pc_metrics import (
    DAQJobPCMetricsConfig,
    Metric,
    metrics_of,
    per_second,
    read_row,
    schema_of,
)

from tests.contract.job_contract import JobContract, RunningJob

STORES = {"csv": {"file_path": "pc.csv"}}


class TestPCMetrics(JobContract):
    job_type = "DAQJobPCMetrics"
    config: ClassVar[dict[str, Any]] = {"interval_seconds": 0.1, "store_config": STORES}

    def has_enough(self, job: RunningJob) -> bool:
        return len(job.rows()) >= 4

    def check_output(self, job: RunningJob) -> None:
        rows = job.rows()
        steps = [(b[0] - a[0]) / 1e9 for a, b in itertools.pairwise(rows)]
        assert all(0.02 < step < 5 for step in steps)
        (info,) = job.infos.values()
        assert info.schema == schema_of(metrics_of("/"))


def test_this_machine_gives_a_number_for_every_column_that_it_announces():
    metrics = metrics_of("/")
    read_row(metrics)
    row = read_row(metrics)
    assert schema_of(metrics).names == ("timestamp", *(metric.name for metric in metrics))
    values = {metric.name: value for metric, value in zip(metrics, row, strict=True) if value is not None}
    assert len(values) == len(metrics)
    assert all(math.isfinite(value) for value in values.values()), values
    assert 0 < values["memory_used_percent"] < 100
    assert values["memory_available_mib"] * 2**20 == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert values["disk_used_percent"] == pytest.approx(psutil.disk_usage("/").percent, abs=1)


def test_a_sensor_that_stops_answering_gives_none_and_leaves_the_others_alone():
    def unplugged() -> float:
        message = "no such device"
        raise OSError(message)

    metrics = [Metric("gone", "", unplugged), Metric("there", "", lambda: 3)]
    assert read_row(metrics) == [None, 3.0]


def test_a_disk_that_is_not_there_is_none_not_zero(tmp_path):
    metrics = {metric.name: metric for metric in metrics_of(str(tmp_path / "absent"))}
    assert read_row([metrics["disk_free_mib"]]) == [None]


def test_a_rate_is_growth_over_time_and_unknown_after_a_counter_went_back():
    times = iter([0.0, 2.0, 3.0, 4.0, 5.0])
    totals = iter([0.0, 4 * 2**20, 2**20, None, 2**20])
    read = per_second(lambda: next(totals), lambda: next(times))
    assert [read() for _ in range(4)] == [2.0, None, None, None]


def test_a_pace_at_which_cpu_shares_mean_nothing_is_refused():
    raw = {"daq_job_type": "DAQJobPCMetrics", "store_config": STORES, "interval_seconds": "1 ms"}
    with pytest.raises(ConfigError, match=r"interval_seconds must be at least 0\.1"):
        build_job_config(DAQJobPCMetricsConfig, raw, file="p.toml", stem="p")
