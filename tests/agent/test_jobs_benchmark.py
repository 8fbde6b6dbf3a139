from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError
from edgedaq.schema import pack_rows, unpack_rows
from edgedaq_agent.jobs.benchmark import (
    COLUMNS,
    SCHEMA,
    DAQJobBenchmarkConfig,
    columns_of,
    filler,
    filler_count,
    raw_message,
    raw_messages,
    rows_of,
)

STORES = {"raw": {"file_path": "benchmark.bin"}}


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
