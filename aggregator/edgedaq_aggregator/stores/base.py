"""A store as a job: its backend, driven by the loop, on the journal of this aggregator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from edgedaq.errors import StoreError
from edgedaq.job import DAQJob
from edgedaq.memory import keep_large_blocks

from edgedaq_aggregator.journal_client import JournalFollower
from edgedaq_aggregator.stores.backend import Backend
from edgedaq_aggregator.stores.loop import Cadence, StoreLoop
from edgedaq_aggregator.stores.reader import StorePlace

__all__ = ["DAQJobStore"]


class DAQJobStore(DAQJob):
    """Derive a store from it: say its ``key`` in ``store_config``, and make its backend.

    It stores every stream whose OPEN has the key, exactly once; see ``backend.py`` for what the backend does.
    """

    stops_itself: ClassVar[bool] = True
    key: ClassVar[str]

    def make_backend(self, state_dir: Path, out_dir: Path) -> Backend:
        """Return the backend, not yet recovered; called again after each failure.

        Args:
            state_dir: Of this store alone.
        """
        raise NotImplementedError

    @classmethod
    def doubts(cls, config: Any) -> list[str]:  # noqa: ARG003 -- the default has none
        """Return what ``check`` is to warn of; a server that is away is one thing, not an error."""
        return []

    def cadence(self) -> Cadence:
        """Return when it commits."""
        return Cadence()

    @classmethod
    def put_away(cls, place: StorePlace) -> list[Path]:
        """Put away all that is stored, so that the store begins anew; return where files are now.

        Raises:
            StoreError: This cannot be done, or not now.
        """
        message = f"{place.name}: only a store of files can be restored in its place; name a new one instead"
        raise StoreError(message)

    def start(self) -> None:
        """Store until asked to stop."""
        keep_large_blocks()
        self._loop.run()

    def report(self) -> dict[str, Any]:
        """Return lag, counts, the newest streams' watermarks, and what is wrong."""
        context, loop = self.context, self._loop
        context.in_count, context.in_bytes, context.last_in_ns = loop.in_count, loop.in_bytes, loop.last_in_ns
        return loop.report()

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        spec = context.spec
        state_dir = Path(spec.state_dir)
        own_dir = state_dir / "stores" / spec.unique_id

        def follow(position: int | None, wants: Callable[[int], bool]) -> JournalFollower:
            return JournalFollower(
                state_dir / "journal", Path(spec.runtime_dir), spec.unique_id, position, wants=wants
            )

        self._loop = StoreLoop(
            self.key,
            make_backend=lambda: self.make_backend(own_dir, Path(spec.out_dir)),
            follow=follow,
            bad_dir=own_dir / "bad",
            stop=context.stop_requested,
            cadence=self.cadence(),
            beat=self._beat,
        )

    def _beat(self) -> None:
        self.context.beats += 1
