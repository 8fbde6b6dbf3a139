"""The files that a file store appends to, and which name rows go to.

A data file belongs to one process (flock) and is only ever appended to, at the length that this process
knows. Anyone else may touch it at any time, so before the first append after each commit it is compared with
what is known, and if it was:

============================ ==============================================================================
moved away or deleted        a warning; it is complete as it is, rows go on in a new file of its name, or,
                             if a directory has it now, in ``name.2.csv``
made read-only               no difference to this process; the next one leaves it alone, as if made longer
made longer than written     a warning; it is left alone (sealed), rows go on in ``name.2.csv``
made shorter than written    an error that says what is lost; renamed to ``name.csv.1.bad``, as if moved away
============================ ==============================================================================

Recovery cuts a file that is longer than its commit record back to it, after checking that the bytes of the
last commit are those that were recorded; where they are not, it is another file, and is left alone. After an
orderly end nothing is cut: what is longer was made so by someone else.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash
from edgedaq.errors import StoreError
from edgedaq.logsetup import get_logger
from edgedaq.storage import Storage

from edgedaq_aggregator.stores.commits import FILES_MAX, Change, FileMark
from edgedaq_aggregator.stores.data_file import DataFile, MakeFile, holds
from edgedaq_aggregator.stores.file_names import PathRefusedError, numbered, resolve, unused
from edgedaq_aggregator.stores.ranges import BlockStreams, OpenBlock
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["DataFiles"]

OPEN_FILES_MAX = 256
_NUMBERS_MAX = 4000
_REFUSALS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EILSEQ)


class DataFiles:
    """All data files of one store.

    Args:
        out_dir: Made if it is absent; may itself be a symbolic link.
        marks: What is committed, by path below ``out_dir``; changed here as files are sealed or forgotten.
        declare: Makes the first mark of a file durable, before anything is written to it.
        undo: What containers are put back with.
    """

    def __init__(
        self,
        out_dir: Path,
        marks: dict[str, FileMark],
        storage: Storage,
        declare: Callable[[str, FileMark], None],
        undo: UndoLog,
    ) -> None:
        self._declare = declare
        self._undo = undo
        self._out_dir = out_dir
        self._storage = storage
        self._marks = marks
        self._changes: dict[str, FileMark | None] = {}
        self._grown: dict[str, BlockStreams] = {}
        self._blocks: dict[str, OpenBlock] = {}
        self._open: dict[str, DataFile] = {}
        self._new_directories: set[Path] = set()
        self._clock = 0
        self._adopts = True
        self._log = get_logger().bind(out_dir=str(out_dir))

    def recover(self, *, is_clean: bool, is_damaged: bool) -> None:
        """Make every file what its mark says, or put it aside."""
        self._adopts = not is_damaged
        for name, mark in list(self._marks.items()):
            path = self._out_dir / name
            if mark.sealed:
                continue
            if is_damaged:
                self._seal(name, "the commit records are damaged")
            elif path.is_symlink() or not path.is_file():
                self._forget_moved(name, mark)
            elif mark.owner:
                self._recover_owned(name, path, mark)
            elif path.stat().st_size < mark.end:
                self._quarantine(name, path, mark.end, path.stat().st_size)
            elif path.stat().st_size > mark.end:
                self._cut(name, path, mark, is_clean=is_clean)

    def locate(
        self,
        node: str,
        file_path: str,
        *,
        date: str = "",
        suffix: str = "",
        header: bytes = b"",
        make: MakeFile = DataFile,
        owner: int = 0,
        is_ours: bool = False,
        is_rotated: bool = False,
    ) -> DataFile:
        """Return the file that rows go to, open, and still the one that is known.

        Args:
            date: Prefixes the name; empty: no date.
            suffix: Added at the end unless it is there, e.g. ``.zst``.
            header: First line of the file; other columns go to another file. Empty: none.
            owner: The stream that the file is to hold alone, replacing an older file; 0: shared.
            is_ours: The name was not asked for by a stream; only then may it be that of marks.
            is_rotated: That the plain name is taken needs no word.

        Raises:
            PathRefusedError: There is no file to be had there, now or later.
            OSError: There may be later.
        """
        directory, base, changed = resolve(self._out_dir, node, file_path, is_ours=is_ours)
        self._new_directories |= changed
        if date:
            base = f"{date}_{base}"
        if suffix and not base.endswith(suffix):
            base += suffix
        digest = xxhash.xxh3_64_intdigest(header) if header else 0
        if owner:
            return self._own(directory, base, digest, make, owner)
        for number in range(1, _NUMBERS_MAX):
            file = self._candidate(directory, numbered(base, number, suffix), header, digest, make)
            if file is not None:
                if number > 1 and file.is_empty and not is_rotated:
                    self._log.warning("file.numbered", path=file.name, reason="another holds the plain name")
                return file
        message = f"{node}: {file_path}: all of {_NUMBERS_MAX} numbers are taken"
        raise PathRefusedError(message)

    @property
    def count(self) -> int:
        """Files that rows go to now."""
        return sum(not mark.sealed for mark in self._marks.values())

    def is_recorded(self, node: str, file_path: str) -> bool:
        """Tell whether a file of this name is known from earlier commits."""
        return f"{node}/{file_path}" in self._marks

    def is_usable(self, file: DataFile) -> bool:
        """Tell whether a located file may be appended to; if not, ``locate`` finds where to go on."""
        if file.is_gone or file.is_full:
            return False
        if file.is_checked:
            return True
        if file.replaces is not None or self._is_known(file):
            self._clock += 1
            file.is_checked, file.last_used = True, self._clock
            return True
        return False

    def leave(self, file: DataFile, reason: str) -> None:
        """Leave a file alone from now on."""
        self._seal(file.name, reason)
        self._drop(file)

    def changes(self, change: Change) -> tuple[list[DataFile], set[Path]]:
        """Flush; tell a commit what it records; return the files and directories to sync before."""
        dirty = [file for file in self._open.values() if file.is_dirty or file.is_fresh]
        self._flush(dirty)
        for file in dirty:
            self._mark(file)
            file.is_fresh = False
            file.pins += 1
        change.files, change.blocks, self._changes, self._grown = self._changes, self._grown, {}, {}
        directories, self._new_directories = self._new_directories, set()
        self._undo.begin_commit()
        return dirty, directories

    def committed(self, files: Sequence[DataFile]) -> None:
        """Be told that the files of ``changes`` are durable; closes those used longest ago."""
        self._undo.committed()
        for file in files:
            file.pins -= 1
            if file.replaces is not None:
                file.path, file.replaces = file.replaces, None
            if file.is_gone or (file.is_full and not file.is_dirty):
                self._drop(file)
        if len(self._open) <= OPEN_FILES_MAX:
            return
        idle = [file for file in self._open.values() if not file.pins and not file.is_dirty]
        idle.sort(key=lambda file: file.last_used)
        for file in idle[: len(self._open) - OPEN_FILES_MAX]:
            self._drop(file)

    def close(self) -> None:
        """Close all files as they are; no commit is under way."""
        for file in list(self._open.values()):
            file.pins = 0
            self._drop(file)
        self._undo.close()

    def _candidate(
        self, directory: Path, base: str, header: bytes, digest: int, make: MakeFile
    ) -> DataFile | None:
        path = directory / base
        name = str(path.relative_to(self._out_dir))
        file = self._open.get(name)
        if file is not None and (file.is_full or self.is_usable(file)):
            return file if file.header == digest and not file.owner and not file.is_full else None
        mark = self._marks.get(name)
        if mark is not None and (mark.sealed or mark.header != digest or mark.owner):
            return None
        if mark is not None and not path.is_file():
            self._forget_moved(name, mark)
            mark = None
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return None
        file = self._open_file(path, name, digest, make)
        if file is None:
            return None
        if mark is not None:
            if not self._undo.knows(name):
                self._declare(name, mark)
            file.go_on(mark.end, self._blocks.pop(name, None))
            if self._is_known(file):
                return file
            return self._candidate(directory, base, header, digest, make)
        if file.size and not (self._adopts and file.is_adoptable(header)):
            self._drop(file)
            return None
        if file.size:
            self._log.info("file.adopted", path=name, found_bytes=file.size)
        self._declare_file(file)
        return file

    def _declare_file(self, file: DataFile) -> None:
        self._marks[file.name] = FileMark(file.size, file.size, 0, file.header)
        self._declare(file.name, self._marks[file.name])

    def _open_file(
        self, path: Path, name: str, digest: int, make: MakeFile, owner: int = 0
    ) -> DataFile | None:
        self._make_room()
        is_new = not path.exists()
        try:
            fd = self._storage.lock(path)
        except BlockingIOError:
            return None
        except PermissionError:
            if is_new:
                raise
            self._seal(name, "it may not be written to")
            return None
        except OSError as e:
            if e.errno in _REFUSALS:
                message = f"{name}: {e.strerror}"
                raise PathRefusedError(message) from e
            raise
        file = make(path, name, fd, self._storage, size=self._storage.size(fd), header=digest, owner=owner)
        self._clock += 1
        file.is_checked, file.last_used = True, self._clock
        self._open[name] = file
        if is_new:
            self._new_directories.add(path.parent)
        return file

    def _flush(self, files: Sequence[DataFile]) -> None:
        for file in files:
            file.stage(self._undo)
        self._undo.sync()
        for file in files:
            file.flush()

    def _make_room(self) -> None:
        """Close files, those used longest ago first, also in the middle of a commit: made durable before."""
        idle = [file for file in self._open.values() if not file.pins and file.replaces is None]
        idle.sort(key=lambda file: file.last_used)
        for file in idle[: max(len(self._open) + 1 - OPEN_FILES_MAX, 0)]:
            if file.is_dirty:
                self._flush([file])
                self._storage.fdatasync(file.fd)
                self._mark(file)
            self._drop(file)

    def _own(self, directory: Path, base: str, digest: int, make: MakeFile, owner: int) -> DataFile:
        """Return the file of one stream: the one that it has, or one that will replace what is there."""
        path = directory / base
        name = str(path.relative_to(self._out_dir))
        file = self._open.get(name)
        if file is not None and file.owner == owner and self.is_usable(file):
            return file
        if file is not None:
            self._drop(file)
        if path.is_symlink() or path.is_dir():
            message = f"{name} is not a file"
            raise PathRefusedError(message)
        mark = self._marks.get(name)
        if mark is not None and mark.owner == owner and mark.header == digest and path.exists():
            found = self._open_file(path, name, digest, make, owner)
            if found is not None and found.size == mark.end and holds(self._storage, found.fd, mark):
                return found
            if found is not None:
                self._drop(found)
        file = self._open_file(directory / f".{base}.new", name, digest, make, owner)
        if file is None:
            message = f"{name} is being replaced by another process"
            raise StoreError(message)
        self._storage.truncate(file.fd, 0)
        file.go_on(0)
        file.replaces, file.is_fresh = path, True
        return file

    def _is_known(self, file: DataFile) -> bool:
        """Compare an open file with what was written; put it aside where someone changed it."""
        if not self._storage.is_at(file.fd, file.path):
            self._log.warning("file.moved", path=file.name, committed_bytes=file.size)
            self._forget(file.name)
        elif (found := self._storage.size(file.fd)) > file.disk_end:
            self._seal(file.name, f"someone else appended {found - file.disk_end} bytes")
        elif found < file.disk_end:
            self._quarantine(file.name, file.path, file.disk_end, found)
        else:
            return True
        self._drop(file)
        return False

    def _cut(self, name: str, path: Path, mark: FileMark, *, is_clean: bool) -> None:
        try:
            fd = self._storage.lock(path)
        except BlockingIOError:
            self._seal(name, "another process has it")
            return
        try:
            size = self._storage.size(fd)
            if is_clean or not holds(self._storage, fd, mark):
                self._seal(name, f"someone else changed it, {size - mark.end} bytes are not ours")
                return
            self._storage.truncate(fd, mark.end)
            self._log.info("file.cut", path=name, cut_bytes=size - mark.end)
        finally:
            self._storage.close(fd)

    def _recover_owned(self, name: str, path: Path, mark: FileMark) -> None:
        """A replacing file may have its name without a record: its stream comes again, and replaces it."""
        fd = self._storage.open(path, write=True)
        try:
            if self._storage.size(fd) >= mark.end and holds(self._storage, fd, mark):
                self._storage.truncate(fd, mark.end)
            else:
                self._forget(name)
        finally:
            self._storage.close(fd)

    def _mark(self, file: DataFile) -> None:
        mark, held = file.mark()
        self._marks[file.name] = self._changes[file.name] = mark
        if held is not None:
            self._grown[file.name] = held

    def _seal(self, name: str, reason: str) -> None:
        mark = self._marks.get(name, FileMark(0))._replace(sealed=True)
        self._marks[name] = self._changes[name] = mark
        self._log.warning("file.sealed", path=name, reason=reason)

    def _forget_moved(self, name: str, mark: FileMark) -> None:
        if mark.end:
            self._log.warning("file.moved", path=name, committed_bytes=mark.end)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._marks.pop(name, None)
        self._changes[name] = None

    def _quarantine(self, name: str, path: Path, expected: int, found: int) -> None:
        self._forget(name)
        aside = unused(path, ".bad")
        self._storage.rename(path, aside)
        self._new_directories.add(path.parent)
        self._log.error(
            "file.shortened",
            path=name,
            lost_bytes=expected - found,
            first_lost_byte=found,
            moved_to=aside.name,
        )

    def _drop(self, file: DataFile) -> None:
        file.is_gone, file.is_checked = True, False
        if self._open.get(file.name) is file:
            del self._open[file.name]
            self._blocks[file.name] = file.block
            while len(self._blocks) > FILES_MAX:
                del self._blocks[next(iter(self._blocks))]
        if not file.pins:
            self._close_file(file)

    def _close_file(self, file: DataFile) -> None:
        if file.fd >= 0:
            file.let_go()
            self._storage.close(file.fd)
            file.fd = -1
