"""The consumer's side of a host's rings: whole frames of the topics asked for, in order, without copies.

::

    with Inlet(rings_dir, "uplink", ["store"], retire=True) as inlet:
        inlet.scan()                        # every 100 ms or so: new rings, dead producers
        for run in inlet.receive():         # never blocks; poll ``inlet.pollables()`` to wait
            send(bytes(run.frames))
            run.ring.release(run.end)       # later is fine; cumulative; until then the producer keeps it

Per ring, runs come in order of position, and each frame once in the life of an inlet. A later inlet of the
same name gets again what the earlier one had not released: whoever takes data exactly once tells by
(stream, seq). Of a producer that has died, what it had not told of and what is salvaged comes as ordinary
runs whose ``end`` goes on counting.

A ring that its own process produces is never seen. All of an inlet is used by one thread.

An inlet with ``retire`` removes rings of the dead that nobody needs any more; one without holds the rings
that it is not through with, and those of jobs that are born later, by ``claim_files``. One with another
policy than ``wait`` holds nothing and is sent copies (``followers``); what it misses, ``missing`` finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from edgedaq.claim_files import (
    ClaimFile,
    Wants,
    is_claimed,
    sweep_rings,
    unlink_ring,
    withdraw_claim,
    write_wants,
)
from edgedaq.errors import WireError
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.ring import is_own
from edgedaq.ring_control import InputPolicy
from edgedaq.ring_view import RingView, Run

__all__ = ["Inlet", "RingView", "Run", "sweep_rings", "withdraw_claim"]

_BAD_MAX = 2
_DAMAGE_TOLD = 4


class Inlet:
    """All rings of a directory, as one consumer. A context manager.

    Args:
        consumer: Name of the claim; one inlet of a name at a time.
        topics: Subscriptions; ``""`` is everything.
        policy: What happens when it is too slow: producers ``wait``, or it misses something.
        limit_bytes: How far it may be behind, per ring, where it may miss something.
        retire: Remove rings of the dead that all consumers are through with: for one consumer per
            directory, the one that carries data away.
        context: For the sockets; one of its own by default.
    """

    def __init__(
        self,
        rings_dir: Path,
        consumer: str,
        topics: Sequence[str],
        *,
        policy: InputPolicy = "wait",
        limit_bytes: int = 0,
        retire: bool = False,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._dir = rings_dir
        self._consumer = check_name("consumer", consumer)
        self._wants = Wants(list(topics), policy, limit_bytes)
        self._retire = retire
        self._has_claims = policy == "wait" and not retire
        self._owns_context = context is None
        self._context: zmq.Context[Any] = zmq.Context() if context is None else context
        self._rings: dict[str, RingView] = {}
        self._claims: dict[str, ClaimFile] = {}
        self._done: set[str] = set()
        self._log = get_logger(consumer=consumer)
        if not self._has_claims and not retire:
            withdraw_claim(rings_dir, consumer)
        if not retire:
            write_wants(rings_dir, consumer, self._wants)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def rings(self) -> dict[str, RingView]:
        """The rings that are not through yet, by life."""
        return self._rings

    @property
    def all_dead_and_drained(self) -> bool:
        """No producer lives, and all that the dead left was received and released (as of the last scan)."""
        return all(ring.is_drained for ring in self._rings.values())

    def pollables(self) -> list[Any]:
        """Return the sockets to poll for reading; they change with each scan."""
        return [ring.socket for ring in self._rings.values() if ring.socket is not None]

    def scan(self) -> None:
        """Look for new rings and dead producers, and put away what is through."""
        present = {path.stem: path for path in self._dir.glob("*.ring")}
        self._done &= present.keys()
        for life, path in present.items():
            if life not in self._rings and life not in self._done and not is_own(life):
                self._open(life, path)
        for ring in list(self._rings.values()):
            if ring.socket is not None:
                self._find_death(ring)
            if ring.is_drained:
                self._put_away(ring)

    def receive(self) -> list[Run]:
        """Return the runs that have arrived, per ring in order. Never blocks."""
        runs: list[Run] = []
        for ring in list(self._rings.values()):
            try:
                runs += ring.take()
            except WireError as e:
                self._reject(ring, e)
        return runs

    def close(self) -> None:
        """Let all rings go; the claims stay, so that the next inlet of this name goes on from there."""
        for ring in self._rings.values():
            self._note(ring)
            ring.close()
        self._rings.clear()
        for claim in self._claims.values():
            claim.close()
        self._claims.clear()
        if self._owns_context:
            self._context.destroy(linger=0)

    def _open(self, life: str, path: Path) -> None:
        resume_at = 0
        try:
            if self._has_claims:
                claim = self._claims[life] = ClaimFile(self._dir, life, self._consumer)
                resume_at = claim.released
                if claim.is_through:
                    self._claims.pop(life).close()
                    self._done.add(life)
                    return
            ring = RingView(path, self._consumer, self._wants, self._context)
        except FileNotFoundError:
            if life in self._claims:
                self._claims.pop(life).close(unlink=True)
            return
        except WireError as e:
            self._log.error("ring.rejected", path=str(path), reason=str(e))
            self._done.add(life)
            return
        self._rings[life] = ring
        if ring.is_dead:
            self._find_death(ring, resume_at)

    def _find_death(self, ring: RingView, resume_at: int = 0) -> None:
        try:
            if ring.find_death(resume_at):
                self._log.info("ring.salvaged", job=ring.job, life=ring.life)
                if ring.damage:
                    reason = "; ".join(ring.damage[:_DAMAGE_TOLD])
                    self._log.error("ring.damaged", job=ring.job, life=ring.life, reason=reason)
        except WireError as e:
            self._reject(ring, e)

    def _reject(self, ring: RingView, error: WireError) -> None:
        """Set a damaged ring aside; nothing more comes from it."""
        self._log.error("ring.rejected", job=ring.job, life=ring.life, reason=str(error))
        if self._retire and ring.is_dead:
            self._keep(ring)
        self._forget(ring)

    def _keep(self, ring: RingView) -> None:
        """Keep a damaged ring for a person to look at, and not too many of them: they take memory."""
        with contextlib.suppress(OSError):
            ring.path.rename(ring.path.with_suffix(".bad"))
            bad = sorted(self._dir.glob("*.bad"), key=lambda path: path.stat().st_mtime_ns)
            for path in bad[:-_BAD_MAX]:
                path.unlink()

    def _put_away(self, ring: RingView) -> None:
        if not self._retire:
            self._note(ring, through=True)
            self._forget(ring)
        elif not is_claimed(self._dir, ring.life, apart_from=self._consumer):
            if ring.damage:
                self._keep(ring)
            unlink_ring(self._dir, ring.life)
            self._forget(ring)

    def _forget(self, ring: RingView) -> None:
        self._rings.pop(ring.life, None)
        self._done.add(ring.life)
        ring.close()
        claim = self._claims.pop(ring.life, None)
        if claim is not None:
            claim.close()

    def _note(self, ring: RingView, *, through: bool = False) -> None:
        claim = self._claims.get(ring.life)
        if claim is not None:
            claim.note(ring.released, through=through)
