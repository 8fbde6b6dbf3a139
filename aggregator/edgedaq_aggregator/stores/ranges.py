"""Blocks: what lies where in a store's data files, kept so that ``verify`` can read all of them again.

A *block* is what consecutive commits wrote to one file. It is open while it grows: then its digest is in the
file's ``FileMark``, and its streams in the key ``blocks`` of the commit record. It is over once it has
``BLOCK_BYTES`` or ``BLOCK_STREAMS`` streams, or its file is left, or its store ends; before a commit record
that no longer speaks of it, it is appended to ``ranges.log`` and made durable there. A death in between does
so again: what comes twice in a row counts once.

``ranges.log`` is a log as drawn in ``records.py``, magic ``b"EDQRNG01"``; its first number need not be 0.
Commit records say how many numbers were given when they were written. Payload::

    file     str     path below out_dir
    start    int     the block is these bytes of the file; one that begins before the end of the block before
    end      int       it in the same file begins another file of that name
    digest   int     xxh3-64 of them
    turns    int     how often the stream changed from one row to the next, the first row included; where it
                     is the number of streams, each stream's rows lie together, in the order of ``streams``
    streams  {16 hex: [first seq, last seq, rows]}

Beyond ``RANGES_BYTES_MAX`` the older half goes: what it spoke of is "not recorded" from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgedaq.logsetup import get_logger
from edgedaq.storage import Buffer, Storage
from xxhash import xxh3_64

from edgedaq_aggregator.stores.records import RecordFile, read_image, scan

__all__ = ["RANGES_NAME", "Block", "BlockStreams", "OpenBlock", "RangeLog", "Ranges", "read_ranges"]

RANGES_NAME = "ranges.log"
BLOCK_BYTES = 64 << 20
BLOCK_STREAMS = 64
RANGES_BYTES_MAX = 16 << 20

_MAGIC = b"EDQRNG01"


class BlockStreams(NamedTuple):
    """Whose rows a block holds; see the drawing. Values of ``streams`` are (first seq, last seq, rows)."""

    turns: int
    streams: dict[int, tuple[int, int, int]]

    def to_plain(self) -> list[object]:
        """Return it as lists and maps."""
        return [self.turns, {f"{stream:016x}": list(told) for stream, told in self.streams.items()}]

    @classmethod
    def from_plain(cls, plain: object) -> BlockStreams | None:
        """Return what ``to_plain`` described; None if it is not that."""
        if not (isinstance(plain, list) and len(plain) == 2 and type(plain[0]) is int):
            return None
        if not isinstance(plain[1], dict):
            return None
        streams: dict[int, tuple[int, int, int]] = {}
        for name, told in plain[1].items():
            if not (isinstance(told, list) and [type(value) for value in told] == [int, int, int]):
                return None
            streams[int(name, 16)] = (told[0], told[1], told[2])
        return cls(plain[0], streams)


class Block(NamedTuple):
    """What a block is; see the drawing."""

    file: str
    start: int
    end: int
    digest: int
    held: BlockStreams


class OpenBlock:
    """The block at the end of a file, as it grows."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.end = start
        self._hash = xxh3_64()
        self._turns = 0
        self._streams: dict[int, tuple[int, int, int]] = {}
        self._newest = 0

    @property
    def digest(self) -> int:
        """xxh3-64 of what it has."""
        return self._hash.intdigest()

    @property
    def held(self) -> BlockStreams:
        """Whose rows it has."""
        return BlockStreams(self._turns, dict(self._streams))

    @property
    def is_full(self) -> bool:
        """Another one is to begin behind it."""
        return self.end - self.start >= BLOCK_BYTES or len(self._streams) >= BLOCK_STREAMS

    def extend(self, buffer: Buffer) -> None:
        """Take bytes that were written behind it."""
        self._hash.update(buffer)
        self.end += len(buffer)

    def tell(self, stream: int, first: int, last: int, rows: int) -> None:
        """Take that rows of a stream are among its bytes."""
        self._turns += stream != self._newest
        self._newest = stream
        known = self._streams.get(stream)
        self._streams[stream] = (first, last, rows) if known is None else (known[0], last, known[2] + rows)


