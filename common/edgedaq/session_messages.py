"""The control messages of a session: msgpack maps with a ``type``, checked into typed models.

::

    uplink                                   intake
      │ HELLO ─────────────────────────────────► │  node, protocol range, lanes
      │ ◄───────────────────────── WELCOME/REJECT│  limits, first credit  /  code, words, when to try again
      │ DATA, DATA, ... ───────────────────────► │  as far as the credit goes
      │ ◄─────────────────────────────────── ACK │  durable up to, may be sent up to
      │ ◄── RESEND, REFUSED, UNKNOWN, AHEAD ──── │  the intake stands still at `position`; go back to it
      │ PING ──────────────────────────────────► │  every second, with the clock offset found so far
      │ ◄────────────────────────────────── PONG │  with both UTC times of the intake
      │ REPORT ────────────────────────────────► │  statistics of the node; newest wins, may be lost
      │ LIVES ─────────────────────────────────► │  nothing but of these lives can come any more
      │ ◄───────────────────────────── SUBSCRIBE │  what to show of the live plane; to uplinks with "live"
      │ LIVE ──────────────────────────────────► │  some of it; may be lost
      │ BYE ◄──────────────────────────────────► │  why the session ends

    join                                     intake
      │ JOIN ──────────────────────────────────► │  an invitation's secret, under what is to be the node's key
      │ ◄───────────────────────── JOINED/REJECT │  the key may say HELLO from now on

On the wire a control message is u64 xxh3-64 of the rest (little-endian), then the msgpack map: one that was
damaged on the way ends the session, which costs a repetition; an ACK that is believed costs what it names.

What a side does about each is in ``session.py`` of the agent and ``sessions.py`` of the aggregator. Unknown
keys of a map are ignored, so that a newer minor version may add some; an unknown ``type`` is a
``WireError``.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from xxhash import xxh3_64_intdigest

from edgedaq.errors import ChecksumError, WireError

__all__ = [
    "LIVE_TOPICS_MAX",
    "PROTOCOL_VERSION",
    "TOPIC",
    "Ack",
    "Ahead",
    "Bye",
    "FromIntake",
    "FromUplink",
    "Hello",
    "Join",
    "Joined",
    "Live",
    "Lives",
    "Ping",
    "Pong",
    "Refused",
    "Reject",
    "Report",
    "Resend",
    "Subscribe",
    "Unknown",
    "Welcome",
    "decode_from_intake",
    "decode_from_uplink",
    "encode_message",
]

PROTOCOL_VERSION = 1
"""Changes when an old peer could misunderstand; HELLO offers a range, WELCOME names the one that is used."""

TOPIC = "topic"
"""Code of REFUSED: the node may not send a topic of this OPEN; without topics and stores it may be opened."""

U64 = Annotated[int, msgspec.Meta(ge=0)]
"""msgpack itself bounds it above."""
Lane = Annotated[int, msgspec.Meta(ge=0, le=255)]
Word = Annotated[str, msgspec.Meta(max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
LiveTopic = Annotated[str, msgspec.Meta(max_length=600)]
LIVE_TOPICS_MAX = 64


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.upper):
    """One level above all of them; ``type`` is the class's name in capitals."""


class Hello(Message, frozen=True, kw_only=True):
    """An uplink asks for a session; ``instance`` is random per process: it tells two of one node apart.

    ``features`` are what it understands beyond this version's first messages: ``live``.
    """

    protocol_min: U64
    protocol_max: U64
    version: Word
    node: Word
    boot: Word
    instance: Word
    lanes: Annotated[list[Word], msgspec.Meta(min_length=1, max_length=16)]
    features: Annotated[list[Word], msgspec.Meta(max_length=16)] = []


class Welcome(Message, frozen=True, kw_only=True):
    """The session is open; ``credit`` holds for each lane.

    ``stores`` has the keys in ``store_config`` that the aggregator has stores for; None: it does not say.
    """

    protocol: U64
    version: Word
    credit: U64
    max_frame_bytes: U64
    max_part_bytes: U64
    t_utc_ns: U64
    stores: list[Word] | None = None


class Reject(Message, frozen=True, kw_only=True):
    """No session; ``text`` is for a human, and trying again before ``retry_after_s`` is useless."""

    code: Word
    text: Text
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0


class Join(Message, frozen=True, kw_only=True):
    """Who has the secret of an invitation asks to be let in, as the node that it names."""

    node: Word
    secret: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Joined(Message, frozen=True, kw_only=True):
    """The key of this connection is that node's; the secret is used up."""

    node: Word


class Ack(Message, frozen=True, kw_only=True):
    """All before ``durable`` is fsynced in the journal; what ends at or before ``credit`` may be sent."""

    lane: Lane
    durable: U64
    credit: U64


