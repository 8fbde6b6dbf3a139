"""One segment as its writer sees it: puts records where it is told, in as few calls as possible.

Frames are not copied: the device gets their own bytes, each behind a prefix from one reused buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from xxhash import xxh3_64_intdigest

from edgedaq.frame import Frame
from edgedaq.segment_format import (
    CHECKED_BYTES,
    PREFIX,
    PREFIX_BYTES,
    Header,
    RecordKind,
    control_record,
    encode_header,
    file_name,
)
from edgedaq.segment_pool import SegmentPool
from edgedaq.storage import Buffer, Storage, write_all

__all__ = ["SYNCED_RECORD_BYTES", "SegmentWriter", "begin_segment"]

SYNCED_RECORD_BYTES = PREFIX_BYTES + 8

_BATCH_FRAMES = 500
"""Each is two buffers of one call, which takes at most IOV_MAX (1024)."""

_VOID = bytes(PREFIX_BYTES)


class SegmentWriter:
    """A segment of a log.

    ``fd`` is open for writing as long as something in it may not be durable, -1 afterwards. ``is_named`` says
    that its name is durable, ``is_sound`` that its file may be used again.
    """

    __slots__ = (
        "_slots",
        "_stale",
        "_storage",
        "fd",
        "first",
        "is_named",
        "is_sound",
        "path",
        "salt",
        "size",
    )

    def __init__(self, storage: Storage, path: Path, first: int, size: int, salt: int, fd: int = -1) -> None:
        self.path = path
        self.first = first
        self.size = size
        self.salt = salt
        self.fd = fd
        self.is_named = fd < 0
        self.is_sound = True
        self._storage = storage
        self._slots: list[memoryview] = []
        self._stale: list[int] = []

    @property
    def limit(self) -> int:
        """Position that no record crosses."""
        return self.first + self.size

    def begin(self, header: Header, checkpoint: bytes) -> None:
        """Write the header and the checkpoint.

        Raises:
            OSError: The device does not take them.
        """
        position = header.first + len(encode_header(header))
        record = control_record(RecordKind.CHECKPOINT, self.salt, position, checkpoint)
        write_all(self._storage, self.fd, [encode_header(header), record], 0)

    def control(self, position: int, kind: RecordKind, payload: bytes) -> int:
        """Write a record that is not a frame; returns where it ends.

        Raises:
            OSError: The device does not take it.
        """
        self._void()
        record = control_record(kind, self.salt, position, payload)
        write_all(self._storage, self.fd, [record], position - self.first)
        return position + len(record)

    def frames(
        self, position: int, frames: Sequence[Frame], begin: int, durable: int | None
    ) -> tuple[int, int]:
        """Write as many frames as fit, at most 500, from index ``begin`` on.

        Args:
            position: Where the first record goes.
            durable: Writes a SYNCED with it first, if there is room.

        Returns:
            How many, and where the last record ends.

        Raises:
            OSError: The device took only a part, which will not be read as records.
        """
        self._void()
        salt, limit = self.salt, self.limit
        start = position
        buffers: list[Buffer] = []
        if durable is not None and position + SYNCED_RECORD_BYTES + _record_bytes(frames[begin]) <= limit:
            payload = durable.to_bytes(8, "little")
            buffers.append(control_record(RecordKind.SYNCED, salt, position, payload))
            position += SYNCED_RECORD_BYTES
        slots = self._slots or self._make_slots()
        pack, pack_into, hashed = _TAIL_PACK, PREFIX.pack_into, xxh3_64_intdigest
        count = 0
        for slot, frame in zip(slots, islice(frames, begin, None), strict=False):
            raw = frame.raw
            length = len(raw)
            end = position + PREFIX_BYTES + length
            if end > limit:
                break
            check = hashed(pack(0, salt, length, 1)[8:] + raw[:CHECKED_BYTES], position)
            pack_into(slot, 0, check, salt, length, 1)
            buffers += (slot, raw)
            position = end
            count += 1
        try:
            write_all(self._storage, self.fd, buffers, start - self.first)
        except OSError:
            self._remember(start - self.first, buffers)
            with contextlib.suppress(OSError):
                self._void()
            raise
        return count, position

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self.fd >= 0:
            self._storage.close(self.fd)
            self.fd = -1
        self._slots = []

    def _make_slots(self) -> list[memoryview]:
        view = memoryview(bytearray(_BATCH_FRAMES * PREFIX_BYTES))
        self._slots = [view[at : at + PREFIX_BYTES] for at in range(0, len(view), PREFIX_BYTES)]
        return self._slots

    def _remember(self, offset: int, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            if len(buffer) in {PREFIX_BYTES, SYNCED_RECORD_BYTES}:
                self._stale.append(offset)
            offset += len(buffer)

    def _void(self) -> None:
        """Overwrite the prefixes that a failed write may have left; nothing is written before that is done.

        Raises:
            OSError: The device does not take even that, although the blocks exist.
        """
        while self._stale:
            if self._stale[-1] + PREFIX_BYTES <= self.size:
                write_all(self._storage, self.fd, [_VOID], self._stale[-1])
            self._stale.pop()


def begin_segment(
    storage: Storage, pool: SegmentPool, directory: Path, size: int, header: Header, checkpoint: bytes
) -> SegmentWriter:
    """Take a file of at least ``size`` bytes into the log, with its header and checkpoint written.

    Raises:
        LogFull: There is no room.
        OSError: The disk failed.
    """
    path, fd, size = pool.take(size)
    target = directory / file_name(header.first)
    segment = SegmentWriter(storage, target, header.first, size, header.salt, fd)
    try:
        segment.begin(header, checkpoint)
        storage.rename(path, target)
    except OSError:
        segment.close()
        pool.give_back(path, size, is_sound=False)
        raise
    return segment


_TAIL_PACK = PREFIX.pack


def _record_bytes(frame: Frame) -> int:
    return PREFIX_BYTES + len(frame.raw)
