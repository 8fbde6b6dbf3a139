"""What ``agent.toml`` may say.

::

    supervisor_id = "hall-b-pi3"            # the node's name; required
    aggregator = "tcp://10.0.0.1:7770"      # left out: where the node has joined, else this machine
    forward = ["store"]                     # topics that leave the node
    state_dir = "/var/lib/edgedaq"          # the spool; relative paths begin at the directory of this file
    runtime_dir = "/run/edgedaq"            # shared memory and sockets; on tmpfs
    ring_bytes = "256 MiB"                  # shared memory of all jobs together, at most

    [lanes.data]
    spool_after = "200 ms"                  # what is not acknowledged by then goes to disk
    limit = "10 GiB"                        # of the spool
    reserve = "1 GiB"                       # of the disk, left free

More lanes: see ``edgedaq.lane_options``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from edgedaq.config import Bytes, Verbosity
from edgedaq.lane_options import LaneOptions
from edgedaq.names import check_name, check_topic
from edgedaq.transport import check_address

__all__ = ["FILE_NAME", "AgentConfig"]

FILE_NAME = "agent.toml"


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``agent.toml``. What is not given for directories is chosen by ``app``."""

    supervisor_id: str
    aggregator: str = ""
    forward: tuple[str, ...] = ("store",)
    state_dir: str = ""
    runtime_dir: str = ""
    ring_bytes: Annotated[Bytes, msgspec.Meta(gt=0)] | None = None
    verbosity: Verbosity = "INFO"
    lanes: dict[str, LaneOptions] = {}

    def __post_init__(self) -> None:
        check_name("supervisor_id", self.supervisor_id)
        if self.aggregator:
            check_address("aggregator", self.aggregator, has_keys=True)
        for topic in self.forward:
            check_topic(topic)
