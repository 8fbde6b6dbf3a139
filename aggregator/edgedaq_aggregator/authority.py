"""Who may send to this aggregator: the file of authorised nodes, and what follows from it.

``<state_dir>/nodes.toml``, mode 0600, one section per node; a person may edit it, and ``invite``, ``revoke``
and a node that joins write it anew, in one step, under a lock::

    [node1]
    key = "<Z85, 40 characters>"        # empty as long as it has not joined
    topics = ["store", "stats"]         # what it may send; left out: everything
    expires = "2027-01-01"              # UTC; left out: never
    revoked = "2026-11-20T12:00:00Z"    # nobody with this key gets in any more

    [node1.invitation]                  # until it is used, or too old
    digest = "<SHA-256 of the secret, 64 hex digits>"
    until = "2026-11-20T13:00:00Z"

A running intake looks four times a second whether the file has changed. While it cannot be read, what was
read before holds, and is told; at a start, nobody gets in.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from edgedaq.clock import iso_utc
from edgedaq.errors import ConfigError
from edgedaq.keys import SECRET_BYTES, check_key, digest_of, write_private
from edgedaq.names import check_name, check_topic
from edgedaq.typed_toml import build, read_toml

__all__ = [
    "INVITATION_S",
    "NODES_NAME",
    "AuthorisedNode",
    "Authority",
    "Invitation",
    "NodesFile",
    "Standing",
    "moment_ns",
]

NODES_NAME = "nodes.toml"
INVITATION_S = 3600
_HEADER = "# Who may send to this aggregator; docs/security.md tells the keys. Comments here are not kept.\n"
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class Invitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node may join with the secret of this digest."""

    digest: str
    until: str

    def __post_init__(self) -> None:
        if not _DIGEST.match(self.digest):
            message = f"digest must be 64 hex digits, got {self.digest!r}"
            raise ConfigError(message)
        moment_ns("until", self.until)


class AuthorisedNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a node; ``topics`` is None where it may send everything."""

    key: str = ""
    topics: tuple[str, ...] | None = None
    expires: str = ""
    revoked: str = ""
    invitation: Invitation | None = None

    def __post_init__(self) -> None:
        if self.key:
            check_key("key", self.key)
        for topic in self.topics or ():
            check_topic(topic)
        for what, text in (("expires", self.expires), ("revoked", self.revoked)):
            if text:
                moment_ns(what, text)


class Standing(NamedTuple):
    """Whether a key may have a session: as which node, with which topics (None: all), or why not."""

    node: str
    is_allowed: bool
    reason: str
    topics: tuple[str, ...] | None = None


class Authority:
    """The decisions about keys, without I/O. The aggregator's own node has a key that is in no file."""

    def __init__(self, nodes: Mapping[str, AuthorisedNode], own: tuple[str, str] | None = None) -> None:
        self.nodes = dict(nodes)
        self._own = own
        self._by_key = {node.key: name for name, node in self.nodes.items() if node.key}

    def standing(self, key: str, t_utc_ns: int) -> Standing:
        """Return what a key is here."""
        if self._own is not None and key == self._own[1]:
            return Standing(self._own[0], is_allowed=True, reason="")
        name = self._by_key.get(key)
        if name is None:
            return Standing("", is_allowed=False, reason="unknown key")
        node = self.nodes[name]
        if node.revoked:
            return Standing(name, is_allowed=False, reason="revoked key")
        if node.expires and moment_ns("expires", node.expires) <= t_utc_ns:
            return Standing(name, is_allowed=False, reason="expired key")
        return Standing(name, is_allowed=True, reason="", topics=node.topics)

    def is_inviting(self, t_utc_ns: int) -> bool:
        """Tell whether any node may join now."""
        return any(_is_open(node.invitation, t_utc_ns) for node in self.nodes.values())

    def invited(self, secret: bytes, t_utc_ns: int) -> str | None:
        """Return the node whose invitation has that secret."""
        digest = digest_of(secret)
        for name, node in self.nodes.items():
            held = node.invitation
            if held is not None and _is_open(held, t_utc_ns) and secrets.compare_digest(held.digest, digest):
                return name
        return None


