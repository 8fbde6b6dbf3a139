"""Every sample that the repository ships is loaded as the programs load it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from edgedaq.config import DAQJobConfig
from edgedaq.config_dir import load_jobs
from edgedaq.main_config import read_main
from edgedaq.registry import JOB_TABLE, STORE_TABLE, load_class, load_table
from edgedaq_agent.config import AgentConfig
from edgedaq_aggregator.config import AggregatorConfig

CONFIGS = Path(__file__).parents[2] / "configs"
DIRECTORIES = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
EXAMPLES = CONFIGS / "examples"


def tables() -> tuple[dict[str, str], dict[str, str]]:
    return load_table(JOB_TABLE), load_table(STORE_TABLE)


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_every_job_of_every_sample_directory_loads_without_a_problem(directory):
    jobs, stores = tables()
    found = load_jobs(directory, jobs, stores, takes_stores=directory.name != "agent")
    assert found
    assert [problem for file in found for problem in file.problems] == []


def test_the_samples_of_both_sides_are_valid_and_meet_each_other():
    agent = read_main(AgentConfig, CONFIGS / "agent" / "agent.toml")
    aggregator = read_main(AggregatorConfig, CONFIGS / "aggregator" / "aggregator.toml")
    assert agent.aggregator == aggregator.listen


def test_every_registered_job_and_store_has_a_sample():
    jobs, stores = tables()
    found = load_jobs(EXAMPLES, jobs, stores, takes_stores=True)
    assert {*jobs, *stores} <= {file.job_type for file in found}


def test_samples_say_every_setting_that_only_that_job_has():
    jobs, stores = tables()
    optional = {"seed", "waveform_store_config"}
    common = {field.name for field in msgspec.structs.fields(DAQJobConfig)}
    for file in load_jobs(EXAMPLES, jobs, stores, takes_stores=True):
        if file.job_type not in jobs:
            continue
        own = {field.name for field in msgspec.structs.fields(load_class(file.target, EXAMPLES).config_type)}
        assert own - common - optional <= set(file.raw), file.path
