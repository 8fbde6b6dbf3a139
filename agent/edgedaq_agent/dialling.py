"""Where the uplink dials, with which keys, and why a connection did not come about, in words.

Looked up anew for each connection: a node that joins while its agent runs is heard of at the next attempt,
and an enrolment that cannot be read costs a session, never the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import zmq
from edgedaq.errors import ConfigError
from edgedaq.keys import KeyPair, read_enrolment, set_client_keys
from edgedaq.transport import check_address, set_dealer_options

__all__ = ["DEFAULT_AGGREGATOR", "FAILED_EVENTS", "Destination", "Dialling", "open_dealer", "why_failed"]

DEFAULT_AGGREGATOR = "tcp://127.0.0.1:7770"
"""Of a node that was told no address, and has joined nobody."""

FAILED_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NOT_NOW = 500


class Destination(NamedTuple):
    """An address and, except on this machine, the keys: the node's own and the aggregator's public one."""

    address: str
    keys: KeyPair | None = None
    aggregator_key: str = ""


class Dialling:
    """Where one node's uplink dials.

    Args:
        address: As configured; empty: where the node has joined.
        enrolment: The file that ``join`` writes; None: there is none to be.
        node: The name that the node is configured to have.
    """

    def __init__(self, address: str, enrolment: Path | None = None, node: str = "") -> None:
        self.address = address
        self._enrolment = enrolment
        self._node = node

    def destination(self) -> Destination:
        """Return where to connect now.

        Raises:
            ConfigError: The enrolment cannot be read or is another node's, or the node has to join first.
        """
        enrolment = None if self._enrolment is None else read_enrolment(self._enrolment)
        if enrolment is None:
            return Destination(check_address("aggregator", self.address or DEFAULT_AGGREGATOR))
        if self._node and enrolment.node != self._node:
            message = (
                f"{self._enrolment}: is the enrolment of node {enrolment.node!r}, this one is called "
                f"{self._node!r}; a node keeps its name, or joins again"
            )
            raise ConfigError(message)
        self.address = check_address("aggregator", self.address or enrolment.aggregator, has_keys=True)
        return Destination(self.address, enrolment.keys, enrolment.aggregator_key)


def open_dealer(destination: Destination, context: zmq.Context[Any]) -> zmq.Socket[bytes]:
    """Return the socket of one session, not connected yet."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    set_dealer_options(socket, destination.address)
    if destination.keys is not None:
        set_client_keys(socket, destination.keys, destination.aggregator_key)
    return socket


def why_failed(event: int, value: int, *, has_keys: bool, had_handshake: bool) -> str:
    """Return what one of ``FAILED_EVENTS`` means, for a person."""
    if event == zmq.EVENT_CLOSED:
        return "nobody listens there"
    if event == zmq.EVENT_DISCONNECTED and had_handshake:
        return "the connection was cut"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        if value == _NOT_NOW:
            return "the aggregator does not listen to this key for now: too much of what it sent was refused"
        return (
            "the aggregator lets no such key in: unknown, revoked or expired (see `edgedaq-aggregator nodes`)"
        )
    if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH and event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if has_keys:
            return "the aggregator there has no keys: it listens for its own machine alone (see its `listen`)"
        return (
            "the aggregator wants a key, and this node has none: it has to join "
            "(`edgedaq-aggregator invite` prints what to type)"
        )
    # Whose end of the connection notices first that only one side has keys is a matter of chance.
    if has_keys:
        return "who answers there is not the aggregator that this node joined, or one that has no keys"
    return "who answers there is no intake, or one that wants a key: then this node has to join"
