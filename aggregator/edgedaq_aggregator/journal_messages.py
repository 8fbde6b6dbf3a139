"""What the journal and those who follow it say to each other, on ``<runtime>/journal.sock``.

::

    follower                                      journal
      REGISTER {store, position, from_begin} ──►  the journal waits for this store from now on
                                             ◄──  TAIL {begin, durable, start}: begin reading at ``start``
      POSITION {store, position}             ──►  all before it is durable in the store
                                             ◄──  TAIL {begin, durable}: and each time durable moves
      FORGET {store}                         ──►  the journal waits for this store no longer
                                             ◄──  TAIL {begin, durable}

The follower repeats REGISTER until it is answered, and POSITION once a second also when nothing has changed:
a journal that was started anew answers a POSITION of somebody it does not know as if it were a REGISTER.
``start`` differs from the position that was registered only if the journal does not reach that far (it was
replaced, or lost its end): then it is the begin of what there is.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from edgedaq.errors import WireError

__all__ = [
    "MESSAGE_BYTES_MAX",
    "Forget",
    "FromFollower",
    "Position",
    "Register",
    "Tail",
    "decode_request",
    "decode_tail",
    "encode",
    "socket_address",
]

MESSAGE_BYTES_MAX = 4096
_POSITION_MAX = (1 << 64) - 1


class Register(msgspec.Struct, tag="REGISTER", tag_field="type", frozen=True):
    """A store begins to follow; ``position`` None when it never stored anything."""

    store: str
    position: int | None = None
    from_begin: bool = True


class Position(msgspec.Struct, tag="POSITION", tag_field="type", frozen=True):
    """All before ``position`` is durable in the store."""

    store: str
    position: int


class Forget(msgspec.Struct, tag="FORGET", tag_field="type", frozen=True):
    """A store will not come again; said by a person's command, not by a follower."""

    store: str


class Tail(msgspec.Struct, tag="TAIL", tag_field="type", frozen=True):
    """What of the journal may be read."""

    begin: int
    durable: int
    start: int | None = None


FromFollower = Register | Position | Forget

_REQUEST = msgspec.msgpack.Decoder(FromFollower)
_TAIL = msgspec.msgpack.Decoder(Tail)


def socket_address(runtime_dir: Path) -> str:
    """Return where the journal of an aggregator is reached."""
    return f"ipc://{runtime_dir}/journal.sock"


def encode(message: FromFollower | Tail) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_request(parts: list[bytes]) -> FromFollower:
    """Return what a follower says in the parts of one message.

    Raises:
        WireError: It is none of these messages.
    """
    if len(parts) != 1:
        message = f"a follower's message has one part, got {len(parts)}"
        raise WireError(message)
    try:
        request: FromFollower = _REQUEST.decode(parts[0])
    except msgspec.MsgspecError as e:
        message = f"a follower of the journal says what is not known here: {e}"
        raise WireError(message) from e
    if isinstance(request, Forget) or request.position is None:
        return request
    if not 0 <= request.position <= _POSITION_MAX:
        message = f"a position must be 0 to {_POSITION_MAX}, got {request.position}"
        raise WireError(message)
    return request


def decode_tail(data: bytes) -> Tail:
    """Return what the journal says.

    Raises:
        WireError: It is not TAIL.
    """
    try:
        return _TAIL.decode(data)
    except msgspec.MsgspecError as e:
        message = f"the journal says what is not known here: {e}"
        raise WireError(message) from e
