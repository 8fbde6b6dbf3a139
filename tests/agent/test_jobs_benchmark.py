from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError
from edgedaq.schema import pack_rows, unpack_rows
from edgedaq_agent.jobs.benchmark import (
    COLUMNS,
    SCHEMA,
    DAQJobBenchmark,
    DAQJobBenchmarkConfig,
    columns_of,
    filler,
    filler_count,
    raw_message,
    raw_messages,
    row_of,
    rows_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.job_contract import LIMIT_S, JobContract, RunningJob

STORES = {"raw": {"file_path": "benchmark.bin"}}


class TestRaw(JobContract):
    job_type = "DAQJobBenchmark"
    config: ClassVar[dict[str, Any]] = {
        "mode": "raw",
        "payload_size": 1000,
        "rate_limit": 2000,
        "store_config": STORES,
    }

    def check_output(self, job: RunningJob) -> None:
        messages = job.messages()
        assert messages == [raw_message(sequence, 1000) for sequence in range(len(messages))]


class TestRows(JobContract):
    job_type = "DAQJobBenchmark"
    config: ClassVar[dict[str, Any]] = {
        "mode": "rows",
        "payload_size": 3,
        "rate_limit": 1000,
        "store_config": STORES,
    }

    def check_output(self, job: RunningJob) -> None:
        rows = job.rows()
        assert rows == [row_of(index // 3, index % 3) for index in range(len(rows))]


class TestTable(TestRows):
    config: ClassVar[dict[str, Any]] = {
        "mode": "table",
        "payload_size": 3,
        "rate_limit": 1000,
        "store_config": STORES,
    }


def test_after_the_asked_for_messages_it_ends_by_itself(runtime_dir):
    with TestRaw().running(runtime_dir, messages=25, rate_limit=0) as job:
        assert job.process.wait(LIMIT_S) == 0
        job.until(lambda: bool(job.closed_streams()))
        assert job.messages() == [raw_message(sequence, 1000) for sequence in range(25)]


def test_a_rate_limit_is_kept():
    for rate in (50, 5000):
        numbers = itertools.count()
        job = SimpleNamespace(config=SimpleNamespace(messages=0, rate_limit=rate), sleep=time.sleep)
        began = time.monotonic()
        for _ in zip(DAQJobBenchmark._paced(job, numbers), range(rate // 5), strict=False):  # type: ignore[arg-type]
            pass
        assert time.monotonic() - began == pytest.approx(0.2, rel=0.3)


@settings(max_examples=25)
@given(st.integers(8, 20_000))
def test_reused_buffers_hold_what_a_verifier_builds_from_the_number_alone(payload_size):
    fast = [bytes(message) for message in raw_messages(payload_size, range(150))]
    assert fast == [raw_message(sequence, payload_size) for sequence in range(150)]
    assert {len(message) for message in fast} == {payload_size}


@pytest.mark.parametrize("payload_size", [1000, 16_000, 160_000, 1_000_000, 8_000_000])
def test_neighbouring_messages_differ_so_that_a_mixed_one_is_seen(payload_size):
    count = filler_count(payload_size)
    assert count >= 2
    assert count * payload_size <= max(16 << 20, 2 * payload_size)
    fillers = [filler(index, payload_size) for index in range(min(count, 4))]
    for a, b in itertools.combinations(fillers, 2):
        assert sum(x != y for x, y in zip(a[:4000], b[:4000], strict=True)) == min(4000, len(a))


def test_rows_and_tables_hold_the_same_exact_values():
    rows = rows_of(12345, 20)
    columns = columns_of(12345, 20)
    assert list(columns) == list(COLUMNS)
    assert list(zip(*columns.values(), strict=True)) == rows
    assert [tuple(row) for row in unpack_rows(SCHEMA, pack_rows(SCHEMA, rows))] == rows


def test_a_raw_message_without_room_for_its_number_is_refused():
    raw = {"daq_job_type": "DAQJobBenchmark", "store_config": STORES, "mode": "raw", "payload_size": 7}
    with pytest.raises(ConfigError, match="payload_size must be at least 8"):
        build_job_config(DAQJobBenchmarkConfig, raw, file="b.toml", stem="b")
