"""What a producer and its consumers say to each other about a ring: msgpack maps with a ``type``.

::

    consumer                                       producer
       │ subscribe {consumer, topics, policy, limit_bytes}
       │──────────────────────────────────────────────►│   first message of a connection
       │            ring {from, opens_bytes, next}     │   nothing before `from` will come
       │◄──────────────────────────────────────────────│
       │ runs {runs: [[position, bytes, count], ...], opens_bytes}
       │◄──────────────────────────────────────────────│   whole frames back to back at each position
       │ release {position}                            │   cumulative: never again read before it
       │──────────────────────────────────────────────►│

``opens_bytes`` is how much of the opens area may be read. ``next`` says, per stream, the seq and the row that
the consumer has not had yet; a stream that it does not name begins at its OPEN. A frame that is beyond that
tells by its own seq and row how much is missing before it.

With policy ``wait`` the frames of a run lie in the ring, and stay there until they are released. Who has
another policy is sent, in place of ``runs``::

       │ copies {end, count, opens_bytes}, frames      │   two parts: the message, and the frames themselves
       │◄──────────────────────────────────────────────│

A message that is not one of these is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgedaq.errors import WireError

__all__ = [
    "CopiesTold",
    "InputPolicy",
    "Release",
    "RingBegin",
    "Runs",
    "Subscribe",
    "decode_from_consumer",
    "decode_from_producer",
    "encode_control",
]

Position = Annotated[int, msgspec.Meta(ge=0)]
InputPolicy = Literal["wait", "drop_oldest", "drop_newest"]


class Subscribe(msgspec.Struct, tag_field="type", tag="subscribe"):
    """A consumer wants the streams whose topics its subscriptions cover, and holds the ring for them.

    ``policy`` is what happens when the consumer is too slow: ``wait`` lets the producer wait; with the others
    it holds nothing, and misses the oldest or the newest of what is more than ``limit_bytes`` behind.
    """

    consumer: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    topics: Annotated[list[Annotated[str, msgspec.Meta(max_length=600)]], msgspec.Meta(max_length=256)]
    policy: InputPolicy = "wait"
    limit_bytes: Position = 0


class Release(msgspec.Struct, tag_field="type", tag="release"):
    """The consumer needs nothing before ``position`` any more."""

    position: Position


class RingBegin(msgspec.Struct, tag_field="type", tag="ring"):
    """Answer to ``subscribe``."""

    begin: Position = msgspec.field(name="from")
    opens_bytes: Position
    next: dict[Position, tuple[Position, Position]] = {}


class Runs(msgspec.Struct, tag_field="type", tag="runs"):
    """Frames that may be read now, in order of position."""

    runs: list[tuple[Position, Position, Position]]
    opens_bytes: Position


class CopiesTold(msgspec.Struct, tag_field="type", tag="copies"):
    """Frames follow in a part of their own; ``end`` is what releases them."""

    end: Position
    count: Position
    opens_bytes: Position


_encoder = msgspec.msgpack.Encoder()
_from_consumer: msgspec.msgpack.Decoder[Subscribe | Release] = msgspec.msgpack.Decoder(Subscribe | Release)
_from_producer: msgspec.msgpack.Decoder[RingBegin | Runs | CopiesTold] = msgspec.msgpack.Decoder(
    RingBegin | Runs | CopiesTold
)


def encode_control(message: Subscribe | Release | RingBegin | Runs | CopiesTold) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def decode_from_consumer(raw: bytes) -> Subscribe | Release:
    """Return what a consumer sent.

    Raises:
        WireError: It is not a message of this protocol.
    """
    try:
        return _from_consumer.decode(raw)
    except msgspec.DecodeError as e:
        message = f"a ring's consumer sent what is not valid: {e}"
        raise WireError(message) from e


def decode_from_producer(raw: bytes) -> RingBegin | Runs | CopiesTold:
    """Return what a producer sent.

    Raises:
        WireError: It is not a message of this protocol.
    """
    try:
        return _from_producer.decode(raw)
    except msgspec.DecodeError as e:
        message = f"a ring's producer sent what is not valid: {e}"
        raise WireError(message) from e