class RangeLog:
    """The blocks of one store that are over, as its process keeps them.

    Args:
        first_number: Where a new log goes on with its numbers.
    """

    def __init__(self, directory: Path, storage: Storage, *, first_number: int) -> None:
        self._path = directory / RANGES_NAME
        self._storage = storage
        self._file = RecordFile(self._path, _MAGIC, storage)
        self._file.next_number = first_number
        image = read_image(self._path, storage)
        if image is None:
            return
        found = scan(image, _MAGIC, first=None)
        numbers = [number for number, _ in found.records]
        if found.damage:
            get_logger().error("ranges.damaged", path=str(self._path), reason=found.damage)
            storage.rename(self._path, self._path.with_name(f"{RANGES_NAME}.bad"))
            payloads = [payload for _, payload in found.records]
            last = max([first_number, *(number + 1 for number in numbers)])
            self._file.begin(payloads, last - len(payloads), 0)
        else:
            self._file.go_on(found)
            self._file.next_number = max(self._file.next_number, 0 if numbers else first_number)

    @property
    def next_number(self) -> int:
        """How many numbers were given."""
        return self._file.next_number

    def append(self, blocks: Sequence[Block]) -> None:
        """Make blocks durable.

        Raises:
            OSError: The log must be opened anew.
        """
        payloads = [_plain(block) for block in blocks]
        if not self._file.is_open:
            self._file.begin(payloads, self._file.next_number, 0)
            return
        records = self._file.bytes_of(payloads)
        if self._file.end + len(records) > RANGES_BYTES_MAX:
            image = read_image(self._path, self._storage)
            kept = [] if image is None else scan(image, _MAGIC, first=None).records
            kept = kept[len(kept) // 2 :]
            held = [payload for _, payload in kept]
            self._file.begin([*held, *payloads], self._file.next_number - len(held), 0)
        else:
            self._file.append(records, len(payloads))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Ranges(NamedTuple):
    """Blocks that are over, in order; whether they are all that ever were; what is damaged, or empty."""

    blocks: list[Block]
    is_whole: bool
    damage: str


def read_ranges(directory: Path, storage: Storage, upto: int) -> Ranges:
    """Return the blocks of a store that are over.

    For readers: takes no lock and changes nothing; the store may be running.

    Args:
        upto: The number before which they were told when the state was read that they belong to.
    """
    image = read_image(directory / RANGES_NAME, storage)
    if image is None:
        return Ranges([], not upto, "")
    found = scan(image, _MAGIC, first=None)
    read = [_block(payload) for number, payload in found.records if number < upto]
    blocks = [block for block in read if block is not None]
    return Ranges(_once(blocks), len(blocks) == upto, found.damage)


def _once(blocks: Iterable[Block]) -> list[Block]:
    """Return blocks without those that a death made come twice."""
    kept: list[Block] = []
    newest: dict[str, Block] = {}
    for block in blocks:
        if newest.get(block.file) != block:
            kept.append(block)
        newest[block.file] = block
    return kept


def _plain(block: Block) -> dict[str, object]:
    turns, streams = block.held.to_plain()
    return {
        "file": block.file,
        "start": block.start,
        "end": block.end,
        "digest": block.digest,
        "turns": turns,
        "streams": streams,
    }


def _block(payload: dict[str, object]) -> Block | None:
    file, numbers = payload.get("file"), [payload.get(key) for key in ("start", "end", "digest")]
    held = BlockStreams.from_plain([payload.get("turns"), payload.get("streams")])
    if not isinstance(file, str) or held is None:
        return None
    start, end, digest = numbers
    if type(start) is not int or type(end) is not int or type(digest) is not int or not 0 <= start <= end:
        return None
    return Block(file, start, end, digest, held)
