"""What all stores that append to files share: streams to files, and one commit record over all of them.

A store of this kind brings a ``FileFormat``: what its options are, and how frames become bytes. This module
finds the file that they go to (``data_files.py``), and commits (``commits.py``): fdatasync the data, rename
what replaces, fsync directories, then append the record.

A stream whose file cannot be had (a hostile path, a directory of that name) is not lost: its rows go to
``_refused/<stream>`` of its node, and a mark says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edgedaq.clock import utc_date
from edgedaq.errors import ConfigError, StoreError
from edgedaq.frame import Frame
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo
from edgedaq.storage import Storage

from edgedaq_aggregator.stores.backend import Recovered, Refusal
from edgedaq_aggregator.stores.commits import Change, CommitLog
from edgedaq_aggregator.stores.data_file import DataFile, FileUnusableError, MakeFile
from edgedaq_aggregator.stores.data_files import DataFiles
from edgedaq_aggregator.stores.file_names import PathRefusedError
from edgedaq_aggregator.stores.marks import MARKS_HEADER, Mark, mark_line, marks_file
from edgedaq_aggregator.stores.streams import REFUSED, redirected_to, redirection, reopened
from edgedaq_aggregator.stores.tables import by_time, each_or_refused
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["Encoder", "FileBackend", "FileFormat", "FileOptions", "Piece"]

_NS_PER_DAY = 86_400_000_000_000
_NS_PER_MINUTE = 60_000_000_000


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Where rows go: what the options of every file format come down to.

    ``suffix`` ends the name, ``make`` makes the file that rows are appended to. ``rotate_bytes`` and
    ``rotate_ns`` say when rows go on in the next file, 0 for never.
    """

    file_path: str
    add_date: bool = False
    overwrite: bool = False
    suffix: str = ""
    make: MakeFile = DataFile
    rotate_bytes: int = 0
    rotate_ns: int = 0

    @property
    def period_ns(self) -> int:
        """What of time has a file of its own; 0: all of it."""
        return self.rotate_ns or (_NS_PER_DAY if self.add_date else 0)

    def prefix(self, period: int) -> str:
        """Return what begins the name of the file of a period: its date, and the time where it rotates."""
        if period < 0:
            return ""
        begin_ns = period * self.period_ns
        hours, minutes = divmod(begin_ns % _NS_PER_DAY // _NS_PER_MINUTE, 60)
        return utc_date(begin_ns) + (f"T{hours:02}-{minutes:02}" if self.rotate_ns else "")


class Piece(NamedTuple):
    """What to append to a file that begins with ``header`` (empty: nothing).

    That is bytes, or what the stream's ``make`` takes. Pieces with other headers go to other files.
    """

    header: bytes
    buffers: Sequence[Any]


class Encoder(Protocol):
    """Turns the data frames of one stream into bytes."""

    def encode(self, frames: Sequence[Frame]) -> list[Piece]:
        """Return the bytes of frames, in order; of RAW pieces, all of their message are there.

        Raises:
            WireError: A body is not what OPEN says.
        """


class FileFormat(Protocol):
    """One kind of file."""

    key: str
    """Its name in ``store_config``."""

    def options(self, store_config: object) -> FileOptions:
        """Return what ``store_config[key]`` of a stream asks for.

        Raises:
            ConfigError: It is not valid.
        """

    def encoder(self, info: OpenInfo) -> Encoder:
        """Return what encodes a stream."""


_Encode = Callable[[Sequence[Frame]], list[tuple[Sequence[Frame], list[Piece]]]]


@dataclass(slots=True)
class _Stream:
    info: OpenInfo
    options: FileOptions
    encoder: Encoder
    files: dict[tuple[int, bytes], DataFile]
    is_superseded: bool = False


class FileBackend:
    """Appends to files under ``out_dir``; see ``backend.Backend`` for the contract.

    Args:
        state_dir: Of this store alone: the commit records.
    """

    def __init__(self, file_format: FileFormat, state_dir: Path, out_dir: Path, storage: Storage) -> None:
        self._format = file_format
        self._state_dir = state_dir
        self._out_dir = out_dir
        self._storage = storage
        self._streams: dict[int, _Stream] = {}
        self._newest: dict[tuple[str, str], int] = {}
        self._recovered: tuple[CommitLog, DataFiles] | None = None
        self._under_way: list[DataFile] = []
        self._log = get_logger().bind(store=file_format.key)

    def recover(self) -> Recovered:
        """See ``Backend``."""
        self.close()
        commits = CommitLog(self._state_dir, self._format.key, self._storage)
        state = commits.state
        if commits.damage:
            self._log.error("commits.damaged", reason=commits.damage, path=str(self._state_dir))
        undo = UndoLog(self._state_dir, self._storage, state.files)
        files = DataFiles(self._out_dir, dict(state.files), self._storage, commits.declare, undo)
        self._recovered = commits, files
        if not commits.damage:
            undo.restore(self._out_dir)
        files.recover(is_clean=state.clean, is_damaged=bool(commits.damage))
        table = reopened(state, self.open, self._log)
        return Recovered(table, state.position)

    def open(self, stream: int, info: OpenInfo) -> None:
        """See ``Backend``."""
        try:
            options = self._format.options(info.store_config.get(self._format.key))
        except ConfigError as e:
            options = self._refused(stream, info, str(e))
        if options.overwrite:
            place = (info.node, options.file_path)
            older = self._streams.get(self._newest.get(place, 0))
            if older is not None:
                older.is_superseded = True
            self._newest[place] = stream
        self._streams[stream] = _Stream(info, options, self._format.encoder(info), {})

    def write(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        """See ``Backend``."""
        held = self._streams[stream]
        if held.is_superseded:
            return []
        refused: list[Refusal] = []
        groups: Iterable[tuple[int, Sequence[Frame]]] = [(-1, frames)]
        if held.options.period_ns:
            groups = by_time(frames, held.info.t_open_ns, held.options.period_ns)
        for period, group in groups:
            for taken, pieces in each_or_refused(self._encoded(stream, held, period), group, refused):
                for piece in pieces:
                    file = self._append(stream, held, period, piece)
                if pieces:
                    rows = sum(frame.rows for frame in taken)
                    file.tell(stream, taken[0].seq, taken[-1].seq, rows)
                    file.is_full = 0 < held.options.rotate_bytes <= file.length
        return refused

    def write_mark(self, mark: Mark) -> None:
        """See ``Backend``."""
        name = marks_file(self._format.key)
        try:
            file = self._files.locate(mark.info.node, name, header=MARKS_HEADER, is_ours=True)
        except PathRefusedError as e:
            raise StoreError(str(e)) from e
        buffers = [mark_line(mark)]
        file.append([MARKS_HEADER, *buffers] if file.is_empty else buffers)

    def end(self, stream: int) -> None:
        """See ``Backend``."""
        held = self._streams.pop(stream, None)
        if held is not None and self._newest.get((held.info.node, held.options.file_path)) == stream:
            del self._newest[held.info.node, held.options.file_path]

    def commit(self, change: Change) -> Callable[[], None]:
        """See ``Backend``."""
        commits, storage = self._commits, self._storage
        files, directories = self._files.changes(change)

        def make_durable() -> None:
            for file in files:
                storage.fdatasync(file.fd)
                if file.replaces is not None:
                    storage.rename(file.path, file.replaces)
                    directories.add(file.replaces.parent)
            for directory in directories:
                storage.sync_directory(directory)
            commits.append(change)

        self._under_way = files
        return make_durable

    def committed(self) -> None:
        """See ``Backend``."""
        self._files.committed(self._under_way)
        self._under_way = []

    def facts(self) -> dict[str, Any]:
        """See ``Backend``."""
        return {"files": self._files.count}

    def close(self) -> None:
        """See ``Backend``."""
        self._under_way = []
        self._streams.clear()
        self._newest.clear()
        if self._recovered is not None:
            self._files.close()
            self._commits.close()
            self._recovered = None

    @property
    def _commits(self) -> CommitLog:
        return self._opened[0]

    @property
    def _files(self) -> DataFiles:
        return self._opened[1]

    @property
    def _opened(self) -> tuple[CommitLog, DataFiles]:
        if self._recovered is None:
            message = "a backend must be recovered before it is used"
            raise RuntimeError(message)
        return self._recovered

    def _refused(self, stream: int, info: OpenInfo, reason: str) -> FileOptions:
        path = redirected_to(stream, self._format.key)
        mark = redirection(stream, info, reason, path, self._log)
        if not self._files.is_recorded(info.node, path):
            self.write_mark(mark)
        return self._format.options({"file_path": path})

    def _encoded(self, stream: int, held: _Stream, period: int) -> _Encode:
        """Return what encodes frames, tells whether there is a file for them, and says which they were."""

        def encode(frames: Sequence[Frame]) -> list[tuple[Sequence[Frame], list[Piece]]]:
            pieces = held.encoder.encode(frames)
            for piece in pieces:
                self._prepared(stream, held, period, piece)
            return [(frames, pieces)]

        return encode

    def _append(self, stream: int, held: _Stream, period: int, piece: Piece) -> DataFile:
        file = self._prepared(stream, held, period, piece)
        if piece.header and file.is_empty:
            file.begin(piece.header)
        file.append(piece.buffers)
        return file

    def _prepared(self, stream: int, held: _Stream, period: int, piece: Piece) -> DataFile:
        """Return the file that a piece goes to.

        Raises:
            WireError: There can be none.
        """
        file = held.files.get((period, piece.header))
        if file is None or not self._files.is_usable(file):
            file = self._locate(stream, held, period, piece.header)
            held.files[period, piece.header] = file
        try:
            file.prepare(piece.buffers)
        except FileUnusableError as e:
            self._files.leave(file, str(e))
            return self._prepared(stream, held, period, piece)
        return file

    def _locate(self, stream: int, held: _Stream, period: int, header: bytes) -> DataFile:
        if len(held.files) > 8:
            held.files.clear()
        options = held.options
        try:
            return self._files.locate(
                held.info.node,
                options.file_path,
                date=options.prefix(period),
                suffix=options.suffix,
                header=header,
                make=options.make,
                owner=stream if options.overwrite else 0,
                is_rotated=options.rotate_bytes > 0,
            )
        except PathRefusedError as e:
            if options.file_path.startswith(REFUSED):
                raise StoreError(str(e)) from e
            held.options = self._refused(stream, held.info, str(e))
            return self._locate(stream, held, -1, header)
