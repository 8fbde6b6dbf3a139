"""Stores as jobs: follow the journal, commit, report how far it may be trimmed.

One thread reads, judges and writes; another makes one commit at a time durable meanwhile. The next commit
starts when the last one has ended and something waits: at once when the journal has nothing more, else at
its ``Cadence``. So commits grow with the load. A store whose commits are dear (a file each) always
waits for its limits; the journal keeps what is not committed.

A backend that fails (a full disk, a missing permission, a server that is away) holds up only its own store:
nothing is acknowledged, the error is reported, and after a growing pause everything goes on from the last
commit.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edgedaq.clock import utc_ns
from edgedaq.delivery import StreamTable
from edgedaq.errors import StoreError
from edgedaq.logsetup import get_logger
from edgedaq.segment_format import Hole, Record

from edgedaq_aggregator.lag import StoreLag
from edgedaq_aggregator.stores.backend import Backend, Refusal
from edgedaq_aggregator.stores.engine import StoreEngine

__all__ = ["Cadence", "Follower", "StoreLoop"]

UNCOMMITTED_BYTES_MAX = 64 << 20
GATHER_LIMIT_S = 0.5
"""How long rows are gathered for the backend where commits are further apart."""

POSITION_ONLY_S = 1.0
"""How often a position is committed when nothing of this store came."""

PAUSE_FIRST_S = 0.25
PAUSE_MAX_S = 30.0
STOP_LIMIT_S = 2.0
READ_MS = 100
READ_MS_COMMITTING = 5
REPORT_EVERY_S = 0.5
REPORTED_STREAMS_MAX = 256
SET_ASIDE_MAX = 64
TAILS_MAX = 1024


class Cadence(NamedTuple):
    """When a store commits; ``at_once``: whenever the journal has nothing more."""

    commit_bytes: int = 16 << 20
    limit_s: float = 0.2
    at_once: bool = True


_AT_ONCE = Cadence()


class Follower(Protocol):
    """What a store needs of the journal."""

    @property
    def tail(self) -> int:
        """Readable up to here."""

    @property
    def position(self) -> int | None:
        """Read up to here; None until the journal has said where to begin."""

    def read(self, timeout_ms: int) -> list[Record | Hole]:
        """Return what comes next; empty after the timeout."""

    def table_at_start(self) -> StreamTable:
        """Return the account of all streams where reading began."""

    def report(self, position: int) -> None:
        """Tell the journal that everything before is durable in the store."""

    def close(self) -> None:
        """End it."""


class StoreLoop:
    """Runs one backend until it is told to stop.

    Args:
        key: Its name in ``store_config``.
        make_backend: Makes a backend that is not recovered yet.
        follow: Makes a follower from a position on, or where the journal says (None), for streams that are
            wanted.
        bad_dir: Where refused frames are set aside.
        cadence: When it commits.
        beat: Called as often as it goes round.
    """

    def __init__(
        self,
        key: str,
        *,
        make_backend: Callable[[], Backend],
        follow: Callable[[int | None, Callable[[int], bool]], Follower],
        bad_dir: Path,
        stop: threading.Event,
        cadence: Cadence = _AT_ONCE,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._key = key
        self._make_backend = make_backend
        self._follow = follow
        self._bad_dir = bad_dir
        self._stop = stop
        self._cadence = cadence
        self._beat = beat
        self._log = get_logger().bind(store=key)
        self._pause_s = PAUSE_FIRST_S
        self._error: str | None = None
        self._past: dict[str, int] = dict.fromkeys(_COUNTERS, 0)
        self._past_by_node: dict[str, int] = {}
        self._tails: list[tuple[int, float]] = []
        self._lag = StoreLag()
        self._report: dict[str, Any] = {}
        self._report_due_s = 0.0
        self._last_commit_s = 0.0
        self._released: int | None = None
        self.in_count = self.in_bytes = self.last_in_ns = 0

    def report(self) -> dict[str, Any]:
        """Return the facts for status; for any thread."""
        told, error = self._report, self._error
        if error is None:
            return {**told, "state": "following", "error": None}
        since_s = round(time.monotonic() - self._report_due_s + REPORT_EVERY_S, 3)
        lag_s = told.get("lag_s", 0.0) + max(since_s, 0.0)  # nothing is stored meanwhile
        return {**told, "state": "retrying", "error": error, "lag_s": lag_s}

    def run(self) -> None:
        """Return when told to stop, everything that was readable then committed."""
        while True:
            try:
                self._run_once()
            except (StoreError, OSError) as e:
                self._fail(e)
            if self._stop.is_set():
                return

    def _fail(self, e: Exception) -> None:
        reason = str(e)
        if reason != self._error:
            self._log.error("store.failed", reason=reason, retry_s=round(self._pause_s, 2))
        self._error = reason
        self._stop.wait(self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def _run_once(self) -> None:
        with ExitStack() as stack:
            backend = self._make_backend()
            stack.callback(backend.close)
            engine = StoreEngine(self._key, backend, self._set_aside)
            stack.callback(self._fold, engine)
            follower = self._follow(engine.position, engine.wants)
            self._released = None
            stack.callback(follower.close)
            pool = ThreadPoolExecutor(1, thread_name_prefix=f"commit-{self._key}")
            stack.callback(pool.shutdown)
            self._serve(engine, follower, pool)

    def _serve(self, engine: StoreEngine, follower: Follower, pool: ThreadPoolExecutor) -> None:
        """Read and commit until told to stop; raises what the backend raises."""
        under_way: Future[None] | None = None
        has_begun = False
        begun_s = stop_s = written_s = time.monotonic()
        while True:
            entries = follower.read(READ_MS if under_way is None else READ_MS_COMMITTING)
            if not has_begun and follower.position is not None:
                engine.begin(entries[0][0] if entries else follower.position, follower.table_at_start())
                has_begun = True
            self._beat()
            had_changes = engine.has_changes
            engine.take(entries)
            if has_begun and follower.position is not None:
                engine.reach(follower.position)
            now = time.monotonic()
            if not had_changes:
                begun_s = now
            if now - written_s >= GATHER_LIMIT_S:
                engine.write_gathered()
                written_s = now
            if under_way is not None and (
                under_way.done()
                or engine.uncommitted_bytes >= max(UNCOMMITTED_BYTES_MAX, 2 * self._cadence.commit_bytes)
            ):
                under_way.result()
                under_way = None
                self._after_commit(engine, follower)
            if entries:
                engine.last_in_ns = utc_ns()
            is_caught_up = follower.position is None or follower.position >= follower.tail
            if under_way is None and self._is_due(engine, now - begun_s, is_caught_up=is_caught_up):
                under_way = pool.submit(engine.commit())
            self._refresh(engine, follower, now)
            if not self._stop.is_set():
                stop_s = now + STOP_LIMIT_S
            elif is_caught_up or now >= stop_s:
                break
        if under_way is not None:
            under_way.result()
            self._after_commit(engine, follower)
        if has_begun:
            pool.submit(engine.commit(is_clean=True)).result()
            self._after_commit(engine, follower)
        self._refresh(engine, follower, self._report_due_s)

    def _is_due(self, engine: StoreEngine, waited_s: float, *, is_caught_up: bool) -> bool:
        commit_bytes, limit_s, at_once = self._cadence
        if engine.has_changes:
            return (
                (at_once and is_caught_up) or engine.uncommitted_bytes >= commit_bytes or waited_s >= limit_s
            )
        moved = (engine.position or 0) - (engine.committed_position or 0)
        return moved >= commit_bytes or (
            moved > 0 and time.monotonic() - self._last_commit_s >= POSITION_ONLY_S
        )

    def _after_commit(self, engine: StoreEngine, follower: Follower) -> None:
        engine.committed_now()
        self._last_commit_s = time.monotonic()
        self._pause_s, self._error = PAUSE_FIRST_S, None
        self._release(engine, follower)

    def _release(self, engine: StoreEngine, follower: Follower) -> None:
        """Let the journal trim what is durable."""
        position = engine.durable_position()
        if position is not None and position != self._released:
            self._released = position
            follower.report(position)

    def _refresh(self, engine: StoreEngine, follower: Follower, now: float) -> None:
        """Make the report anew, when it is due."""
        if now < self._report_due_s:
            return
        self._report_due_s = now + REPORT_EVERY_S
        self._release(engine, follower)
        counts = {name: self._past[name] + getattr(engine, name) for name in _COUNTERS}
        by_node = dict(self._past_by_node)
        _add(by_node, engine.stored_by_node)
        newest = list(engine.committed.values())[-REPORTED_STREAMS_MAX:]
        position = engine.committed_position or follower.position or 0
        lag_bytes = max(follower.tail - position, 0)
        lag_s = round(self._lag_s(position, follower.tail, now), 3)
        told = self._lag.note(now, lag_bytes, lag_s)
        if told is not None:
            (self._log.warning if told.is_warning else self._log.info)(told.event, **told.facts)
        self.in_count, self.in_bytes = counts["in_count"], counts["in_bytes"]
        self.last_in_ns = engine.last_in_ns or self.last_in_ns
        self._report = {
            **counts,
            **engine.facts(),
            "stored": {node: {"stored_rows": rows} for node, rows in by_node.items()},
            "lag_bytes": lag_bytes,
            "lag_s": lag_s,
            "through_in_s": self._lag.through_in_s,
            "last_commit_s": round(max(now - self._last_commit_s, 0.0), 3) if self._last_commit_s else None,
            "streams": {
                f"{state.stream:016x}": [state.next_seq, state.rows, state.gap_rows, state.closed]
                for state in newest
            },
        }

    def _lag_s(self, position: int, tail: int, now: float) -> float:
        """Return since when the oldest of what is not committed has been readable, as this process saw it."""
        if not self._tails or self._tails[-1][0] < tail:
            self._tails.append((tail, now))
        while self._tails and self._tails[0][0] <= position:
            del self._tails[0]
        if len(self._tails) > TAILS_MAX:
            del self._tails[1::2]
        return now - self._tails[0][1] if self._tails else 0.0

    def _fold(self, engine: StoreEngine) -> None:
        for name in _COUNTERS:
            self._past[name] += getattr(engine, name)
        self._past["in_count"] += engine.committed_in[0] - engine.in_count
        self._past["in_bytes"] += engine.committed_in[1] - engine.in_bytes
        _add(self._past_by_node, engine.stored_by_node)

    def _set_aside(self, refusal: Refusal) -> None:
        """Keep a refused frame for a human, as long as there are not many."""
        frame = refusal.frame
        self._log.error("frame.refused", stream=f"{frame.stream:016x}", seq=frame.seq, reason=refusal.reason)
        self._bad_dir.mkdir(parents=True, exist_ok=True)
        if sum(1 for _ in self._bad_dir.iterdir()) < SET_ASIDE_MAX:
            (self._bad_dir / f"{frame.stream:016x}-{frame.seq}.bad").write_bytes(frame.raw)


_COUNTERS = (
    "in_count",
    "in_bytes",
    "stored_rows",
    "stored_bytes",
    "commit_count",
    "duplicate_count",
    "refused_count",
)


def _add(sums: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        sums[key] = sums.get(key, 0) + count
