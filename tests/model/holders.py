"""A ring and a log on disk as the delivery model sees them: lists, positions, and what is durable."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgedaq.delivery import gap_of
from edgedaq.frame import Frame, Kind, decode

__all__ = ["Log", "Ring", "check_account", "name_of"]


@dataclass
class Ring:
    """A ring of one life: it keeps what was not released, and outlives every process."""

    runs: list[tuple[int, bytes]] = field(default_factory=list)
    end: int = 0
    released: int = 0
    opens: dict[int, bytes] = field(default_factory=dict)

    def put(self, raw: bytes) -> None:
        self.end += len(raw)
        self.runs.append((self.end, raw))

    def release(self, up_to: int) -> None:
        assert up_to <= self.end
        self.released = max(self.released, up_to)
        self.runs = [run for run in self.runs if run[0] > self.released]

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Log:
    """A list of frames with positions, and how far it is durable."""

    frames: list[tuple[int, bytes]] = field(default_factory=list)
    end: int = 0
    durable: int = 0

    def append(self, raw: bytes) -> int:
        self.end += len(raw) + 24
        self.frames.append((self.end, raw))
        return self.end

    def cut(self, position: int) -> None:
        self.frames = [item for item in self.frames if item[0] <= position]
        self.end = max((item[0] for item in self.frames), default=0)
        self.durable = min(self.durable, self.end)

    def after(self, position: int) -> list[tuple[int, bytes]]:
        return [item for item in self.frames if item[0] > position]


def check_account(journal: Log, stream: int, count: int, rows: int, *, may_have_gaps: bool) -> None:
    """Check that the frames of a stream, and all of its rows, are in the journal once, in order."""
    covered: list[int] = []
    found = 0
    for _, raw in journal.frames:
        frame = decode(memoryview(raw))
        if frame.stream != stream:
            continue
        if frame.kind is Kind.GAP:
            assert may_have_gaps, "a GAP where nothing was lost"
            last, lost, _ = gap_of(frame)
            covered += range(frame.seq, last + 1)
            assert lost is not None
            found += lost
        else:
            covered.append(frame.seq)
            found += frame.rows
    if may_have_gaps:
        assert covered == list(range(len(covered)))
    else:
        assert covered == list(range(count))
        assert found == rows


def name_of(frame: Frame) -> str:
    """Return what to call a frame in a message."""
    return f"{frame.kind.name} {frame.stream}/{frame.seq}"
