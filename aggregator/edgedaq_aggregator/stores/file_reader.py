"""The data files of a store, read again: against their blocks for ``verify``, row by row for ``reading``.

Per name of a file, its blocks make *generations*: a block that begins before the end of the one before it
begins another file of that name. The last one is the file that has a mark; of others the rows are "away"
unless the file at that place still is the one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from edgedaq.delivery import StreamTable
from edgedaq.errors import StoreError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo
from edgedaq.storage import OsStorage, Storage

from edgedaq_aggregator.stores.alike import info_of
from edgedaq_aggregator.stores.commits import FileMark, read_commits
from edgedaq_aggregator.stores.compared import accounts_of, sum_marks
from edgedaq_aggregator.stores.marks import marks_file
from edgedaq_aggregator.stores.ranges import Block, BlockStreams, read_ranges
from edgedaq_aggregator.stores.reader import Checked, Part, Problem, Retained, StorePlace

__all__ = ["FileReader", "FindPlace", "ParseBlock"]

ParseBlock = Callable[[OpenInfo, Block, bytes], Any]
"""From what a stream is, its block, and the bytes of that to a ``pyarrow.Table``; raises ``StoreError``."""

FindPlace = Callable[
    [Mapping[int, OpenInfo], Mapping[int, list[Frame]], Block, bytes, Path], tuple[str, str] | None
]
"""From streams, what the journal has of them, their block, the bytes that are there now and their file to
the exact place of the first discrepancy and what it is; None where that cannot be told."""

_CHUNK_BYTES = 4 << 20
_NOBODY = BlockStreams(0, {})


class FileReader:
    """A store that appends to files.

    Args:
        key: Of the store.
        parse: Turns what was stored into a table again.
        locate: Where a file is that is not at its place yet.
        has_only_marks: Other files are not looked at.
    """

    def __init__(
        self,
        place: StorePlace,
        key: str,
        parse: ParseBlock,
        find: FindPlace,
        *,
        locate: Callable[[Path], Path] = lambda path: path,
        has_only_marks: bool = False,
        storage: Storage | None = None,
    ) -> None:
        self._out_dir = place.out_dir
        self._key = key
        self._parse = parse
        self._find = find
        self._locate = locate
        self._has_only_marks = has_only_marks
        storage = storage or OsStorage()
        self._state, damage = read_commits(place.state_dir, storage)
        ended = read_ranges(place.state_dir, storage, self._state.ranges)
        self._damage = [text for text in (damage, ended.damage) if text]
        self._has_all = ended.is_whole
        self._generations = _generations([*ended.blocks, *self._state.open_blocks()])
        self._infos: dict[int, OpenInfo | None] = {}

    @property
    def position(self) -> int | None:
        """See ``StoreReader``."""
        return self._state.position

    @property
    def table(self) -> StreamTable:
        """See ``StoreReader``."""
        return self._state.table

    def check(self, retained: Retained) -> Checked:
        """See ``StoreReader``."""
        found = Checked(is_whole=self._has_all and not self._damage)
        found.notes += [f"{self._key}: its records are damaged: {text}" for text in self._damage]
        if self._state.ranges and not self._has_all:
            found.notes.append(f"{self._key}: the oldest blocks are no longer recorded")
        for name in sorted({*self._generations, *self._state.files}):
            if self._has_only_marks and not self._is_marks(name):
                continue
            generations = self._generations.get(name, [])
            mark = self._state.files.get(name)
            if mark is not None and not (generations and generations[-1][-1].end == mark.end):
                generations = [*generations, []]
            for blocks in generations[:-1] if mark is not None else generations:
                self._check_left(name, blocks, found)
            if mark is not None:
                self._check_file(name, mark, generations[-1], found, retained)
        sum_marks(self.marks(), found)
        return found

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """See ``StoreReader``."""
        for generations in self._generations.values():
            for block in generations[-1]:
                held = {stream: told for stream, told in block.held.streams.items() if told[2]}
                if not any(stream in streams for stream in held):
                    continue
                infos = [info for stream in held if (info := self._info(stream)) is not None]
                data = self._bytes_of(block)
                if not infos or data is None:
                    continue
                table = self._parse(infos[0], block, data)
                if block.held.turns != len(block.held.streams):
                    yield Part(tuple(held), table)
                    continue
                first = 0
                for stream, (_, _, count) in held.items():
                    if stream in streams:
                        yield Part((stream,), table.slice(first, count))
                    first += count

    def marks(self) -> list[dict[str, str]]:
        """See ``StoreReader``."""
        found: list[dict[str, str]] = []
        for name, mark in self._state.files.items():
            path = self._out_dir / name
            if self._is_marks(name) and path.is_file():
                with path.open("rb") as file:
                    text = file.read(mark.end).decode("utf-8", "replace")
                found += csv.DictReader(io.StringIO(text, newline=""))
        return found

    def _bytes_of(self, block: Block) -> bytes | None:
        """Return the bytes of a block; None where the file is not there.

        Raises:
            StoreError: They are not what was stored.
        """
        path = self._locate(self._out_dir / block.file)
        try:
            with path.open("rb") as file:
                file.seek(block.start)
                data = file.read(block.end - block.start)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        if xxhash.xxh3_64_intdigest(data) != block.digest:
            message = f"{path}: bytes {block.start} to {block.end} are not those that were stored; see verify"
            raise StoreError(message)
        return data

    def _check_left(self, name: str, blocks: list[Block], found: Checked) -> None:
        """Check a file that is no longer written to by this name: it may be anywhere."""
        path = self._locate(self._out_dir / name)
        if not blocks:
            return
        is_there = _find_wrong(path, blocks, found) is None
        _add(found.rows if is_there else found.away, blocks)
        if not is_there:
            where = f"{path}: {blocks[-1].end} bytes of an earlier file of this name"
            found.notes.append(f"{where} are not there: moved away, deleted or replaced")

    def _check_file(
        self, name: str, mark: FileMark, blocks: list[Block], found: Checked, retained: Retained
    ) -> None:
        path = self._locate(self._out_dir / name)
        if not path.is_file():
            if mark.end:
                found.notes.append(f"{path}: is not there, moved away or deleted; it had {mark.end} bytes")
            _add(found.away, blocks)
            return
        begun = blocks[0].start if blocks else mark.end
        if begun > 0 and not mark.owner:
            found.notes.append(
                f"{path}: bytes 0 to {begun} are not recorded: adopted, or of an older version"
            )
            found.is_whole = False
        checked = blocks
        if not blocks and mark.start < mark.end:
            checked = [Block(name, mark.start, mark.end, mark.digest, _NOBODY)]
        wrong = _find_wrong(path, checked, found)
        if wrong is None:
            _add(found.rows, blocks)
            size = path.stat().st_size
            if size > mark.end:
                found.notes.append(f"{path}: {size - mark.end} bytes behind the last commit")
            return
        _add(found.rows, [block for block in blocks if block.start < wrong.start])
        found.problems.append(self._place(path, wrong, retained))

    def _place(self, path: Path, block: Block, retained: Retained) -> Problem:
        """Find where in a block the file is not what was stored; as exactly as the journal allows."""
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(block.start)
            data = file.read(block.end - block.start)
        wanted = {stream: told[:2] for stream, told in block.held.streams.items()}
        infos = {stream: info for stream in wanted if (info := self._info(stream)) is not None}
        if infos and not self._is_marks(block.file):
            found = self._find(infos, retained.take(wanted), block, data, path)
            if found is not None:
                return Problem(str(path), *found)
        if size < block.end and not block.held.streams:
            return Problem(str(path), f"byte {size}", f"the file ends here, {block.end} bytes were stored")
        what = "are not those that were stored"
        if size < block.end:
            what += f", and the file ends at {size}"
        return Problem(str(path), f"bytes {block.start} to {block.end}", what)

    def _is_marks(self, name: str) -> bool:
        stem = re.escape(marks_file(self._key).removesuffix(".csv"))
        return re.fullmatch(rf"{stem}(\.\d+)?\.csv", Path(name).name) is not None

    def _info(self, stream: int) -> OpenInfo | None:
        if stream not in self._infos:
            accounts = accounts_of(self._state.table)
            self._infos[stream] = info_of(accounts.get(stream))
        return self._infos[stream]


def _generations(blocks: list[Block]) -> dict[str, list[list[Block]]]:
    """Return the blocks of each file, of each name."""
    found: dict[str, list[list[Block]]] = {}
    for block in blocks:
        files = found.setdefault(block.file, [])
        if not files or block.start < files[-1][-1].end:
            files.append([])
        files[-1].append(block)
    return found


def _find_wrong(path: Path, blocks: list[Block], found: Checked) -> Block | None:
    """Return the first block that is not in the file as it was stored."""
    try:
        with path.open("rb") as file:
            for block in blocks:
                digest = xxhash.xxh3_64()
                file.seek(block.start)
                left = block.end - block.start
                while left and (data := file.read(min(left, _CHUNK_BYTES))):
                    digest.update(data)
                    left -= len(data)
                    found.read_bytes += len(data)
                if left or digest.intdigest() != block.digest:
                    return block
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return next(iter(blocks), None)
    return None


def _add(rows: dict[int, int], blocks: list[Block]) -> None:
    for block in blocks:
        for stream, (_, _, count) in block.held.streams.items():
            rows[stream] = rows.get(stream, 0) + count
