"""The bytes of hop 2: how DATA is framed on a session, where it may go, and which socket options it needs.

A session is one DEALER of an uplink connected to the ROUTER of an intake. A ZMQ message is either

- one part: a control message, a checked msgpack map with a ``type`` (``session_messages.py``), or
- two parts: DATA, a fixed header and one part of whole frames back to back.

The header of DATA, little-endian, 32 bytes::

    offset  size  field
         0     3  magic       b"EDS"
         3     1  version     1
         4     1  lane        number of the lane in HELLO, 0 is ``data``
         5     1  flags       FLAG_REPLAY: from the spool; such data say nothing about latency
         6     2  reserved    0; ignored
         8     8  position    bytes of this lane that this session sent before this part
        16     4  count       frames in the part
        20     4  part_bytes  length of the part
        24     8  check       xxh3-64 of bytes 0 .. 24

Positions count the bytes of parts, from 0 at the start of a session, per lane. The intake takes a part only
at the position where the part before it ended; everything else it ignores. ACK says up to which position all
is durable in the journal, and up to which position may be sent, so that a lost or repeated ACK harms
nothing. When something is wrong with a part the intake stands still at its start and says so (RESEND,
REFUSED, UNKNOWN, AHEAD); the uplink goes back to that position. Frames that arrive twice are dropped by
their identity, never by position.

The I/O on the sockets is done by their owners, ``session.py`` of the agent and ``intake.py`` of the
aggregator.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

import zmq
from xxhash import xxh3_64_intdigest

from edgedaq.errors import ChecksumError, ConfigError, WireError
from edgedaq.frame import MAX_FRAME_BYTES

__all__ = [
    "DATA_HEADER_BYTES",
    "FLAG_REPLAY",
    "MAX_PART_BYTES",
    "PART_BYTES",
    "PART_BYTES_MIN",
    "PING_INTERVAL_S",
    "SILENCE_LIMIT_S",
    "WINDOW_BYTES",
    "DataHeader",
    "backoff_s",
    "check_address",
    "is_loopback",
    "pack_data_header",
    "set_dealer_options",
    "set_router_options",
    "unpack_data_header",
]

PART_BYTES = 1 << 20
"""What there is to send is joined up to this; only a single frame may be larger."""

PART_BYTES_MIN = 4096
"""On a cable that damages many, parts become as small as this, or as one frame."""

MAX_PART_BYTES = MAX_FRAME_BYTES + PART_BYTES
"""No part of any message is larger; libzmq cuts the connection of who tries."""

WINDOW_BYTES = 16 << 20
"""Default of what may be on its way, unacknowledged, per session and lane."""

PING_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 3.0
"""A session in which nothing was heard for so long is dead; both sides hold to it."""

FLAG_REPLAY = 1

DATA_HEADER_BYTES = 32
_VERSION = 1
_MAGIC = b"EDS" + bytes([_VERSION])
_MAGIC_INT = int.from_bytes(_MAGIC, "little")
_HEADER = struct.Struct("<IBBHQII")
_CHECK = struct.Struct("<Q")
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LIMIT_S = 5.0
_RECEIVED_MAX = 64
"""Messages of one peer that wait in memory; honest ones are bounded by their credit before that."""
_KEEPALIVE_IDLE_S = 20
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:/]+):(?P<port>[0-9]{1,5})\Z")


class DataHeader(NamedTuple):
    """What is said about one part of frames."""

    lane: int
    flags: int
    position: int
    frame_count: int
    part_bytes: int


def pack_data_header(lane: int, flags: int, position: int, count: int, part_bytes: int) -> bytes:
    """Return the first part of a DATA message."""
    head = _HEADER.pack(_MAGIC_INT, lane, flags, 0, position, count, part_bytes)
    return head + _CHECK.pack(xxh3_64_intdigest(head))


def unpack_data_header(header: bytes) -> DataHeader:
    """Return the checked header of a DATA message.

    Raises:
        ChecksumError: It was damaged on the way.
        WireError: It is not a header of this version.
    """
    if len(header) != DATA_HEADER_BYTES:
        message = f"the header of DATA has {DATA_HEADER_BYTES} bytes, got {len(header)}"
        raise WireError(message)
    if header[:4] != _MAGIC:
        if header[:3] == _MAGIC[:3]:
            message = f"DATA version {header[3]} is not known here, this is version {_VERSION}"
        else:
            message = f"no DATA: expected magic {_MAGIC!r}, got {header[:4]!r}"
        raise WireError(message)
    if _CHECK.unpack_from(header, 24)[0] != xxh3_64_intdigest(header[:24]):
        message = "checksum of a DATA header does not match"
        raise ChecksumError(message)
    _, lane, flags, _, position, count, part_bytes = _HEADER.unpack_from(header)
    return DataHeader(lane, flags, position, count, part_bytes)


def check_address(what: str, address: str, *, listens: bool = False, has_keys: bool = False) -> str:
    """Return a configured address such as ``tcp://127.0.0.1:7770`` as libzmq is to get it.

    Args:
        what: File and key, for the message.
        listens: Whether to listen there; port 0 then means any free one.
        has_keys: Whether sessions are encrypted and authenticated; without, they stay on this machine.

    Raises:
        ConfigError: It is no such address, or plain text would leave this machine.
    """
    match = _ADDRESS.match(address)
    if match is None:
        message = f"{what} must be tcp://HOST:PORT, e.g. tcp://127.0.0.1:7770, got {address!r}"
        raise ConfigError(message)
    port = int(match["port"])
    first = 0 if listens else 1
    if not first <= port <= 0xFFFF:
        message = f"{what} must have a port from {first} to 65535, got {port} in {address!r}"
        raise ConfigError(message)
    host = match["host"].strip("[]")
    if not has_keys and not _is_this_machine(host):
        message = (
            f"{what} must be an address of this machine alone (127.0.0.1, ::1 or localhost) as long as "
            f"this node has no key, got {address!r}; `edgedaq-aggregator invite` and `edgedaq-agent join` "
            f"give it one"
        )
        raise ConfigError(message)
    return f"tcp://127.0.0.1:{port}" if host == "localhost" else address


def backoff_s(attempt: int, chance: float) -> float:
    """Return how long to wait before a new attempt: full jitter below an exponential limit.

    Args:
        attempt: 0 after the first failure, 1 after the second, ...
        chance: Uniform in [0, 1), drawn by the caller.

    Returns:
        Seconds, from 0.1 to 5; hundreds of agents that lost one aggregator spread over all of it.
    """
    limit_s: float = min(_BACKOFF_LIMIT_S, _BACKOFF_FIRST_S * 2 ** min(attempt + 1, 16))
    return _BACKOFF_FIRST_S + chance * (limit_s - _BACKOFF_FIRST_S)


def set_dealer_options(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Set what the DEALER of a session needs, before it connects.

    It never reconnects by itself: what libzmq had queued for the old connection would be lost without a word.
    """
    _set_common(socket, endpoint)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)


def set_router_options(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Set what the ROUTER of an intake needs, before it binds."""
    _set_common(socket, endpoint)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RCVHWM, _RECEIVED_MAX)


def _set_common(socket: zmq.Socket[bytes], endpoint: str) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(SILENCE_LIMIT_S * 1000))
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_COUNT)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


def is_loopback(address: str) -> bool:
    """Tell whether an address that ``check_address`` took is one of this machine alone."""
    match = _ADDRESS.match(address)
    return match is not None and _is_this_machine(match["host"].strip("[]"))


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
