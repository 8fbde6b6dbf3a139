"""``invite``, ``revoke`` and ``nodes``: who may send, for a person at the aggregator, whether or not it runs.

The first two change the file of authorised nodes, which a running intake reads again at once.
"""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from edgedaq.clock import utc_ns
from edgedaq.command_line import say, show_status
from edgedaq.control import ControlError, request
from edgedaq.errors import ConfigError
from edgedaq.keys import Token, aggregator_keys, pack_token
from edgedaq.main_config import make_directory
from edgedaq.names import check_topic
from edgedaq.tables import format_status, table
from edgedaq.transport import check_address, is_loopback

from edgedaq_aggregator.authority import AuthorisedNode, Authority, NodesFile, moment_ns

if TYPE_CHECKING:
    from edgedaq_aggregator.app import Aggregator

__all__ = ["add_invite", "invite", "own_address", "revoke", "show_nodes"]

_COLUMNS = ("node", "standing", "key", "topics", "expires", "last heard of")
_ANY = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # to recognise them
_WIDTH = 140


def add_invite(parser: argparse.ArgumentParser) -> None:
    """Let a command take the options of ``invite``."""
    for option, name, text in (
        ("--topics", "A,B", "what it may send; not given: as before, a new node everything"),
        ("--expires", "DATE", "until when its key is valid, UTC; not given: as before, a new one for ever"),
        (
            "--address",
            "ADDRESS",
            "where the node finds this aggregator; not given: one of this machine",
        ),
    ):
        parser.add_argument(option, default="", metavar=name, help=text)


def invite(aggregator: Aggregator, options: argparse.Namespace) -> str:
    """Let a node join within the hour; return what to type there.

    Raises:
        ConfigError: No node could reach this aggregator, or what was typed is not allowed.
    """
    config, node = aggregator.config, aggregator.place.node
    state_dir = _state_dir(aggregator)
    if not config.has_keys:
        message = (
            f"{aggregator.path}: listen must be an address that other machines reach, e.g. "
            f'"tcp://0.0.0.0:7770", got {aggregator.listen or "none"!r}: jobs of this machine need no keys'
        )
        raise ConfigError(message)
    if options.expires and moment_ns("--expires", options.expires) <= utc_ns():
        message = f"--expires must be in the future, got {options.expires!r}"
        raise ConfigError(message)
    topics = tuple(check_topic(topic) for topic in options.topics.split(",")) if options.topics else None
    addresses = _addresses(aggregator.listen)
    if options.address:
        addresses = [check_address("--address", options.address, has_keys=True)]
    make_directory(aggregator.path, "state_dir", state_dir)
    keys = aggregator_keys(state_dir)
    secret = NodesFile(state_dir, node).invite(options.node, utc_ns(), topics, options.expires)
    token = pack_token(Token(options.node, keys.public, secret))
    lines = ["on the node, within an hour, once:", ""]
    lines += [f"  edgedaq-agent join {address} {token} --config-dir DIR" for address in addresses[:1]]
    lines += [f"  (this machine is also {address})" for address in addresses[1:]]
    return "\n".join(lines)


def revoke(aggregator: Aggregator, node: str) -> str:
    """Let a node in no more; return what was done.

    Raises:
        ConfigError: There is no such node.
    """
    NodesFile(_state_dir(aggregator), aggregator.place.node).revoke(node, utc_ns())
    return f"{node} is revoked, its session ends now; a new invitation lets it in again"


def show_nodes(aggregator: Aggregator, *, as_json: bool, watch: bool) -> int:
    """Print the nodes of the file, and what a running aggregator knows of them; return the exit status.

    Raises:
        ConfigError: The file cannot be read.
    """
    place, path = aggregator.place, aggregator.place.config_dir
    authorised = NodesFile(_state_dir(aggregator), place.node)
    nodes = authorised.read()
    if not nodes or watch:
        # Without keys there is nothing but what a running one tells; and only that changes.
        return show_status(
            place.runtime_dir,
            f"edgedaq-aggregator run --config-dir {path}",
            as_json=as_json,
            watch=watch,
            refine=lambda status: _only_nodes(status, authorised.read()),
            render=_render,
        )
    try:
        status = _only_nodes(request(place.runtime_dir, "status"), nodes)
    except ControlError:
        status = {"authorised": _facts(nodes, {})}
    say(json.dumps(status, default=str) if as_json else _render(status))
    return 0


def own_address(listen: str) -> str:
    """Return where a process of this machine finds who listens on an address."""
    host, _, port = listen.removeprefix("tcp://").rpartition(":")
    return f"tcp://{_ANY.get(host, host)}:{port}"


def _state_dir(aggregator: Aggregator) -> Path:
    """Return where the state is: a running aggregator, whose service manager may have chosen, knows best."""
    place = aggregator.place
    try:
        return Path(request(place.runtime_dir, "status")["state_dir"])
    except ControlError:
        return place.state_dir


def _addresses(listen: str) -> list[str]:
    """Return where other machines may find who listens on an address, the likeliest first."""
    host, _, port = listen.removeprefix("tcp://").rpartition(":")
    if host not in _ANY:
        return [listen]
    found = [
        f"tcp://{address.address}:{port}"
        for _, held in sorted(psutil.net_if_addrs().items())
        for address in held
        if address.family == socket.AF_INET and not is_loopback(f"tcp://{address.address}:1")
    ]
    return found or [f"tcp://{socket.gethostname()}:{port}"]


def _only_nodes(status: Mapping[str, Any], nodes: Mapping[str, AuthorisedNode]) -> dict[str, Any]:
    statistics = status["statistics"]["nodes"]
    heard = {str(row.get("supervisor")): row.get("last_active") for row in statistics}
    return {"statistics": {"nodes": statistics}, "authorised": _facts(nodes, heard)}


def _facts(nodes: Mapping[str, AuthorisedNode], heard: Mapping[str, Any]) -> list[dict[str, Any]]:
    authority, now_ns = Authority(nodes), utc_ns()
    return [
        {
            "node": name,
            "standing": _standing(authority, node, now_ns),
            "key": node.key,
            "topics": node.topics,
            "expires": node.expires,
            "last_active": heard.get(name),
        }
        for name, node in nodes.items()
    ]


def _standing(authority: Authority, node: AuthorisedNode, now_ns: int) -> str:
    invitation = node.invitation
    is_invited = invitation is not None and now_ns < moment_ns("until", invitation.until)
    told = "invited" if is_invited else "never joined"
    if node.key:
        reason = authority.standing(node.key, now_ns).reason.removesuffix(" key") or "joined"
        told = f"{reason}, invited" if is_invited else reason
    return told


def _render(status: dict[str, Any]) -> str:
    parts = [format_status(status)] if "statistics" in status else []
    rows = [
        (
            row["node"],
            row["standing"],
            row["key"],
            "all" if row["topics"] is None else " ".join(row["topics"]),
            row["expires"] or "never",
            row["last_active"],
        )
        for row in status["authorised"]
    ]
    if rows:
        parts.append(table(_COLUMNS, rows, width=_WIDTH))
    return "\n\n".join(part for part in parts if part)