class Resend(Message, frozen=True, kw_only=True):
    """A part was damaged, most likely in transport: it is to be sent again, each frame looked at before."""

    lane: Lane
    position: U64
    text: Text = ""


class Refused(Message, frozen=True, kw_only=True):
    """A frame that arrived whole is refused for what it is.

    A GAP is to replace it; of an OPEN: the whole stream is dropped.
    """

    lane: Lane
    position: U64
    stream: U64
    seq: U64
    code: Word
    text: Text = ""


class Unknown(Message, frozen=True, kw_only=True):
    """A frame's stream has no OPEN here; send that first."""

    lane: Lane
    position: U64
    stream: U64


class Ahead(Message, frozen=True, kw_only=True):
    """Frames are missing before ``seq``: send them, or a GAP from ``expected`` to ``seq - 1``.

    ``rows`` is how many are missing by the rows' own count, None when that does not add up.
    """

    lane: Lane
    position: U64
    stream: U64
    expected: U64
    seq: U64
    rows: U64 | None = None


class Ping(Message, frozen=True, kw_only=True):
    """Times are the sender's; the offset is aggregator minus node, None while not measured.

    ``sent`` is how far each lane had sent before; empty when not told. It shows the intake what got lost.
    """

    t_mono_ns: U64
    t_utc_ns: int
    sent: Annotated[list[U64], msgspec.Meta(max_length=16)] = []
    offset_ns: int | None = None
    error_ns: int | None = None


class Pong(Message, frozen=True, kw_only=True):
    """The PING's times again, and UTC at the intake when it came and when this went."""

    t_mono_ns: U64
    t_utc_ns: int
    received_utc_ns: int
    sent_utc_ns: int


class Report(Message, frozen=True, kw_only=True):
    """A ``NodeReport`` as its map; checked by who merges it."""

    report: dict[str, Any]


class Lives(Message, frozen=True, kw_only=True):
    """All that the node has of other lives of its jobs than these was sent, and is acknowledged.

    The intake closes what is open of the others: nobody is left who could. ``bound_s``: how much of their
    tail can be missing at most.
    """

    lives: Annotated[list[Word], msgspec.Meta(max_length=4096)]
    bound_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Subscribe(Message, frozen=True, kw_only=True):
    """Live topics of the node that somebody in the control room looks at, in place of those before.

    Sent only to uplinks that have the feature ``live``; ``""`` is everything.
    """

    topics: Annotated[list[LiveTopic], msgspec.Meta(max_length=LIVE_TOPICS_MAX)]


class Live(Message, frozen=True, kw_only=True):
    """One message of the node's live plane (``live_messages``), as asked for; may be lost."""

    topic: LiveTopic
    opened: bytes
    frames: bytes


class Bye(Message, frozen=True, kw_only=True):
    """The sender has ended the session, and why."""

    code: Word
    text: Text = ""


FromUplink = Hello | Join | Ping | Report | Lives | Live | Bye
FromIntake = Welcome | Joined | Reject | Ack | Resend | Refused | Unknown | Ahead | Pong | Subscribe | Bye

_CHECK_BYTES = 8
_ENCODER = msgspec.msgpack.Encoder()
_FROM_UPLINK: msgspec.msgpack.Decoder[FromUplink] = msgspec.msgpack.Decoder(FromUplink)
_FROM_INTAKE: msgspec.msgpack.Decoder[FromIntake] = msgspec.msgpack.Decoder(FromIntake)


def encode_message(message: Message) -> bytes:
    """Return a control message as the one part that it is on the wire."""
    raw = _ENCODER.encode(message)
    return xxh3_64_intdigest(raw).to_bytes(_CHECK_BYTES, "little") + raw


def decode_from_uplink(part: bytes) -> FromUplink:
    """Return what an uplink said.

    Raises:
        ChecksumError: It was damaged on the way.
        WireError: It is none of an uplink's messages, or a value is outside its limits.
    """
    raw = _checked(part)
    try:
        return _FROM_UPLINK.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        message = f"not a message of an uplink: {e}"
        raise WireError(message) from e


def decode_from_intake(part: bytes) -> FromIntake:
    """Return what an intake said.

    Raises:
        ChecksumError: It was damaged on the way.
        WireError: It is none of an intake's messages, or a value is outside its limits.
    """
    raw = _checked(part)
    try:
        return _FROM_INTAKE.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        message = f"not a message of an intake: {e}"
        raise WireError(message) from e


def _checked(part: bytes) -> memoryview:
    raw = memoryview(part)[_CHECK_BYTES:]
    if not raw or int.from_bytes(part[:_CHECK_BYTES], "little") != xxh3_64_intdigest(raw):
        message = f"checksum of a control message of {len(part)} bytes does not match"
        raise ChecksumError(message)
    return raw
