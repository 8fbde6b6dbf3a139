"""``docs/configuration.md`` names every key that the programs accept, and its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edgedaq.config import DAQJobConfig, InputOptions, RingOptions
from edgedaq.lane_options import LaneOptions
from edgedaq.store_config import (
    DAQJobStoreConfig,
    DAQJobStoreConfigCSV,
    DAQJobStoreConfigHDF5,
    DAQJobStoreConfigMySQL,
    DAQJobStoreConfigParquet,
    DAQJobStoreConfigRaw,
    DAQJobStoreConfigRedis,
    DAQJobStoreConfigROOT,
    DAQJobStoreConfigSQLite,
)
from edgedaq.typed_toml import build
from edgedaq_agent.config import AgentConfig
from edgedaq_aggregator.config import AggregatorConfig, JournalOptions

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "agent.toml": AgentConfig,
    "lanes.NAME": LaneOptions,
    "aggregator.toml": AggregatorConfig,
    "journal": JournalOptions,
    "Every job and store": DAQJobConfig,
    "ring": RingOptions,
    "input": InputOptions,
    "store_config": DAQJobStoreConfig,
    "store_config.csv": DAQJobStoreConfigCSV,
    "store_config.raw": DAQJobStoreConfigRaw,
    "store_config.root": DAQJobStoreConfigROOT,
    "store_config.hdf5": DAQJobStoreConfigHDF5,
    "store_config.mysql": DAQJobStoreConfigMySQL,
    "store_config.redis": DAQJobStoreConfigRedis,
    "store_config.parquet": DAQJobStoreConfigParquet,
    "store_config.sqlite": DAQJobStoreConfigSQLite,
}
REQUIRED = {
    "supervisor_id": "node1",
    "daq_job_type": "T",
    "file_path": "f",
    "table_name": "t",
    "key": "k",
}


def rows_of(section: str) -> dict[str, str]:
    """Return key → default as the page says them."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z0-9_]+)` \| (.*?) \|", text, re.MULTILINE))


def test_every_section_of_the_page_is_checked():
    assert re.findall(r"^## (.+)$", PAGE, re.MULTILINE) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_names_the_keys_that_are_accepted_and_no_others(section):
    assert list(rows_of(section)) == list(SECTIONS[section].__struct_encode_fields__)


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "store_config"])
def test_defaults_are_what_the_page_says(section):
    cls = SECTIONS[section]
    fields = msgspec.structs.fields(cls)
    required = {field.name: REQUIRED[field.name] for field in fields if field.required}
    usual = build(cls, required, "usual")
    for key, told in rows_of(section).items():
        assert (told == "required") == (key in required), key
        literal = re.fullmatch(r"`([^`]+)`", told)
        default: Any = getattr(usual, key)
        if literal is None:
            assert default in (None, "", {}) or isinstance(default, msgspec.Struct) or key in required
        else:
            given = tomllib.loads(f"key = {literal[1]}")["key"]
            assert getattr(build(cls, {**required, key: given}, "told"), key) == default, key
