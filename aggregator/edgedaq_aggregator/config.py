"""What ``aggregator.toml`` may say.

::

    supervisor_id = "aggregator"
    listen = "tcp://0.0.0.0:7770"           # other than this machine alone: nodes need keys
    require_keys = false                    # also where it listens for this machine alone
    out_dir = "/srv/daq"                    # stored data; relative paths begin at the directory of this file
    state_dir = "/var/lib/edgedaq"          # the journal, and what stores know of their files
    runtime_dir = "/run/edgedaq"            # sockets; on tmpfs

    [journal]
    segment = "64 MiB"
    limit = "20 GiB"
    reserve = "1 GiB"                       # of the disk, left free
    keep = "256 MiB"                        # kept after all stores have it, for stores that come later
    store_limit = "10 GiB"                  # a store that is further behind gets a gap

    [lanes.data]                            # of the uplink that jobs of the aggregator itself have
    spool_after = "200 ms"
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from edgedaq.config import Bytes, Verbosity
from edgedaq.errors import ConfigError
from edgedaq.lane_options import LaneOptions
from edgedaq.names import check_name
from edgedaq.transport import check_address, is_loopback

__all__ = ["FILE_NAME", "AggregatorConfig", "JournalOptions"]

FILE_NAME = "aggregator.toml"
_SEGMENT_MIN = 16 << 20


class JournalOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[journal]``; ``limit`` and ``reserve`` fit the disk where they are not given."""

    segment: Annotated[Bytes, msgspec.Meta(ge=_SEGMENT_MIN, le=4 << 30)] = 64 << 20
    limit: Annotated[Bytes, msgspec.Meta(gt=0)] | None = None
    reserve: Bytes | None = None
    keep: Bytes = 256 << 20
    store_limit: Annotated[Bytes, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 4 * self.segment:
            message = f"limit must be at least four segments ({4 * self.segment} bytes), got {self.limit}"
            raise ConfigError(message)


class AggregatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``aggregator.toml``. What is not given for directories is chosen by ``app``."""

    supervisor_id: str = ""
    listen: str = ""
    require_keys: bool = False
    out_dir: str = ""
    state_dir: str = ""
    runtime_dir: str = ""
    verbosity: Verbosity = "INFO"
    journal: JournalOptions = msgspec.field(default_factory=JournalOptions)
    lanes: dict[str, LaneOptions] = {}

    def __post_init__(self) -> None:
        if self.supervisor_id:
            check_name("supervisor_id", self.supervisor_id)
        if self.listen:
            check_address("listen", self.listen, has_keys=True)

    @property
    def has_keys(self) -> bool:
        """Nodes are let in by their keys; always, except on an address of this machine alone."""
        return self.require_keys or not (not self.listen or is_loopback(self.listen))
