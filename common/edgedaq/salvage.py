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

Where a job has written over the memory, by a driver that ran out of its buffer, all that is whole is told,
and for the rest what is known of it (``damage`` says what was found):

=================== ===================================================================================
damaged             and so
=================== ===================================================================================
frames              all behind them comes in ``tail``, each stream with a GAP up to what is whole: from its
                    last frame before, or, if none is left, from its begin, after its OPEN: a receiver counts
                    of such a GAP what it has not got
a slot              a GAP with its rows, if its stream is known; else every CLOSE says ``tail_unknown``
an OPEN             the one among the frames is taken; a stream without any is told of only here
header, positions   the ring is refused as a whole
=================== ===================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from edgedaq.delivery import gap_of
from edgedaq.errors import WireError
from edgedaq.frame import HEADER_BYTES, Frame, Kind, decode, encode, pack_map
from edgedaq.open_frames import body_limit, slot_bodies
from edgedaq.ring_frames import find_opens, walk
from edgedaq.ring_layout import (
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

__all__ = ["FrameAt", "Salvaged", "close_body", "salvage"]

_REASON = "damaged in shared memory"


@dataclass(frozen=True, slots=True)
class FrameAt:
    """One frame of the data area."""

    position: int
    length: int
    stream: int


@dataclass(frozen=True, slots=True)
class Salvaged:
    """All that is left of a life.

    ``frames`` lie in the data area; ``tail`` are frames made of the slots, which follow those. ``damage`` is
    what was found to be damaged, for a person. ``ends`` is, per stream, the seq and row behind its last one.
    """

    released: int
    published: int
    opens: dict[int, bytes]
    frames: list[FrameAt]
    tail: list[bytes]
    damage: list[str]
    ends: dict[int, tuple[int, int]]


@dataclass(slots=True)
class _Account:
    next_seq: int = 0
    rows: int = 0
    closed: bool = False
    is_doubted: bool = False


@dataclass(slots=True)
class _Times:
    """Latest times known; what the producer had no time to stamp gets them."""

    first_ns: int
    put_ns: int = 0


def salvage(buffer: memoryview, *, since: int | None = None) -> Salvaged:
    """Return what a mapped ring holds that was not released; its producer must be dead.

    Args:
        since: Where a consumer is that holds nothing: what lies from there on is told too, if it is certain
            that nothing was written over it (a frame, which has at most half a ring, may have been begun).

    Raises:
        WireError: It is not a ring, or its positions cannot be.
    """
    layout = read_layout(buffer)
    words = layout.header_words(buffer)
    released, published = words[W_RELEASED], words[W_PUBLISHED]
    if since is not None and published - layout.ring_bytes // 2 <= since < released:
        released = since
    opens, are_opens_whole = find_opens(buffer, layout, words[W_OPENS_USED])
    damage = [] if are_opens_whole else ["an OPEN"]
    accounts: dict[int, _Account] = {}
    for index in range(STREAMS_MAX):
        entry = layout.words(buffer, layout.entry_offset(index))
        if entry[W_STREAM]:
            accounts[entry[W_STREAM]] = _Account(entry[W_NEXT_SEQ], entry[W_ROWS], bool(entry[W_CLOSED]))
            if entry[W_NEXT_SEQ] > published // HEADER_BYTES:
                damage.append(f"the account of stream {entry[W_STREAM]:016x}")
                accounts[entry[W_STREAM]] = _Account(is_doubted=True)
    times = _Times(layout.t_birth_ns)
    frames: list[FrameAt] = []
    tail: list[bytes] = []
    is_torn = False
    seen: dict[int, _Account] = {}
    mended: set[int] = set()
    for position, frame in walk(buffer, layout, released, published):
        if frame is None:
            damage.append(f"frames at {position}")
            is_torn = True
            mended.clear()
            continue
        if frame.kind is Kind.OPEN:
            opens.setdefault(frame.stream, bytes(frame.raw))
        if not is_torn:
            frames.append(FrameAt(position, len(frame.raw), frame.stream))
        elif frame.stream in opens:  # or it is what a message holds that looks like a frame
            if frame.stream not in mended:
                mended.add(frame.stream)
                tail += _mend(frame.stream, opens, seen.get(frame.stream), frame.seq, frame.row0)
            tail.append(bytes(frame.raw))
        else:
            continue
        times.first_ns = max(times.first_ns, frame.t_first_ns)
        times.put_ns = max(times.put_ns, frame.t_put_ns)
        _apply(seen.setdefault(frame.stream, _Account()), frame)
        _apply(accounts.setdefault(frame.stream, _Account()), frame)
    if is_torn:
        for stream, account in accounts.items():
            if stream in mended:
                continue
            seq = account.next_seq - account.closed
            tail += _mend(stream, opens, seen.get(stream), seq, account.rows)
            if account.closed:
                tail.append(_close(stream, account.next_seq - 1, account))
    is_any_lost = False
    for index in range(layout.slots):
        try:
            tail += _slot_frames(buffer, layout, index, opens, accounts, times)
        except WireError as e:
            damage.append(str(e))
            lost = _lost_slot(layout.slot_parts(buffer, index)[0], layout, accounts)
            tail += lost
            is_any_lost |= not lost
    for stream, account in accounts.items():
        if not account.closed and account.next_seq:
            account.is_doubted |= is_any_lost
            tail.append(_close(stream, account.next_seq, account))
    ends = {stream: (account.next_seq, account.rows) for stream, account in accounts.items()}
    return Salvaged(released, published, opens, frames, tail, damage, ends)


def _close(stream: int, seq: int, account: _Account) -> bytes:
    body = close_body(account.rows, tail_unknown=account.is_doubted)
    return encode(Kind.CLOSE, stream, seq, body, row0=account.rows)


def _mend(stream: int, opens: dict[int, bytes], seen: _Account | None, seq: int, rows: int) -> list[bytes]:
    """Return what leads a receiver from what was ``seen`` of a stream to frame ``seq``, at row ``rows``.

    If nothing was, from its begin: what a receiver has already is a duplicate to it, and of the GAP it counts
    what lies beyond.
    """
    found = []
    first = seen or _Account(next_seq=1)
    if seen is None and stream in opens:
        found.append(opens[stream])
    if seq > first.next_seq:
        found.append(_gap(stream, first.next_seq, seq - 1, rows - first.rows, first.rows))
    return found


def _gap(stream: int, first: int, last: int, rows: int | None, row0: int) -> bytes:
    body = pack_map({"last": last, "rows": rows, "reason": _REASON})
    return encode(Kind.GAP, stream, first, body, row0=row0)


def _lost_slot(words: memoryview, layout: Layout, accounts: dict[int, _Account]) -> list[bytes]:
    """Return a GAP for the rows of a slot that cannot be read; nothing if nobody knows whose they are."""
    account = accounts.get(words[W_SLOT_STREAM])
    if account is None or not account.next_seq:
        return []
    count = (words[W_COMMIT] >> 32) - (account.rows - words[W_ROW_BASE])
    rows = count if 0 < count <= layout.slot_bytes else None
    gap = _gap(words[W_SLOT_STREAM], account.next_seq, account.next_seq, rows, account.rows)
    account.next_seq += 1
    account.rows += rows or 0
    account.is_doubted |= rows is None
    return [gap]


def close_body(rows: int, *, tail_unknown: bool = False) -> bytes:
    """Return the body of a CLOSE after so many rows, or after nobody knows how many."""
    return pack_map({"rows": rows, "tail_unknown": tail_unknown, "bound_s": 0.0})


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
                b"".join(body.parts),  # type: ignore[arg-type]  # of a slot all are bytes
                rows=body.rows,
                row0=account.rows,
                t_first_ns=words[W_T_FIRST] or times.first_ns,
                t_put_ns=words[W_T_PUT] or times.put_ns,
            )
        )
        account.next_seq += 1
        account.rows += body.rows
    return frames
