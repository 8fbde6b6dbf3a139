"""Sealing: open frames become frames of the ring, and streams get their accounts. The producer's side.

Nothing here blocks, waits or locks: every method is called with the outlet's lock held, and says False when
the ring has no room. The order of the stores is the promise of ``salvage``; it is written out where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import JobError
from edgedaq.frame import DATA_KINDS, HEADER_BYTES, Kind, decode, frame_bytes, pack_map, seal_into
from edgedaq.open_frames import Body, body_limit, slot_bodies
from edgedaq.ring import ProducedRing
from edgedaq.ring_layout import (
    PAD,
    STREAMS_MAX,
    W_CLOSED,
    W_COMMIT,
    W_FORM,
    W_NEXT_SEQ,
    W_OPEN_AT,
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
)
from edgedaq.salvage import close_body
from edgedaq.schema import OpenInfo, Schema, encode_open

__all__ = ["Account", "Sealer", "Slot"]


def _nothing() -> None:
    """What a slot without a writer tells it."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot of the ring, and whom to tell of what happens to it.

    ``arm`` is called before the slot's commit is read for sealing: a put that is not in that frame then
    finds its writer armed. ``unbind`` is called when another stream gets the slot.
    """

    index: int
    words: memoryview
    ends: memoryview
    data: memoryview
    account: Account | None = None
    arm: Callable[[], None] = _nothing
    unbind: Callable[[], None] = _nothing


@dataclass(slots=True, eq=False)
class Account:
    """One stream of this life: its next seq, and what was put so far."""

    stream: int
    info: OpenInfo
    words: memoryview
    next_seq: int = 0
    rows: int = 0
    dropped_rows: int = 0
    sealed_bytes: int = 0
    is_closed: bool = False
    slot: Slot | None = None

    @property
    def schema(self) -> Schema | None:
        """Columns of a table of rows."""
        return self.info.schema

    def unsealed(self) -> tuple[int, int]:
        """Return rows and bytes that were put and lie in the slot only (bytes: of the whole slot)."""
        slot = self.slot
        if slot is None:
            return 0, 0
        commit = slot.words[W_COMMIT]
        return max((commit >> 32) - (self.rows - slot.words[W_ROW_BASE]), 0), commit & 0xFFFFFFFF

    def put_rows(self) -> int:
        """Return how many rows or messages were put."""
        return self.rows - self.dropped_rows + self.unsealed()[0]


@dataclass(slots=True)
class Sealer:
    """Writes one ring.

    Args:
        on_publish: Told (account, position, length, rows) of each frame, after its stores are done.
        data: The data area of the ring.
    """

    ring: ProducedRing
    on_publish: Callable[[Account, int, int, int], None]
    head: int = 0
    released: int = 0
    opens_used: int = 0
    accounts: list[Account] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    limit: int = 0
    _words: memoryview = field(init=False)
    data: memoryview = field(init=False)
    _size: int = 0

    def __post_init__(self) -> None:
        layout, buffer = self.ring.layout, self.ring.buffer
        self._words = layout.header_words(buffer)
        self._size = layout.ring_bytes
        self.data = buffer[layout.data_offset : layout.data_offset + self._size]
        self.slots = [Slot(i, *layout.slot_parts(buffer, i)) for i in range(layout.slots)]
        self.limit = body_limit(self._size)

    def open_stream(self, stream: int, info: OpenInfo) -> Account | None:
        """Begin a stream; None when the ring has no room now.

        Raises:
            JobError: This life has as many streams as it may have.
        """
        layout = self.ring.layout
        raw = encode_open(stream, info)
        index = len(self.accounts)
        is_too_large = self.opens_used + len(raw) > layout.opens_bytes or 2 * len(raw) > self._size
        if index >= STREAMS_MAX or is_too_large:
            message = (
                f"job {info.job}: at most {STREAMS_MAX} streams of {layout.opens_bytes} bytes of description "
                "in one life: another schema, tag, topic or store_config opens another stream, so these must "
                "not change with every message"
            )
            raise JobError(message)
        if self._place([len(raw)]) is None:
            return None
        opens_at = self.opens_used
        at = layout.opens_offset + opens_at
        self.ring.buffer[at : at + len(raw)] = raw
        self.opens_used = opens_at + len(raw)
        self._words[W_OPENS_USED] = self.opens_used
        account = Account(stream, info, layout.words(self.ring.buffer, layout.entry_offset(index)))
        account.words[W_OPEN_AT] = opens_at
        body = decode(memoryview(raw)).body
        self.append(account, [Body(Kind.OPEN, (body,), 0)], t_first_ns=info.t_open_ns)
        account.words[W_STREAM] = stream
        self.accounts.append(account)
        return account

    def append(
        self,
        account: Account,
        bodies: Sequence[Body],
        *,
        t_first_ns: int = 0,
        t_put_ns: int = 0,
        lost_rows: int = 0,
    ) -> bool:
        """Publish frames of a stream, all or none; False when the ring has no room now.

        ``lost_rows`` is how far the stream's account moves on beside the rows of the frames (a GAP).
        """
        placed = self._place([frame_bytes(body.size) for body in bodies])
        if placed is None:
            return False
        data, size = self.data, self._size
        head, rows = self.head, account.rows
        spans: list[tuple[int, int]] = []
        for index, (position, body) in enumerate(zip(placed, bodies, strict=True)):
            if head != position:
                self._pad(head)
            at = position % size
            write_at = at + HEADER_BYTES
            for part in body.parts:
                if isinstance(part, bytes | memoryview):
                    data[write_at : write_at + len(part)] = part
                else:
                    part.write_into(data, write_at)
                write_at += len(part)
            length = seal_into(
                data,
                at,
                body.kind,
                account.stream,
                account.next_seq + index,
                body_bytes=write_at - at - HEADER_BYTES,
                rows=body.rows,
                row0=rows,
                t_first_ns=t_first_ns,
                t_put_ns=t_put_ns,
                flags=body.flags,
            )
            spans.append((position, length))
            head = position + length
            rows += body.rows
            if body.kind in DATA_KINDS:
                account.sealed_bytes += body.size
        # This order is what salvage builds on: frames, published, next_seq, rows.
        self._words[W_PUBLISHED] = head
        account.words[W_NEXT_SEQ] = account.next_seq + len(bodies)
        account.words[W_ROWS] = rows + lost_rows
        self.head = head
        account.next_seq += len(bodies)
        account.rows = rows + lost_rows
        for (position, length), body in zip(spans, bodies, strict=True):
            self.on_publish(account, position, length, body.rows)
        return True

    def append_gap(self, account: Account, rows: int | None, reason: str) -> bool:
        """Publish that rows were lost before they could be put; the slot of the stream must be sealed.

        ``rows`` is None when nobody knows how many.
        """
        raw = pack_map({"last": account.next_seq, "rows": rows, "reason": reason})
        lost = rows or 0
        gap = [Body(Kind.GAP, (raw,), 0)]
        if not self.append(account, gap, t_first_ns=utc_ns(), t_put_ns=mono_ns(), lost_rows=lost):
            return False
        account.dropped_rows += lost
        return True

    def close_stream(self, account: Account) -> bool:
        """Publish the CLOSE of a stream whose slot is sealed; False when the ring has no room now."""
        if account.is_closed:
            return True
        if not self.append(account, [Body(Kind.CLOSE, (close_body(account.rows),), 0)]):
            return False
        account.words[W_CLOSED] = 1
        account.is_closed = True
        return True

    def attach(self, slot: Slot, account: Account, form: int, width: int, prefix: bytes = b"") -> None:
        """Give a sealed slot to a stream, which begins it anew; also if it has it already."""
        words = slot.words
        words[W_COMMIT] = 0
        words[W_SLOT_STREAM] = 0
        words[W_FORM] = form
        words[W_WIDTH] = width
        slot.data[: len(prefix)] = prefix
        words[W_ROW_BASE] = account.rows
        words[W_T_FIRST] = words[W_T_PUT] = 0
        words[W_SLOT_STREAM] = account.stream
        slot.account, account.slot = account, slot

    def detach(self, slot: Slot) -> None:
        """Take a sealed slot away from its stream."""
        slot.words[W_COMMIT] = 0
        slot.words[W_SLOT_STREAM] = 0
        if slot.account is not None:
            slot.account.slot = None
        slot.account = None
        slot.unbind()
        slot.arm = slot.unbind = _nothing

    def seal(self, slot: Slot) -> bool:
        """Publish the rows of a slot that are not published yet; False when the ring has no room now."""
        account, words = slot.account, slot.words
        if account is None:
            return True
        # Armed before the commit is read: no put can fall between this frame and the next one unseen.
        slot.arm()
        commit = words[W_COMMIT]
        rows = (account.rows - words[W_ROW_BASE], commit >> 32)
        if rows[1] <= rows[0]:
            return True
        bodies = slot_bodies(
            words[W_FORM], words[W_WIDTH], slot.ends, slot.data, rows, account.schema, self.limit
        )
        t_first_ns, t_put_ns = words[W_T_FIRST] or utc_ns(), words[W_T_PUT] or mono_ns()
        if not self.append(account, bodies, t_first_ns=t_first_ns, t_put_ns=t_put_ns):
            return False
        words[W_T_FIRST] = words[W_T_PUT] = 0
        return True

    def let_go(self) -> None:
        """Take all writers off their slots, whose memory stays as it is."""
        for slot in self.slots:
            slot.unbind()

    def release(self, position: int) -> None:
        """Note that nobody reads before ``position`` any more; that memory may be written from now on."""
        self._words[W_RELEASED] = position
        self.released = position

    def _place(self, lengths: Sequence[int]) -> list[int] | None:
        """Return where frames would lie, or None when there is no room for all of them."""
        head, size = self.head, self._size
        placed = []
        for length in lengths:
            left = size - head % size
            if length > left:
                head += left
            placed.append(head)
            head += length
        return placed if head - self.released <= size else None

    def _pad(self, head: int) -> None:
        at = head % self._size
        if self._size - at >= HEADER_BYTES:
            self.data[at + 8 : at + 16] = PAD
