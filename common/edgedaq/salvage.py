"""What a dead producer had put: a pure function of its ring, the same for every consumer.

Only after the kernel has reported the death (``ring.is_alive``). In order::

    1  the frames from ``released`` to ``published``, as they lie
    2  per slot, the rows beyond those that are sealed, as one frame more of their stream (``tail``)
    3  per stream that is not closed, a CLOSE with its number of rows (``tail``)

The producer may have died between any two of its stores (the drawing in ``ring``):

===================================== =================================================================
died after                            and so
===================================== =================================================================
part of a row or message in a slot    ``commit`` does not count it: never put
``commit``                            the row is in 2; its time may not be known, then the latest known is
part of a frame in the data area      ``published`` does not reach it: its rows are in 2
``published``                         the frame is in 1; it bears seq and rows, which move the stream's
                                      account, so that 2 does not repeat it
``next_seq``, ``rows`` of the stream  the same
``commit = 0`` of a rewind            no rows in the slot; all are in 1, or released
a frame in the opens area             ``opens_used`` or the data area do not have it: nothing was put
===================================== =================================================================

The account of a stream is therefore the maximum of what its entry and its frames say: an entry lags at most
by the frame that was published last, and that frame cannot have been released yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgedaq.delivery import gap_of
from edgedaq.errors import WireError
from edgedaq.frame import HEADER_BYTES, Frame, Kind, decode, encode, pack_map
from edgedaq.open_frames import body_limit, slot_bodies
from edgedaq.ring_layout import (
    PAD,
    STREAMS_MAX,
    W_CLOSED,
    W_COMMIT,
    W_FORM,
    W_NEXT_SEQ,
    W_OPENS_USED,
    W_PUBLISHED,
    W_RELEASED,
    W_ROW_BASE,
    W_ROWS,
    W_SLOT_STREAM,
    W_STREAM,
    W_T_FIRST,
    W_T_PUT,
    W_WIDTH,
    Layout,
    read_layout,
)
from edgedaq.schema import OpenInfo, decode_open

__all__ = ["FrameAt", "Salvaged", "close_body", "read_opens", "salvage", "walk"]


@dataclass(frozen=True, slots=True)
class FrameAt:
    """One frame of the data area."""

    position: int
    length: int
    stream: int


@dataclass(frozen=True, slots=True)
class Salvaged:
    """All that is left of a life.

    ``frames`` lie in the data area; ``tail`` are frames made of the slots, which follow those.
    """

    released: int
    published: int
    opens: dict[int, bytes]
    frames: list[FrameAt]
    tail: list[bytes]


@dataclass(slots=True)
class _Account:
    next_seq: int = 0
    rows: int = 0
    closed: bool = False


@dataclass(slots=True)
class _Times:
    """Latest times known; what the producer had no time to stamp gets them."""

    first_ns: int
    put_ns: int = 0


def salvage(buffer: memoryview) -> Salvaged:
    """Return what a mapped ring holds that was not released; its producer must be dead.

    Raises:
        WireError: The memory is not what a producer leaves, wherever it dies.
    """
    layout = read_layout(buffer)
    words = layout.header_words(buffer)
    released, published, opens_used = words[W_RELEASED], words[W_PUBLISHED], words[W_OPENS_USED]
    opens = read_opens(buffer, layout, 0, opens_used)
    accounts: dict[int, _Account] = {}
    for index in range(STREAMS_MAX):
        entry = layout.words(buffer, layout.entry_offset(index))
        if entry[W_STREAM]:
            accounts[entry[W_STREAM]] = _Account(entry[W_NEXT_SEQ], entry[W_ROWS], bool(entry[W_CLOSED]))
    times = _Times(layout.t_birth_ns)
    frames: list[FrameAt] = []
    for position, frame in walk(buffer, layout, released, published):
        frames.append(FrameAt(position, len(frame.raw), frame.stream))
        times.first_ns = max(times.first_ns, frame.t_first_ns)
        times.put_ns = max(times.put_ns, frame.t_put_ns)
        _apply(accounts.setdefault(frame.stream, _Account()), frame)
    tail: list[bytes] = []
    for index in range(layout.slots):
        tail += _slot_frames(buffer, layout, index, opens, accounts, times)
    for stream, account in accounts.items():
        if not account.closed and account.next_seq:
            body = close_body(account.rows)
            tail.append(encode(Kind.CLOSE, stream, account.next_seq, body, row0=account.rows))
    return Salvaged(released, published, opens, frames, tail)


def close_body(rows: int) -> bytes:
    """Return the body of a CLOSE of which nothing is unknown."""
    return pack_map({"rows": rows, "tail_unknown": False, "bound_s": 0.0})


def read_opens(buffer: memoryview, layout: Layout, begin: int, end: int) -> dict[int, bytes]:
    """Return the OPEN frames between two positions of the opens area, by stream.

    Raises:
        WireError: There are no such frames there.
    """
    if not 0 <= begin <= end <= layout.opens_bytes:
        message = f"the opens area has {layout.opens_bytes} bytes, got {begin} to {end}"
        raise WireError(message)
    area = buffer[layout.opens_offset : layout.opens_offset + end]
    found: dict[int, bytes] = {}
    while begin < end:
        frame = decode(area, begin)
        found[frame.stream] = bytes(frame.raw)
        begin += len(frame.raw)
    return found


def walk(buffer: memoryview, layout: Layout, begin: int, end: int) -> list[tuple[int, Frame]]:
    """Return position and frame of all between two positions of the data area, checked.

    Raises:
        WireError: Something else lies there.
    """
    size = layout.ring_bytes
    if not 0 <= begin <= end <= begin + size or begin % 8:
        message = f"a ring of {size} bytes cannot hold what lies between {begin} and {end}"
        raise WireError(message)
    found: list[tuple[int, Frame]] = []
    area = buffer[layout.data_offset : layout.data_offset + size]
    while begin < end:
        at = begin % size
        left = size - at
        if left < HEADER_BYTES or area[at + 8 : at + 16] == PAD:
            begin += left
            continue
        frame = decode(area[: at + min(left, end - begin)], at)
        found.append((begin, frame))
        begin += len(frame.raw)
    return found


def _apply(account: _Account, frame: Frame) -> None:
    last, rows = frame.seq, frame.rows
    if frame.kind is Kind.GAP:
        last, lost, _ = gap_of(frame)
        rows = lost or 0
    account.next_seq = max(account.next_seq, last + 1)
    account.rows = max(account.rows, frame.row0 + rows)
    account.closed |= frame.kind is Kind.CLOSE


def _slot_frames(
    buffer: memoryview,
    layout: Layout,
    index: int,
    opens: dict[int, bytes],
    accounts: dict[int, _Account],
    times: _Times,
) -> list[bytes]:
    words, ends, data = layout.slot_parts(buffer, index)
    stream = words[W_SLOT_STREAM]
    account = accounts.get(stream)
    count = words[W_COMMIT] >> 32
    if not stream or not count:
        return []
    if account is None or stream not in opens:
        message = f"slot {index} holds {count} rows of stream {stream:016x}, which was never opened"
        raise WireError(message)
    taken = account.rows - words[W_ROW_BASE]
    if taken < 0:
        message = f"slot {index} begins at row {words[W_ROW_BASE]} of a stream of {account.rows}"
        raise WireError(message)
    if count <= taken:
        return []
    info: OpenInfo = decode_open(decode(memoryview(opens[stream])))
    frames: list[bytes] = []
    for body in slot_bodies(
        words[W_FORM], words[W_WIDTH], ends, data, (taken, count), info.schema, body_limit(layout.ring_bytes)
    ):
        frames.append(
            encode(
                body.kind,
                stream,
                account.next_seq,
                b"".join(body.parts),
                rows=body.rows,
                row0=account.rows,
                t_first_ns=words[W_T_FIRST] or times.first_ns,
                t_put_ns=words[W_T_PUT] or times.put_ns,
            )
        )
        account.next_seq += 1
        account.rows += body.rows
    return frames
