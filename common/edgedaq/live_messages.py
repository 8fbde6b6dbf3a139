"""The live plane to the byte: its two endpoints, its topics, its messages.

::

    jobs            XPUB ──► <runtime>/live_in.sock   XSUB ┐
                                                           ├ broker, in the supervisor
    whoever looks   SUB  ──► <runtime>/live.sock      XPUB ┘

A message has three parts::

    topic     one of the stream's topics and a dot: b"store.DAQJobStoreCSV."
    OPEN      the OPEN frame of the stream (``open_info``)
    frames    1 or more whole frames of that stream, back to back, in order of seq (``frame``)

So each message explains itself, whatever was dropped before it. A subscription is a topic with the same dot
at its end, or nothing for everything: ZMQ compares the first bytes, and because of the dots ``node1`` never
matches ``node10``. Beside the topics that a job has put a stream under, each has ``job.<unique id>``.

In the control room a topic of a node has its name before it: ``node.n1.store.X``.

A stream with several topics is sent once for each that somebody asked for; who has asked for several tells
by (stream, seq). Nothing here is acknowledged or sent again: what finds a queue full is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from edgedaq.errors import WireError
from edgedaq.frame import MAX_FRAME_BYTES, Frame, decode, split
from edgedaq.open_info import OpenInfo, decode_open

__all__ = [
    "LIVE_BYTES_MAX",
    "LIVE_QUEUE",
    "NODE_TOPIC",
    "LivePart",
    "covering_topics",
    "decode_live",
    "job_topic",
    "live_topics_of",
    "looking_address",
    "node_topic",
    "publishing_address",
    "subscription",
]

LIVE_BYTES_MAX = MAX_FRAME_BYTES + (256 << 10)
"""No part of a message is longer."""

LIVE_QUEUE = 16
"""Messages that wait at each end of a way; each has at most 256 KiB or one frame, so this bounds bytes."""


NODE_TOPIC = "node"
"""Below it are, in the control room, the live topics of nodes."""


class LivePart(NamedTuple):
    """The content of one message."""

    topic: str
    info: OpenInfo
    frames: list[Frame]


def publishing_address(runtime_dir: Path) -> str:
    """Return where jobs publish."""
    return f"ipc://{os.fspath(runtime_dir / 'live_in.sock')}"


def looking_address(runtime_dir: Path) -> str:
    """Return where anyone looks who may open it."""
    return f"ipc://{os.fspath(runtime_dir / 'live.sock')}"


def job_topic(unique_id: str) -> str:
    """Return the live topic that has all that a job puts."""
    return f"job.{unique_id}"


def node_topic(node: str, topic: str) -> str:
    """Return what a live topic of a node is called in the control room; of ``""``: all of the node."""
    return ".".join([NODE_TOPIC, node, topic] if topic else [NODE_TOPIC, node])


def live_topics_of(info: OpenInfo) -> tuple[str, ...]:
    """Return all live topics of a stream."""
    return (*info.topics, job_topic(info.job))


def subscription(topic: str) -> bytes:
    """Return what ZMQ is to compare: for a message that is published, and for one that is wanted."""
    return f"{topic}.".encode() if topic else b""


def covering_topics(topics: Iterable[str], subscriptions: Iterable[bytes]) -> list[bytes]:
    """Return topics under which a message reaches every subscription that any of its topics matches."""
    left = set(subscriptions)
    found: list[bytes] = []
    for topic in map(subscription, topics):
        reached = {wanted for wanted in left if topic.startswith(wanted)}
        if reached:
            found.append(topic)
            left -= reached
    return found


def decode_live(parts: Sequence[bytes], known: dict[bytes, OpenInfo]) -> LivePart:
    """Return what a message has, checked to the last byte.

    Args:
        known: OPEN frames that were decoded before; this one is added.

    Raises:
        WireError: It is not a message of the live plane.
    """
    if len(parts) != 3 or not parts[0].endswith(b".") or not parts[0].isascii():
        message = f"a live message has a topic with a dot, an OPEN and frames, got {len(parts)} parts"
        raise WireError(message)
    opened = decode(memoryview(parts[1]))
    info = known.get(parts[1])
    if info is None:
        info = known[parts[1]] = decode_open(opened)
    frames = list(_of_stream(split(memoryview(parts[2])), opened.stream))
    return LivePart(parts[0][:-1].decode(), info, frames)


def _of_stream(frames: Iterator[Frame], stream: int) -> Iterator[Frame]:
    for frame in frames:
        if frame.stream != stream:
            message = f"a live message of stream {stream:016x} has a frame of stream {frame.stream:016x}"
            raise WireError(message)
        yield frame
