from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
from edgedaq.clock import utc_ns
from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError
from edgedaq_agent.jobs.test import COLUMNS, DAQJobTestConfig, row_of

from tests.contract.job_contract import JobContract, RunningJob

STORES = {"csv": {"file_path": "test.csv"}}


class TestDAQJobTest(JobContract):
    job_type = "DAQJobTest"
    config: ClassVar[dict[str, Any]] = {
        "rand_min": 5,
        "rand_max": 7,
        "interval_seconds": "1 ms",
        "store_config": STORES,
    }

    def check_output(self, job: RunningJob) -> None:
        rows = job.rows()
        assert [row[1] for row in rows] == list(range(len(rows)))
        assert {value for row in rows for value in row[2:]} == {5, 6, 7}
        assert all(abs(row[0] - utc_ns()) < 60e9 for row in rows)
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_columns_are_the_promised_ones_in_order():
    assert COLUMNS == ("timestamp", "sequence", "A", "B", "C")


def test_values_reach_both_ends_of_the_range_and_never_leave_it():
    source = random.Random(1)
    values = {value for _ in range(200) for value in row_of(source, 0, 0, -1, 1)[2:]}
    assert values == {-1, 0, 1}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rand_min": 5, "rand_max": 4}, "rand_max must be at least rand_min, which is 5, got 4"),
        ({"rand_max": 4}, "rand_min is missing"),
        ({"rand_min": 1, "rand_max": 4, "interval_seconds": -1}, "interval_seconds must be"),
    ],
)
def test_a_test_job_that_cannot_be_is_refused_by_key(settings, named):
    raw = {"daq_job_type": "DAQJobTest", "store_config": STORES, **settings}
    with pytest.raises(ConfigError, match=named):
        build_job_config(DAQJobTestConfig, raw, file="t.toml", stem="t")
