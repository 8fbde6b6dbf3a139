"""Backends that end, or are away, between their calls: for what no ``Storage`` sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgedaq.errors import StoreError
from edgedaq.frame import Frame
from edgedaq.open_info import OpenInfo
from edgedaq_aggregator.stores.backend import Backend, Recovered, Refusal
from edgedaq_aggregator.stores.commits import Change
from edgedaq_aggregator.stores.marks import Mark

from tests.contract.faulty_storage import KilledStorage


class ForwardedCalls:
    """A backend whose calls all pass ``before`` and ``after`` with their names."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def before(self, call: str) -> None:
        """Be told that a call begins."""

    def after(self, call: str) -> None:
        """Be told that a call has returned."""

    def _call(self, name: str, *args: Any) -> Any:
        self.before(name)
        found = getattr(self._inner, name)(*args)
        self.after(name)
        return found

    def recover(self) -> Recovered:
        found: Recovered = self._call("recover")
        return found

    def open(self, stream: int, info: OpenInfo) -> None:
        self._call("open", stream, info)

    def write(self, stream: int, frames: Sequence[Frame]) -> list[Refusal]:
        found: list[Refusal] = self._call("write", stream, frames)
        return found

    def write_mark(self, mark: Mark) -> None:
        self._call("write_mark", mark)

    def end(self, stream: int) -> None:
        self._call("end", stream)

    def commit(self, change: Change) -> Callable[[], None]:
        make_durable: Callable[[], None] = self._call("commit", change)

        def forwarded() -> None:
            self.before("make_durable")
            make_durable()
            self.after("make_durable")

        return forwarded

    def committed(self) -> None:
        self._call("committed")

    def facts(self) -> dict[str, Any]:
        return self._inner.facts()

    def close(self) -> None:
        self._inner.close()


class EndedCalls(ForwardedCalls):
    """Ends between any two calls, as the storage counts them; ``close`` is what a death does, too."""

    def __init__(self, inner: Backend, storage: KilledStorage) -> None:
        super().__init__(inner)
        self._storage = storage

    def before(self, call: str) -> None:  # noqa: ARG002 -- every call counts
        self._storage.step()

    def after(self, call: str) -> None:
        if call == "make_durable":  # what follows any other call is the begin of the next one
            self._storage.step()


class AwayBackend:
    """Makes backends that fail in one call as long as ``is_away``.

    Args:
        where: The call, e.g. ``commit``.
    """

    def __init__(self, where: str) -> None:
        self.is_away = False
        self.refused_count = 0
        self._where = where
        self._fails_next = False

    def fail_once(self) -> None:
        """Lose the connection: the next call fails, whichever it is."""
        self._fails_next = True

    def wrap(self, backend: Backend) -> Backend:
        """Return the backend with this way of being away."""
        return _AwayCalls(backend, self)

    def pass_call(self, call: str) -> None:
        """Fail if the backend is away."""
        if self._fails_next or (self.is_away and call == self._where):
            self._fails_next = False
            self.refused_count += 1
            message = "the backend is away"
            raise StoreError(message)


class _AwayCalls(ForwardedCalls):
    def __init__(self, inner: Backend, away: AwayBackend) -> None:
        super().__init__(inner)
        self._away = away

    def before(self, call: str) -> None:
        self._away.pass_call(call)
