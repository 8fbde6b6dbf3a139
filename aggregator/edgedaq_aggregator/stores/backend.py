"""What a store's backend must do: the contract that every one of them is tested against.

The loop and the engine (``loop.py``, ``engine.py``) follow the journal, drop what is there twice, coalesce,
and decide when to commit. A backend writes, and makes data and watermarks durable in one step::

    recover ─► (open | write | write_mark | end)* ─► commit ─► make_durable() ─► committed ─┐
       ▲                      ▲                                                              │
       │ any OSError, StoreError                                                             │
       └──────────────────────┴──────────────────────────────────────────────────────────────┘

``make_durable`` may run in another thread while the next rows are written. After any error everything since
the last durable commit is void: ``recover`` returns to it, and the same rows come again.

A store may also offer a reader (``reader.py``, one line in ``stores.READERS``): then ``verify`` proves what
it has, and ``reading`` gives its rows back. The contract's ``check_recorded`` asks it after every end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from edgedaq.delivery import StreamTable
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.commits import Change
from edgedaq_aggregator.stores.marks import Mark

__all__ = ["Backend", "Recovered", "Refusal", "SettlingBackend"]


class Recovered(NamedTuple):
    """What is committed: the accounts, and where to go on in the journal (None: nothing ever was)."""

    table: StreamTable
    position: int | None


class Refusal(NamedTuple):
    """A frame that could not be stored for what it is."""

    frame: Frame
    reason: str


class Backend(Protocol):
    """One backend. Every method may raise ``StoreError`` or ``OSError``; all are called from one thread."""

    def recover(self) -> Recovered:
        """Go back to the last durable commit; the streams in its table are open again."""

    def open(self, stream: int, info: OpenInfo) -> None:
        """Take a new stream. Whatever its store_config says, its rows are taken."""

    def write(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        """Take data frames of an open stream, in order; RAW pieces come all of a message together.

        Returns:
            The frames that cannot be stored for what they are; nothing of them was.
        """

    def write_mark(self, mark: Mark) -> None:
        """Take a mark."""

    def end(self, stream: int) -> None:
        """Forget a stream that has ended; a stream that is not open is none."""

    def commit(self, change: Change) -> Callable[[], None]:
        """Take what was written so far, with its watermarks, as one commit; return what makes it durable."""

    def committed(self) -> None:
        """Be told that the commit is durable, before the next ``commit``."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth telling in ``status``, e.g. ``{"files": 3}``."""

    def close(self) -> None:
        """Give everything back; commits nothing. May be called again, and before ``recover``."""


@runtime_checkable
class SettlingBackend(Protocol):
    """A backend whose commits may become durable after they have returned: the journal waits for that."""

    def durable_position(self) -> int | None:
        """Return up to which position commits are durable, None if none is known; asked every second."""
