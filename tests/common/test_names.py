"""Names are checked where they enter, and topics match by whole segments."""

from __future__ import annotations

import pytest
from edgedaq.errors import ConfigError, nearest
from edgedaq.names import check_name, check_topic, matches, matches_any, store_topic


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "-x", "é", "a\n", "x" * 64, "ALL"])
def test_a_name_that_could_leave_its_place_is_refused(name):
    with pytest.raises(ConfigError, match="supervisor_id"):
        check_name("supervisor_id", name)


@pytest.mark.parametrize("topic", ["", ".", "a..b", "a.b.", "a b", "a\n", "/", "a." * 8 + "b"])
def test_a_topic_that_is_not_dotted_words_is_refused(topic):
    with pytest.raises(ConfigError):
        check_topic(topic)


def test_a_subscription_covers_whole_segments_only():
    assert matches("node1", "node1.hv")
    assert matches("node1", "node1")
    assert matches("", "anything")
    assert not matches("node1", "node10")
    assert not matches("node1.hv", "node1")
    assert matches_any(["x", "store"], ["y", store_topic("DAQJobStoreCSV")])
    assert not matches_any([], ["y"])


def test_good_names_pass_unchanged():
    assert check_name("job", "hv-1_a") == "hv-1_a"
    assert check_topic("store.DAQJobStoreCSV") == "store.DAQJobStoreCSV"


def test_a_near_miss_is_named_and_a_far_one_is_not():
    assert nearest("cvs", ["csv", "raw"]) == ", did you mean 'csv'?"
    assert nearest("zzz", ["csv", "raw"]) == ""
