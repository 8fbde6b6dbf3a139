"""An intake with keys, the real commands that enrol nodes, and nodes that are enrolled, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedaq.clock import utc_ns
from edgedaq.keys import (
    Enrolment,
    Token,
    aggregator_keys,
    new_key_pair,
    pack_token,
    write_enrolment,
)
from edgedaq_aggregator.authority import NodesFile

from tests.agent.hop2 import Hop2, Worker

HUB = "hub"


class Keyed(Hop2):
    """A hop with keys: ``nodes.toml`` of the hub, and what ``join`` leaves on a node."""

    def __init__(self, runtime_dir: Path, tmp_path: Path) -> None:
        super().__init__(runtime_dir, tmp_path)
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.nodes_file = NodesFile(self.hub_state, HUB)
        self.enrolment = tmp_path / "enrolment.key"

    def intake(self, **config: Any) -> Worker:
        return super().intake(has_keys=True, **config)

    def uplink(self, **config: Any) -> Worker:
        return super().uplink(**{"enrolment": str(self.enrolment), **config})

    def beside(self, runtime_dir: Path, tmp_path: Path) -> Keyed:
        """Return another node of the same hub."""
        other = Keyed(runtime_dir, tmp_path)
        other.port, other.address = self.port, self.address
        other.hub_state, other.nodes_file = self.hub_state, self.nodes_file
        return other

    def token(self, node: str = "n1", topics: tuple[str, ...] | None = None, expires: str = "") -> str:
        """Invite a node, as the command does."""
        secret = self.nodes_file.invite(node, utc_ns(), topics, expires)
        return pack_token(Token(node, aggregator_keys(self.hub_state).public, secret))

    def enrol(self, node: str = "n1", path: Path | None = None, **terms: Any) -> Enrolment:
        """Let a node in, as if it had joined; its enrolment is written where its uplink looks."""
        enrolment = self.stranger(node)
        secret = self.nodes_file.invite(node, utc_ns(), terms.get("topics"), terms.get("expires", ""))
        assert self.nodes_file.join(secret, enrolment.keys.public, utc_ns()) == node
        write_enrolment(path or self.enrolment, enrolment)
        return enrolment

    def stranger(self, node: str = "n1") -> Enrolment:
        """Return what a node would have whose key nobody knows."""
        return Enrolment(
            node=node,
            aggregator=self.address,
            aggregator_key=aggregator_keys(self.hub_state).public,
            secret_key=new_key_pair().secret,
        )
