"""RAW messages larger than a frame: their pieces are held until the last one has come.

Per stream a message is *none* or *held* (its first piece came). A piece that is not the first one and finds
none held is the tail of a message whose begin was lost: it is passed, and told of with its last piece.

A held message keeps the commit position before its first piece, and its stream's account as it was then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgedaq.delivery import StreamState
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, Frame

__all__ = ["MESSAGE_BYTES_MAX", "Pieces"]

MESSAGE_BYTES_MAX = 256 << 20
"""Largest message that is held together; a larger one is refused."""


@dataclass(slots=True)
class _Message:
    before: StreamState
    position: int
    frames: list[Frame] = field(default_factory=list)
    size_bytes: int = 0


class Pieces:
    """The messages of all streams of one store of which pieces are still to come."""

    def __init__(self) -> None:
        self._held: dict[int, _Message] = {}

    def position(self, consumed: int | None) -> int | None:
        """Return up to where everything is complete, given up to where it is consumed."""
        return min([message.position for message in self._held.values()], default=consumed)

    def streams(self) -> list[int]:
        """Return the streams with a held message."""
        return list(self._held)

    def before(self, stream: int) -> StreamState | None:
        """Return the account of a stream before its held message; None when it has none."""
        message = self._held.get(stream)
        return None if message is None else message.before

    def add(self, frame: Frame, before: StreamState, position: int) -> list[Frame] | str:
        """Take a piece; return all pieces of its message if it was the last one, else none.

        Args:
            before: The account of its stream without it; taken over.
            position: Of its record in the journal.

        Returns:
            A reason instead of pieces if a message has ended that cannot be stored.
        """
        stream = frame.stream
        is_last = not frame.flags & FLAG_CONTINUES
        if not frame.flags & FLAG_FIRST and stream not in self._held:
            return "the begin of this message is missing" if is_last else []
        message = self._held.setdefault(stream, _Message(before, position))
        message.size_bytes += len(frame.body)
        if message.size_bytes > MESSAGE_BYTES_MAX:
            message.frames.clear()
        else:
            message.frames.append(frame)
        if not is_last:
            return []
        del self._held[stream]
        return message.frames or f"a message must have at most {MESSAGE_BYTES_MAX} bytes"

    def interrupt(self, stream: int) -> tuple[int, int] | None:
        """Drop a held message, because something else came; return its first seq and its size so far."""
        message = self._held.pop(stream, None)
        return None if message is None else (message.before.next_seq, message.size_bytes)
