"""The uplink: takes frames from the rings of its node and carries them to the aggregator's intake.

The job is the thread around a poll loop; what happens in it::

    rings ── Inlet ──► Lane (what is owed, in order) ──► Session ──► intake      one Inlet, Lane and Spool
                        │    ▲                             │                      for each lane
                        ▼    └── spool durable, ACK ───────┘──► rings are released
                      Spool

A run is sent the moment it arrives, as far as the credit goes; what is not acknowledged within
``spool_after`` goes to the spool first. What the intake cannot take is corrected by ``Repair``. At the end
everything that is left is made durable in the spool. Decisions are in ``lane.py`` and ``repair.py``, sockets
in ``session.py``, files in ``spool.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import zmq
from edgedaq.config import DAQJobConfig, Seconds
from edgedaq.job import DAQJob
from edgedaq.job_context import JobContext
from edgedaq.lane_options import LaneSpec
from edgedaq.main_config import version
from edgedaq.memory import keep_large_blocks
from edgedaq.session_messages import PROTOCOL_VERSION, Hello
from edgedaq.transport import check_address

from edgedaq_agent.carrier import Carrier
from edgedaq_agent.dialling import Dialling

__all__ = ["Uplink", "UplinkConfig"]


class UplinkConfig(DAQJobConfig, kw_only=True, forbid_unknown_fields=True):
    """What the agent tells its uplink; users write it in ``agent.toml``.

    Args:
        aggregator: Address of the intake; empty: where the node has joined.
        enrolment: File that ``join`` writes; empty: there is none to be, and no keys.
        lanes: ``data`` first.
        lives_after: See ``Carrier``.
        stored: Where the data of each job is to be stored: keys in ``store_config``.
    """

    lanes: Annotated[list[LaneSpec], msgspec.Meta(min_length=1, max_length=16)]
    lives_after: Annotated[Seconds, msgspec.Meta(gt=0)] = 30.0
    aggregator: str = ""
    enrolment: str = ""
    stored: dict[str, list[str]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.aggregator:
            self.aggregator = check_address("aggregator", self.aggregator, has_keys=bool(self.enrolment))


class Uplink(DAQJob):
    """One per node; see the module."""

    config_type = UplinkConfig
    config: UplinkConfig
    stops_itself = True

    def __init__(self, config: UplinkConfig, context: JobContext) -> None:
        super().__init__(config, context)
        self._carrier: Carrier | None = None

    def start(self) -> None:
        """Carry until stopped; then everything is acknowledged, or durable in the spool."""
        keep_large_blocks()
        spec, config = self.context.spec, self.config
        hello = Hello(
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            version=version()[:64],
            node=self.node,
            boot=spec.boot[:64],
            instance=os.urandom(8).hex(),
            lanes=[lane.name for lane in config.lanes],
            features=["live"],
        )
        enrolment = Path(config.enrolment) if config.enrolment else None
        with Carrier(
            Dialling(config.aggregator, enrolment, self.node),
            config.lanes,
            hello,
            rings_dir=self.rings_dir,
            state_dir=self.state_dir,
            context=zmq.Context.instance(),
            took=self.context.took,
            lives_after_s=config.lives_after,
            stored=config.stored,
        ) as carrier:
            self._carrier = carrier
            self.send_to_supervisor({"type": "working"})
            carrier.run(lambda: self.is_stopping, self.stop_fd)

    def on_link_message(self, message: Mapping[str, Any]) -> None:
        """Take the node's report, to be sent with the session."""
        carrier, report = self._carrier, message.get("report")
        if message.get("type") == "node_report" and carrier is not None and isinstance(report, dict):
            carrier.take_node_report(report)

    def report(self) -> dict[str, Any]:
        """Return link, spool and clock."""
        return {} if self._carrier is None else self._carrier.report()
