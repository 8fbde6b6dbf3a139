"""What others may ask of a store's data, from another process, while the store may be running.

A store offers it by a line in ``stores.READERS``: its key in ``store_config`` → a function ``make(place)``
that returns a ``StoreReader``. ``verify`` then proves its account, and ``reading`` gives its rows back. One
that does not is told of as "cannot be asked". Nothing here changes anything, or takes a lock.

A reader has one view of what is committed, as of when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgedaq.delivery import StreamTable
from edgedaq.frame import Frame

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Checked", "MakeReader", "Part", "Problem", "Retained", "StorePlace", "StoreReader"]


class Retained(Protocol):
    """The data frames that the journal still has."""

    def take(self, wanted: Mapping[int, tuple[int, int]]) -> Mapping[int, list[Frame]]:
        """Return those of {stream: (first seq, last seq)}, in order."""

    def follow(self, streams: Collection[int]) -> Iterator[Frame]:
        """Yield those of streams in the order of the journal, each once; read anew at each call."""


class StorePlace(NamedTuple):
    """Where a store is: its own state directory, where files go, and its TOML where that is known."""

    name: str
    state_dir: Path
    out_dir: Path
    config: Any = None


class Problem(NamedTuple):
    """A discrepancy: in which file (or table), at which byte or row, and what it is."""

    where: str
    place: str
    what: str


class Part(NamedTuple):
    """Rows that lie together: of one stream, or of several that take turns and cannot be told apart."""

    streams: tuple[int, ...]
    table: pa.Table


@dataclass
class Checked:
    """What was found when the stored data was read again.

    Attributes:
        problems: In the order in which they were found.
        notes: What could not be checked, and why that refutes nothing.
        rows: Of each stream, rows that are there as they were committed.
        away: Of each stream, rows in files that are not there: moved away or deleted.
        marked: Of each stream, rows that marks say are missing; None with those of which nobody knows.
        is_whole: All rows that were ever stored were recorded, so that the sums must be those of the account.
        read_bytes: How much was read.
        unasked: What cannot be asked, so that nothing is proven of it.
        counted: Rows that are there, but that nothing tells the values of any more.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    away: dict[int, int] = field(default_factory=dict)
    marked: dict[int, int | None] = field(default_factory=dict)
    is_whole: bool = True
    read_bytes: int = 0
    unasked: list[str] = field(default_factory=list)
    counted: int = 0


class StoreReader(Protocol):
    """One store, as it is committed; methods raise ``OSError`` or ``StoreError`` where it cannot be read."""

    @property
    def position(self) -> int | None:
        """The journal is stored up to here."""

    @property
    def table(self) -> StreamTable:
        """The account of each stream."""

    def check(self, retained: Retained) -> Checked:
        """Read everything that is stored and compare it with what was committed, and with the journal."""

    def parts(self, streams: Collection[int]) -> Iterator[Part]:
        """Yield the rows of streams, in the order in which they were stored.

        A part of which only some streams are asked for comes, too.
        """

    def marks(self) -> list[dict[str, str]]:
        """Return the marks, with the columns of ``marks.py`` as text."""


MakeReader = Callable[[StorePlace], StoreReader]
