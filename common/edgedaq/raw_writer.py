"""Writers of streams without columns: messages of bytes, and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgedaq.errors import JobError
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, HEADER_BYTES, Kind, pack_map
from edgedaq.open_frames import FRAME_TARGET_BYTES, Body
from edgedaq.ring_layout import (
    FORM_RAW,
    W_COMMIT,
)
from edgedaq.sealing import Slot
from edgedaq.stream_writer import EMPTY, NOWHERE, Binding, StreamWriter

__all__ = ["BytesLike", "EventWriter", "RawWriter", "bytes_view"]

BytesLike = Any
"""Anything with contiguous memory: bytes, bytearray, memoryview, ``array``, numpy arrays."""


class RawWriter(StreamWriter):
    """One stream of messages. ``put`` is the fast path: fetch it once, call it often."""

    put: Callable[[BytesLike], None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.put = _raw_put(self)

    def put_within(self, message: BytesLike, timeout_s: float | None) -> None:
        """Put a message, waiting for room no longer than ``timeout_s``; raises ``PutTimeout``."""
        with self.limit(timeout_s):
            self.put(message)

    def put_large(self, view: memoryview) -> None:
        """Put a message past the slots, in one frame or in pieces.

        Up to half the ring it is published at once; beyond that, as room is made.
        """
        size = len(view)
        half = self.sealer.ring.layout.ring_bytes // 2
        target = min(FRAME_TARGET_BYTES, half // 2)
        if size <= target:
            self.append([Body(Kind.RAW, (size.to_bytes(4, "little"), view), 1)])
            return
        pieces = []
        for at in range(0, size, target):
            is_last = at + target >= size
            flags = FLAG_PIECE | (0 if at else FLAG_FIRST) | (0 if is_last else FLAG_CONTINUES)
            pieces.append(Body(Kind.RAW, (view[at : at + target],), int(is_last), flags))
        fits_at_once = size + len(pieces) * HEADER_BYTES <= half
        at_once = len(pieces) if fits_at_once else half // 2 // target
        done = 0
        try:
            while done < len(pieces):
                self.append(pieces[done : done + at_once])
                done += at_once
        except BaseException:
            if done:
                self.mark_torn()
            raise


class EventWriter(StreamWriter):
    """One stream of events: a map of facts with a payload each."""

    def put(
        self, metadata: Mapping[str, Any], payload: BytesLike = b"", timeout_s: float | None = None
    ) -> None:
        """Put one event.

        Raises:
            JobError: It is larger than a frame may be, or the facts are not plain data.
            PutTimeout: There was no room in time.
        """
        try:
            facts = pack_map(dict(metadata))
        except (TypeError, ValueError, OverflowError) as e:
            message = f"an event's metadata must be plain data: {e}"
            raise JobError(message) from e
        view = bytes_view(payload)
        body = Body(Kind.EVENT, (len(facts).to_bytes(4, "little"), facts, view), 1)
        if body.size > self.sealer.limit:
            message = f"an event must have at most {self.sealer.limit} bytes, got {body.size}: use put_raw"
            raise JobError(message)
        self.gate.interrupt()
        with self.limit(timeout_s):
            self.append([body])


def bytes_view(value: BytesLike) -> memoryview:
    """Return the bytes of anything that has contiguous memory.

    Raises:
        JobError: It has none.
    """
    try:
        view = memoryview(value)
        return view.cast("B") if view.nbytes else EMPTY
    except TypeError as e:
        message = f"a message must be bytes or contiguous memory, got {type(value).__name__}: {e}"
        raise JobError(message) from e


def _raw_put(writer: RawWriter) -> Callable[[BytesLike], None]:
    one = 1 << 32
    data = EMPTY
    ends = EMPTY
    commit = NOWHERE
    offset = room = count = word = 0
    is_armed = False
    largest = writer.slot_bytes // 2
    begun = writer.begun

    def put(message: BytesLike) -> None:
        nonlocal offset, count, word
        try:
            end = offset + len(message)
            ends[count] = end
            data[offset:end] = message
        except (TypeError, ValueError, IndexError):
            slow(message)
            return
        count += 1
        word += one + end - offset
        offset = end
        commit[0] = word
        if is_armed:
            begun(binding)

    def slow(message: BytesLike) -> None:
        view = bytes_view(message)
        size = len(view)
        writer.gate.interrupt()
        if size > largest:
            writer.put_large(view)
            return
        if offset + size > room or count >= len(ends):
            writer.renew(FORM_RAW, 0, binding)
        put(view)

    def bind(slot: Slot) -> None:
        nonlocal data, ends, commit, offset, room, count, word, is_armed
        data, ends, commit = slot.data, slot.ends, slot.words[W_COMMIT : W_COMMIT + 1]
        offset = count = word = 0
        room = len(data)
        is_armed = True

    def unbind() -> None:
        nonlocal data, ends, commit, offset, room, count
        data = ends = EMPTY
        commit = NOWHERE
        offset = room = count = 0

    def arm() -> None:
        nonlocal is_armed
        is_armed = True

    def disarm() -> None:
        nonlocal is_armed
        is_armed = False

    binding = Binding(bind, unbind, arm, disarm)
    return put
