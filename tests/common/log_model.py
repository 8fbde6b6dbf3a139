"""A disk that forgets: records what a log writes and flushes, and rebuilds what a power cut may leave of it.

The model of the disk: a write reaches it in sectors of 512 bytes; each sector of a write that no fdatasync
followed may be missing, independently. Names change in the order in which they were changed, and any number
of the last changes may be missing unless the directory was synced since. What was synced stays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedaq.delivery import StreamTable, Verdict
from edgedaq.frame import Frame, Kind, decode, encode, pack_map
from edgedaq.segment_format import Entry, Hole, Record
from edgedaq.segment_reader import SegmentReader
from edgedaq.segments import SegmentLog
from edgedaq.storage import Buffer, OsStorage

SECTOR_BYTES = 512
SEGMENT_BYTES = 16 << 10


def frame_of(kind: Kind, stream: int, seq: int, body: bytes = b"", **fields: Any) -> Frame:
    return decode(memoryview(encode(kind, stream, seq, body, **fields)))


def open_of(stream: int) -> Frame:
    return frame_of(Kind.OPEN, stream, 0, pack_map({"node": "n", "stream": stream}))


def raw_of(stream: int, seq: int, body_bytes: int = 100, *, rows: int = 1) -> Frame:
    body = random.Random(stream * 1_000_003 + seq).randbytes(body_bytes)
    return frame_of(Kind.RAW, stream, seq, body, rows=rows, row0=(seq - 1) * rows)


def close_of(stream: int, seq: int) -> Frame:
    return frame_of(
        Kind.CLOSE, stream, seq, pack_map({"rows": seq - 1, "tail_unknown": False, "bound_s": 0.0})
    )


def read_all(directory: Path, begin: int, end: int, max_bytes: int = 1 << 20) -> list[Record | Hole]:
    found: list[Record | Hole] = []
    with SegmentReader(directory, begin) as reader:
        while entries := reader.read(end, max_bytes):
            found += entries
    return found


def records_in(entries: Sequence[Entry]) -> list[Record]:
    return [entry for entry in entries if isinstance(entry, Record)]


def frames_in(entries: Sequence[Entry]) -> list[Frame]:
    return [record.frame for record in records_in(entries)]


class RecordingStorage(OsStorage):
    """Does what it is told, and notes it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._files: dict[str, int] = {}
        self._open: dict[int, int] = {}
        self._count = 0

    def adopt(self, directory: Path) -> None:
        """Take over files that are there, and durable, already."""
        for path in directory.iterdir():
            self._count += 1
            self._files[path.name] = self._count
            self.events.append(("create", path.name, self._count))
            self.events.append(("write", self._count, 0, path.read_bytes()))
            self.events.append(("sync", self._count))
        self.events.append(("names",))

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        fd = super().open(path, write=write, create=create)
        if path.name not in self._files:
            self._count += 1
            self._files[path.name] = self._count
            self.events.append(("create", path.name, self._count))
        self._open[fd] = self._files[path.name]
        return fd

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)
        super().close(fd)

    def preallocate(self, fd: int, size_bytes: int) -> None:
        super().preallocate(fd, size_bytes)
        self.events.append(("grow", self._open[fd], size_bytes))

    def truncate(self, fd: int, size_bytes: int) -> None:
        super().truncate(fd, size_bytes)
        self.events.append(("truncate", self._open[fd], size_bytes))

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        done = super().pwritev(fd, buffers, offset)
        self.events.append(("write", self._open[fd], offset, b"".join(buffers)[:done]))
        return done

    def fdatasync(self, fd: int) -> None:
        self.events.append(("sync", self._open[fd]))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._files[target.name] = self._files.pop(source.name)
        self.events.append(("rename", source.name, target.name))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._files.pop(path.name, None)
        self.events.append(("unlink", path.name))

    def sync_directory(self, path: Path) -> None:  # noqa: ARG002
        self.events.append(("names",))


