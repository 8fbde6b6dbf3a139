"""Lanes as files describe them: always two, more on request, and no topic in two of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from edgedaq.errors import ConfigError
from edgedaq.lane_options import LaneOptions, fit_lanes, lanes_of


def test_there_are_two_lanes_without_a_word_and_only_the_small_one_drops():
    lanes = lanes_of({}, ("store",))
    assert {name: (lane.topics, lane.policy) for name, lane in lanes.items()} == {
        "data": (("store",), "wait"),
        "telemetry": (("telemetry",), "drop_oldest"),
    }


def test_options_of_a_lane_that_is_there_anyway_do_not_need_its_topics(tmp_path):
    lanes = {"telemetry": LaneOptions(weight=9), "data": LaneOptions(spool_after=0.0)}
    data, telemetry = fit_lanes(Path("agent.toml"), lanes, ("store",), tmp_path)
    assert (data.topics, data.options.spool_after, data.claim) == (("store",), 0.0, "uplink")
    assert (telemetry.topics, telemetry.options.weight) == (("telemetry",), 9)
    assert (telemetry.claim, telemetry.limit) == ("uplink-telemetry", 64 << 20)


@pytest.mark.parametrize("topic", ["store", "store.DAQJobStoreRaw", "telemetry.pressure"])
def test_a_topic_that_would_take_two_lanes_is_refused_with_both_named(topic):
    with pytest.raises(ConfigError, match=r"lanes\.slow\.topics has .* which lanes\.\w+ takes as"):
        lanes_of({"slow": LaneOptions(topics=(topic,))}, ("store",))


def test_a_lane_without_topics_is_refused():
    with pytest.raises(ConfigError, match=r"lanes\.slow\.topics must name"):
        lanes_of({"slow": LaneOptions()}, ("store",))


def test_a_ring_cannot_drop_its_newest():
    with pytest.raises((ConfigError, msgspec.ValidationError), match="drop_newest"):
        msgspec.convert({"durability": "memory", "policy": "drop_newest"}, LaneOptions)
