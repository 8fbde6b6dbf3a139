"""The lanes of a node as a file describes them.

::

    forward = ["store"]

    [lanes.data]                        # all that forward names, if no topics are given
    spool_after = "200 ms"
    limit = "10 GiB"

    [lanes.telemetry]                   # there in any case: small, and ahead of a backlog
    topics = ["telemetry"]
    policy = "drop_oldest"
    weight = 4

A topic takes one lane: topics of two lanes that cover each other are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgedaq.config import Bytes, Seconds
from edgedaq.errors import ConfigError
from edgedaq.frame import MAX_FRAME_BYTES
from edgedaq.main_config import fit_on_disk
from edgedaq.names import check_name, check_topic, matches

__all__ = ["DATA_LANE", "TELEMETRY_LANE", "LaneOptions", "LaneSpec", "fit_lanes", "lane_claim", "lanes_of"]

DATA_LANE = "data"
TELEMETRY_LANE = "telemetry"
SPOOL_USUAL = 10 << 30
TELEMETRY_USUAL = 64 << 20


class LaneOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One lane: ``[lanes.data]``.

    Args:
        topics: What takes this lane; of ``data``: all that ``forward`` names, unless given.
        durability: ``disk``: what is not acknowledged in time goes to the spool; ``memory``: it stays in the
            rings.
        policy: What happens when there is no room any more. ``wait``: jobs wait; ``drop_oldest``,
            ``drop_newest``: data are dropped, and a GAP says which.
        weight: Share of the link while several lanes have something to send.
        spool_after: What the aggregator has not acknowledged by then goes to the spool on disk.
        commit_after: How long bytes gather before they are made durable; "200 ms" spares an SD card.
        limit: Most that the spool may take (of a lane in memory: that it holds in rings); 10 GiB if not given
            (telemetry: 64 MiB), less on a small disk.
        reserve: What the spool leaves free on its disk; 1 GiB if not given, less on a small disk.
    """

    topics: tuple[str, ...] = ()
    durability: Literal["disk", "memory"] = "disk"
    policy: Literal["wait", "drop_oldest", "drop_newest"] = "wait"
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    spool_after: Annotated[Seconds, msgspec.Meta(le=3600)] = 0.2
    commit_after: Annotated[Seconds, msgspec.Meta(le=60)] = 0.0
    limit: Annotated[Bytes, msgspec.Meta(ge=4 * MAX_FRAME_BYTES)] | None = None
    reserve: Bytes | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for topic in self.topics:
            check_topic(topic)
        if self.durability == "memory" and self.policy == "drop_newest":
            message = (
                "policy must be 'wait' or 'drop_oldest' with durability 'memory', got 'drop_newest': what is "
                "in a ring can only be given back from its oldest end"
            )
            raise ConfigError(message)


_TELEMETRY = LaneOptions(topics=("telemetry",), policy="drop_oldest", weight=4)


class LaneSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One lane as the uplink is told of it: nothing is left open."""

    name: str
    topics: tuple[str, ...]
    options: LaneOptions
    limit: int
    reserve: int

    @property
    def claim(self) -> str:
        """Name under which the uplink holds rings for this lane."""
        return lane_claim(self.name)


def lane_claim(name: str) -> str:
    """Return the name under which the uplink holds rings for a lane."""
    return "uplink" if name == DATA_LANE else f"uplink-{name}"


def lanes_of(lanes: Mapping[str, LaneOptions], forward: Sequence[str]) -> dict[str, LaneOptions]:
    """Return all lanes of a node, ``data`` first, each with the topics that take it.

    Raises:
        ConfigError: A lane has no name or no topics, or a topic would take two lanes.
    """
    data = lanes.get(DATA_LANE, LaneOptions())
    found = {DATA_LANE: msgspec.structs.replace(data, topics=data.topics or tuple(forward))}
    for name, options in {TELEMETRY_LANE: _TELEMETRY, **lanes}.items():
        if name == DATA_LANE:
            continue
        check_name("lane", name)
        topics = options.topics or (_TELEMETRY.topics if name == TELEMETRY_LANE else ())
        if not topics:
            message = f"lanes.{name}.topics must name what takes this lane, e.g. ['store.DAQJobStoreRaw']"
            raise ConfigError(message)
        found[name] = msgspec.structs.replace(options, topics=topics)
    taken: list[tuple[str, str]] = []
    for name, options in found.items():
        for topic in options.topics:
            for other, lane in taken:
                if lane != name and (matches(topic, other) or matches(other, topic)):
                    message = f"lanes.{name}.topics has {topic!r}, which lanes.{lane} takes as {other!r}"
                    raise ConfigError(message)
            taken.append((topic, name))
    return found


def fit_lanes(
    where: Path, lanes: Mapping[str, LaneOptions], forward: Sequence[str], state_dir: Path
) -> list[LaneSpec]:
    """Return the lanes of a node, ``data`` first, with limits that fit on the disk.

    Raises:
        ConfigError: They do not, or contradict each other.
    """
    try:
        found = lanes_of(lanes, forward)
    except ConfigError as e:
        message = f"{where}: {e}"
        raise ConfigError(message) from e
    specs = []
    for name, options in found.items():
        usual = TELEMETRY_USUAL if name == TELEMETRY_LANE else SPOOL_USUAL
        limit, reserve = fit_on_disk(
            where, f"lanes.{name}", options.limit, options.reserve, state_dir, usual=usual
        )
        specs.append(
            LaneSpec(name=name, topics=options.topics, options=options, limit=limit, reserve=reserve)
        )
    return specs
