"""Names: what a node, a job and a topic may be called, and how topics match.

A topic is dotted, e.g. ``store.DAQJobStoreCSV``. A subscription matches whole segments from the left:
``store`` matches ``store`` and ``store.DAQJobStoreCSV``, never ``storey``; the empty subscription matches
every topic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from edgedaq.errors import ConfigError

__all__ = ["ALL_NODES", "check_name", "check_topic", "matches", "matches_any", "store_topic"]

ALL_NODES = "ALL"
"""Reserved: the last row of ``stats_remote.csv``."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
_TOPIC = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}\Z")


def check_name(what: str, name: str) -> str:
    """Return ``name`` if a node or job may be called that.

    Raises:
        ConfigError: It is not 1 to 63 letters, digits, ``_`` or ``-`` not these first, or reserved.
    """
    if not _NAME.match(name):
        message = f"{what} must be 1 to 63 letters, digits, '_' or '-', not '_' or '-' first, got {name!r}"
        raise ConfigError(message)
    if name == ALL_NODES:
        message = f"{what} must not be {ALL_NODES!r}, which is reserved for the sum of all nodes"
        raise ConfigError(message)
    return name


def check_topic(topic: str) -> str:
    """Return ``topic`` if it is 1 to 8 dotted segments of letters, digits, ``_`` or ``-``.

    Raises:
        ConfigError: It is not.
    """
    if not _TOPIC.match(topic):
        message = f"a topic must be 1 to 8 dotted segments of letters, digits, '_' or '-', got {topic!r}"
        raise ConfigError(message)
    return topic


def matches(subscription: str, topic: str) -> bool:
    """Tell whether ``subscription`` covers ``topic`` by whole dotted segments."""
    return not subscription or topic == subscription or topic.startswith(subscription + ".")


def matches_any(subscriptions: Iterable[str], topics: Iterable[str]) -> bool:
    """Tell whether any of the subscriptions covers any of the topics."""
    held = list(topics)
    return any(matches(subscription, topic) for subscription in subscriptions for topic in held)


def store_topic(store_type: str) -> str:
    """Return the topic that routes to a store, e.g. ``store.DAQJobStoreCSV``."""
    return f"store.{store_type}"
