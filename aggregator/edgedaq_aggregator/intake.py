"""The intake: receives what uplinks send, checks it, journals it, and acknowledges what is durable.

The job is the thread around ``Reception``; the journal belongs to it, and stores follow that on their own.
At its end everything that was received is durable.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Annotated, Any

import msgspec
import zmq
from edgedaq.bad_files import BadFiles
from edgedaq.config import Bytes, DAQJobConfig
from edgedaq.job import DAQJob
from edgedaq.job_context import JobContext
from edgedaq.keys import aggregator_keys
from edgedaq.main_config import version
from edgedaq.memory import keep_large_blocks
from edgedaq.transport import check_address

from edgedaq_aggregator.authority import NodesFile
from edgedaq_aggregator.gatekeeper import Gatekeeper
from edgedaq_aggregator.journal import Journal
from edgedaq_aggregator.live_relay import LiveRelay
from edgedaq_aggregator.reception import Reception
from edgedaq_aggregator.refusals import Refusals

__all__ = ["Intake", "IntakeConfig"]

_FILES_MAX = 65536


class IntakeConfig(DAQJobConfig, kw_only=True, forbid_unknown_fields=True):
    """What the aggregator tells its intake; users write it in ``aggregator.toml``.

    Args:
        listen: Address for the uplinks.
        segment: Size of a file of the journal.
        limit: What the journal may take on disk; then the agents keep their data.
        reserve: What it leaves free on the file system.
        keep: What is kept for stores that come later.
        store_limit: How far a store may be behind.
        stores: Stores that are configured.
        has_keys: Whether nodes are let in by their keys; without, the address is this machine's alone.
        own_key: Public key of this aggregator's own uplink, if there is one.
        store_keys: What they are called in ``store_config``; None: unknown.
    """

    listen: str
    segment: Annotated[Bytes, msgspec.Meta(gt=0)] = 64 << 20
    limit: Annotated[Bytes, msgspec.Meta(gt=0)] = 20 << 30
    reserve: Annotated[Bytes, msgspec.Meta(ge=0)] = 1 << 30
    keep: Annotated[Bytes, msgspec.Meta(ge=0)] = 256 << 20
    store_limit: Annotated[Bytes, msgspec.Meta(gt=0)] | None = None
    stores: tuple[str, ...] = ()
    has_keys: bool = False
    own_key: str = ""
    store_keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.listen = check_address("listen", self.listen, listens=True, has_keys=self.has_keys)


class Intake(DAQJob):
    """One per aggregator; see the module."""

    config_type = IntakeConfig
    config: IntakeConfig
    stops_itself = True

    def __init__(self, config: IntakeConfig, context: JobContext) -> None:
        super().__init__(config, context)
        self._reception: Reception | None = None

    def start(self) -> None:
        """Receive until stopped.

        Raises:
            StoreError: The journal cannot be opened, or the address not be listened on; trying again may
            help.
        """
        keep_large_blocks()
        _allow_connections()
        config = self.config
        context: zmq.Context[Any] = zmq.Context.instance()
        refusals = Refusals()
        with contextlib.ExitStack() as stack:
            gatekeeper = None
            if config.has_keys:
                own = (self.node, config.own_key) if config.own_key else None
                nodes_file = NodesFile(self.state_dir, self.node)
                keys = aggregator_keys(self.state_dir)
                gatekeeper = Gatekeeper(nodes_file, keys, own, refusals, context)
                stack.callback(gatekeeper.close)
            journal = stack.enter_context(self._journal(context))
            live = LiveRelay(self.runtime_dir, context)
            stack.callback(live.close)
            reception = Reception(
                config.listen,
                journal,
                refusals,
                gatekeeper,
                version=version()[:64],
                bad=BadFiles(self.state_dir / "bad"),
                context=context,
                take_report=self._forward,
                take_rows=self.context.took,
                live=live,
                stores=config.store_keys,
            )
            self._reception = reception
            stack.callback(reception.close)
            self.send_to_supervisor({"type": "working"})
            reception.run(lambda: self.is_stopping, self.stop_fd)

    def _journal(self, context: zmq.Context[Any]) -> Journal:
        config = self.config
        return Journal(
            self.state_dir / "journal",
            self.runtime_dir,
            limit_bytes=config.limit,
            segment_bytes=config.segment,
            reserve_bytes=config.reserve,
            keep_bytes=config.keep,
            store_bytes=config.store_limit,
            stores=config.stores,
            context=context,
        )

    def report(self) -> dict[str, Any]:
        """Return what was counted per node, and the state of the journal."""
        return {} if self._reception is None else self._reception.report()

    def _forward(self, report: dict[str, Any]) -> None:
        try:
            self.send_to_supervisor({"type": "node_report", "report": report})
        except ValueError as e:
            self.logger.warning("report.rejected", reason=str(e))


def _allow_connections() -> None:
    """Allow more open files than the 1024 that a process has by default.

    Without, connections of nobody in particular leave none for the journal's files and for new nodes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if hard == resource.RLIM_INFINITY else min(_FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