class NodesFile:
    """The file, and how it is changed."""

    def __init__(self, state_dir: Path, own_node: str) -> None:
        self.path = state_dir / NODES_NAME
        self._own_node = own_node

    def stamp(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does; None where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns, found.st_size

    def read(self) -> dict[str, AuthorisedNode]:
        """Return what it says; nothing where there is none.

        Raises:
            ConfigError: It cannot be read, or something in it is wrong.
        """
        if not os.path.lexists(self.path):
            return {}
        nodes: dict[str, AuthorisedNode] = {}
        owners: dict[str, str] = {}
        problems: list[str] = []
        for name, section in read_toml(self.path).items():
            where = f"{self.path}: [{name}]"
            try:
                self._check_name(name)
                nodes[name] = node = build(AuthorisedNode, _section(where, section), where)
            except ConfigError as e:
                problems.append(str(e))
                continue
            if node.key and owners.setdefault(node.key, name) != name:
                problems.append(f"{where}: key must not be that of {owners[node.key]!r}")
        if problems:
            raise ConfigError("\n".join(problems))
        return nodes

    def invite(self, node: str, t_utc_ns: int, topics: tuple[str, ...] | None, expires: str) -> bytes:
        """Let a node join within the hour; return the secret. What it has now is valid until it does.

        Raises:
            ConfigError: The name is none, or the file cannot be read or written.
        """
        self._check_name(node)
        secret = secrets.token_bytes(SECRET_BYTES)
        until = iso_utc(t_utc_ns + INVITATION_S * 1_000_000_000)
        with self._changed() as nodes:
            known = nodes.get(node, AuthorisedNode())
            is_over = bool(known.expires) and moment_ns("expires", known.expires) <= t_utc_ns
            nodes[node] = AuthorisedNode(
                key=known.key,
                topics=topics if topics is not None else known.topics,
                expires=expires or ("" if is_over else known.expires),
                revoked=known.revoked,
                invitation=Invitation(digest=digest_of(secret), until=until),
            )
        return secret

    def join(self, secret: bytes, key: str, t_utc_ns: int) -> str | None:
        """Use an invitation up for a key; return the node's name, None if there is no such invitation.

        Raises:
            ConfigError: The file cannot be read or written.
        """
        with self._changed() as nodes:
            name = Authority(nodes).invited(secret, t_utc_ns)
            if name is not None:
                nodes[name] = msgspec.structs.replace(nodes[name], key=key, revoked="", invitation=None)
        return name

    def revoke(self, node: str, t_utc_ns: int) -> None:
        """Let nobody in any more with a node's key, nor with an invitation of it.

        Raises:
            ConfigError: There is no such node, or the file cannot be read or written.
        """
        with self._changed() as nodes:
            if node not in nodes:
                known = ", ".join(sorted(nodes)) or "there are none"
                message = f"{self.path}: has no node {node!r} (known: {known})"
                raise ConfigError(message)
            nodes[node] = msgspec.structs.replace(nodes[node], revoked=iso_utc(t_utc_ns), invitation=None)

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, AuthorisedNode]]:
        """Read, let the caller change, and write; nobody else does meanwhile."""
        try:
            self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            message = f"{self.path}: cannot be written: {e.strerror}"
            raise ConfigError(message) from e
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            nodes = self.read()
            before = dict(nodes)
            yield nodes
            if nodes != before:
                write_private(self.path, _format(nodes))
        finally:
            os.close(lock)

    def _check_name(self, name: str) -> None:
        check_name("node", name)
        if name == self._own_node:
            message = f"node must not be {name!r}, which is the aggregator's own supervisor_id"
            raise ConfigError(message)


def moment_ns(what: str, text: str) -> int:
    """Return a UTC time that a person wrote, in ns; a date is its begin.

    Raises:
        ConfigError: It is none.
    """
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as e:
        message = f"{what} must be a UTC date or time like 2027-01-01 or 2027-01-01T12:00:00Z, got {text!r}"
        raise ConfigError(message) from e
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return int(moment.timestamp() * 1e9)


def _section(where: str, section: object) -> Mapping[str, object]:
    if isinstance(section, Mapping):
        return section
    message = f"{where} must be the section of a node, got {section!r}"
    raise ConfigError(message)


def _is_open(invitation: Invitation | None, t_utc_ns: int) -> bool:
    return invitation is not None and t_utc_ns < moment_ns("until", invitation.until)


def _format(nodes: Mapping[str, AuthorisedNode]) -> str:
    lines = [_HEADER]
    for name, node in nodes.items():
        lines.append(f"\n[{name}]\n")
        held = msgspec.to_builtins(node)
        invitation = held.pop("invitation")
        lines += [f"{key} = {json.dumps(value)}\n" for key, value in held.items() if value not in ("", None)]
        if invitation is not None:
            lines.append(f"\n[{name}.invitation]\n")
            lines += [f"{key} = {json.dumps(value)}\n" for key, value in invitation.items()]
    return "".join(lines)
