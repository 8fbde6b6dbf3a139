"""``join``: how a node gets its key, and an aggregator gets to know it.

The key is made here and stays here. The connection is encrypted to the aggregator's key that the token bears,
so only that aggregator can answer; the token's secret, sent over it, is what lets this node's key in. The key
lies on the disk before it is sent, as ``.enrolment.key.joining``, so that a join whose answer got lost can be
repeated with the same key, which the aggregator then has already.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import zmq
from edgedaq.errors import ConfigError, EdgeDAQError, WireError
from edgedaq.keys import (
    ENROLMENT_NAME,
    Enrolment,
    Token,
    new_key_pair,
    read_enrolment,
    unpack_token,
    write_enrolment,
)
from edgedaq.main_config import read_main
from edgedaq.monitor_events import read_event
from edgedaq.session_messages import Join, Joined, Reject, decode_from_intake, encode_message
from edgedaq.transport import check_address

from edgedaq_agent.config import FILE_NAME, AgentConfig
from edgedaq_agent.dialling import FAILED_EVENTS, Destination, open_dealer, why_failed

__all__ = ["JoinError", "join"]

_JOIN_WITHIN_S = 10.0


class JoinError(EdgeDAQError):
    """The node was not let in; trying again may help, or a new invitation."""


def join(config_dir: Path, address: str, token_text: str) -> Enrolment:
    """Join an aggregator; return the enrolment, which is on the disk then. Blocks up to 10 s.

    A directory without ``agent.toml`` gets one that bears the node's name; without a directory, one is made.

    Raises:
        ConfigError: The address, the token or what is in the directory does not fit.
        JoinError: The aggregator did not answer, or refused.
    """
    address = check_address("ADDRESS", address, has_keys=True)
    token = unpack_token(token_text)
    try:
        config_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as e:
        message = f"{config_dir}: cannot be made: {e.strerror}"
        raise ConfigError(message) from e
    main = config_dir / FILE_NAME
    if main.exists():
        _check_main(main, address, token)
    pending = config_dir / f".{ENROLMENT_NAME}.joining"
    enrolment = _prepared(pending, address, token)
    _ask(Destination(address, enrolment.keys, token.aggregator_key), token)
    write_enrolment(config_dir / ENROLMENT_NAME, enrolment)
    pending.unlink(missing_ok=True)
    if not main.exists():
        main.write_text(f"supervisor_id = {json.dumps(token.node)}\n", encoding="utf-8")
    return enrolment


def _check_main(main: Path, address: str, token: Token) -> None:
    config = read_main(AgentConfig, main)
    if config.supervisor_id != token.node:
        message = (
            f"{main}: supervisor_id must be {token.node!r}, the node that was invited, "
            f"got {config.supervisor_id!r}"
        )
        raise ConfigError(message)
    if config.aggregator and check_address("aggregator", config.aggregator, has_keys=True) != address:
        message = f"{main}: aggregator must be {address!r} or be left out, got {config.aggregator!r}"
        raise ConfigError(message)


def _prepared(pending: Path, address: str, token: Token) -> Enrolment:
    """Return what is to be this node's enrolment: that of an unfinished attempt, or a new one."""
    with contextlib.suppress(ConfigError):
        held = read_enrolment(pending)
        if held is not None and (held.node, held.aggregator_key) == (token.node, token.aggregator_key):
            return Enrolment(
                node=held.node,
                aggregator=address,
                aggregator_key=held.aggregator_key,
                secret_key=held.secret_key,
            )
    enrolment = Enrolment(
        node=token.node,
        aggregator=address,
        aggregator_key=token.aggregator_key,
        secret_key=new_key_pair().secret,
    )
    write_enrolment(pending, enrolment)
    return enrolment


def _ask(destination: Destination, token: Token) -> None:
    """Send JOIN and wait for the answer.

    Raises:
        JoinError: It was refused, or there was none.
    """
    with zmq.Context() as context:
        socket = open_dealer(destination, context)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILED_EVENTS)
        try:
            socket.connect(destination.address)
            _converse(socket, monitor, destination.address, Join(node=token.node, secret=token.secret))
        finally:
            with contextlib.suppress(zmq.ZMQError):
                socket.disable_monitor()
            monitor.close(0)
            socket.close(0)


def _converse(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], address: str, join: Join) -> None:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    deadline = time.monotonic() + _JOIN_WITHIN_S
    while (left_s := deadline - time.monotonic()) > 0:
        ready: dict[Any, int] = dict(poller.poll(int(left_s * 1000) + 1))
        if socket in ready:
            _check_answer(socket.recv_multipart(), address)
            return
        if monitor in ready:
            told = read_event(monitor)
            if told.event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                socket.send(encode_message(join), zmq.NOBLOCK)
                continue
            if told.event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                reason = "the token is not valid (any more), or too many try to join: ask for a new one"
            else:
                reason = why_failed(told.event, told.value, has_keys=True, had_handshake=False)
                reason = reason.replace("this node joined", "the token is of")
            message = f"{address}: {reason}"
            raise JoinError(message)
    message = f"{address}: no answer within {_JOIN_WITHIN_S:g} s; is it right, and is the aggregator running?"
    raise JoinError(message)


def _check_answer(parts: list[bytes], address: str) -> None:
    try:
        answer = decode_from_intake(parts[0])
    except WireError as e:
        message = f"{address}: {e}"
        raise JoinError(message) from e
    match answer:
        case Joined():
            return
        case Reject():
            message = f"{address}: refused: {answer.text}"
        case _:
            message = f"{address}: an answer that is none: {type(answer).__name__}"
    raise JoinError(message)