class QuickStorage(OsStorage):
    """For logs whose machine is not switched off: flushes nothing, and is quick."""

    def fdatasync(self, fd: int) -> None:
        """Does nothing."""

    def sync_directory(self, path: Path) -> None:
        """Does nothing."""


class ForgetfulStorage(RecordingStorage):
    """Claims to have flushed, and has not."""

    def fdatasync(self, fd: int) -> None:
        """Does nothing."""


@dataclass
class _Disk:
    files: dict[int, bytearray] = field(default_factory=dict)
    pending: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    renamed: list[tuple[Any, ...]] = field(default_factory=list)

    def take(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("grow" | "truncate" | "write", file, *_):
                self.pending.setdefault(file, []).append(event)
            case ("sync", file):
                for one in self.pending.pop(file, []):
                    self._apply(one)
            case ("names",):
                for one in self.renamed:
                    self._rename(one)
                self.renamed.clear()
            case ("create" | "rename" | "unlink", *_):
                self.renamed.append(event)

    def cut_power(self, rng: random.Random, kept: float) -> None:
        """Lose what was not synced, but for a share of it."""
        for one in self.renamed[: len(self.renamed) if kept >= 1 else rng.randint(0, len(self.renamed))]:
            self._rename(one)
        for events in self.pending.values():
            for event in events:
                if event[0] != "write":
                    if rng.random() < max(kept, 0.5):
                        self._apply(event)
                    continue
                _, file, offset, data = event
                start = 0
                while start < len(data):
                    end = min(len(data), start + SECTOR_BYTES - (offset + start) % SECTOR_BYTES)
                    if rng.random() < kept:
                        self._apply(("write", file, offset + start, data[start:end]))
                    start = end

    def _rename(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("create", name, file):
                self.names[name] = file
            case ("rename", source, target):
                self.names[target] = self.names.pop(source)
            case ("unlink", name):
                self.names.pop(name, None)

    def _apply(self, event: tuple[Any, ...]) -> None:
        content = self.files.setdefault(event[1], bytearray())
        match event:
            case ("grow", _, size):
                content.extend(bytes(max(0, size - len(content))))
            case ("truncate", _, size):
                del content[size:]
            case ("write", _, offset, data):
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data


def power_cut(events: Sequence[tuple[Any, ...]], directory: Path, rng: random.Random, kept: float) -> None:
    """Make in ``directory`` what a power cut after these events leaves."""
    disk = _Disk()
    for event in events:
        disk.take(event)
    disk.cut_power(rng, kept)
    directory.mkdir()
    for name, file in disk.names.items():
        (directory / name).write_bytes(disk.files.get(file, b""))


class Workload:
    """A log at work: several streams, random sizes, and a note of each promise that it made.

    ``notes`` in the storage's events: ("promise", durable position), ("trim", position).
    """

    def __init__(self, directory: Path, storage: RecordingStorage, seed: int, *, resends: bool) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        self.storage = storage
        self.resends = resends
        self.appended: dict[bytes, int] = {}
        self.next_seq: dict[int, int] = {}
        self.log = self._open()

    def _open(self) -> SegmentLog:
        return SegmentLog(
            self.directory,
            limit_bytes=1 << 30,
            segment_bytes=SEGMENT_BYTES,
            resends=self.resends,
            storage=self.storage,
        )

    def run(self, steps: int) -> None:
        actions = [self.append] * 8 + [self.sync] * 4 + [self.trim, self.cursor, self.reopen]
        for _ in range(steps):
            self.rng.choice(actions)()
        self.log.close()

    def append(self) -> None:
        frames = [self._next_frame() for _ in range(self.rng.randint(1, 5))]
        before = self.log.end
        end = self.log.append(frames)
        for record in read_all(self.directory, before, end):
            assert isinstance(record, Record)
            self.appended[bytes(record.frame.raw)] = record.end

    def _next_frame(self) -> Frame:
        stream = (
            self.rng.randint(1, 4)
            if not self.next_seq
            else self.rng.choice([*self.next_seq, len(self.next_seq) + 1])
        )
        seq = self.next_seq.get(stream)
        if seq is None:
            self.next_seq[stream] = 1
            return open_of(stream)
        self.next_seq[stream] = seq + 1
        return raw_of(stream, seq, self.rng.choice([0, 10, 300, 1500, 6000]))

    def sync(self) -> None:
        self.storage.events.append(("promise", self.log.sync()))

    def trim(self) -> None:
        before = self.rng.randint(self.log.begin, self.log.end)
        self.storage.events.append(("trim", before))
        self.log.trim(before)

    def cursor(self) -> None:
        self.log.save_cursor({"at": self.log.end})

    def reopen(self) -> None:
        self.log.close()
        self.log = self._open()


def check_survivors(workload: Workload, events: Sequence[tuple[Any, ...]], directory: Path) -> str:
    """Open what a power cut left; return what is wrong with it, empty when nothing is."""
    promised = max((event[1] for event in events if event[0] == "promise"), default=0)
    trimmed = max((event[1] for event in events if event[0] == "trim"), default=0)
    with SegmentLog(
        directory,
        limit_bytes=1 << 30,
        segment_bytes=SEGMENT_BYTES,
        resends=workload.resends,
        storage=QuickStorage(),
    ) as log:
        if log.recovery.problems:
            return f"problems {log.recovery.problems}"
        begin = log.begin
        entries = read_all(directory, begin, log.end)
        if workload.resends and any(isinstance(entry, Hole) for entry in entries):
            return f"a hole in a log that is cut at holes: {log.recovery}"
        with SegmentReader(directory, begin) as reader:
            table = reader.table_at_start()
        found = set()
        for frame in frames_in(entries):
            if table.judge(frame) is Verdict.UNKNOWN and not workload.resends:
                if workload.appended[bytes(open_of(frame.stream).raw)] <= promised:
                    return f"stream {frame.stream} has lost its OPEN"
                continue
            if table.judge(frame) not in {Verdict.ACCEPT, Verdict.DUPLICATE}:
                return f"stream {frame.stream}, seq {frame.seq} is {table.judge(frame)}; {log.recovery}"
            if table.judge(frame) is Verdict.ACCEPT:
                table.apply(frame)
            raw = bytes(frame.raw)
            if raw not in workload.appended and frame.kind is not Kind.GAP:
                return f"invented: {frame.kind}, stream {frame.stream}, seq {frame.seq}"
            found.add(raw)
        if begin > trimmed > 0 or (begin and not trimmed):
            return f"the log begins at {begin}, behind what was trimmed, {trimmed}"
        missing = [
            raw for raw, end in workload.appended.items() if trimmed < end <= promised and raw not in found
        ]
        if missing:
            return f"{len(missing)} promised frames are missing; {log.recovery}"
        if table.snapshot() != log.table.snapshot():
            return f"the account at the end differs from the records: {_difference(table, log.table)}"
        return _go_on(log, table)


def _difference(read: StreamTable, kept: StreamTable) -> str:
    rows = (
        {str(row[0]): row[2:] for row in read.snapshot()},
        {str(row[0]): row[2:] for row in kept.snapshot()},
    )
    return "; ".join(
        f"{key}: {rows[0].get(key)} != {rows[1].get(key)}"
        for key in {**rows[0], **rows[1]}
        if rows[0].get(key) != rows[1].get(key)
    )


def _go_on(log: SegmentLog, table: StreamTable) -> str:
    more = [open_of(99), raw_of(99, 1)]
    more += [raw_of(state.stream, state.next_seq) for state in table.streams.values()]
    begin, end = log.end, log.append(more)
    log.sync()
    got = [bytes(frame.raw) for frame in frames_in(read_all(log.directory, begin, end))]
    return "" if got == [bytes(frame.raw) for frame in more] else "what was appended afterwards is not read"
