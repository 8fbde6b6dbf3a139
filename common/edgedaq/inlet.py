"""The consumer's side of the rings of one host: whole frames of the topics asked for, in order, without copies.

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

Files beside the rings: ``<life>.<consumer>.claim`` (u64 position released, u64 1 when the consumer is through
with the ring). While it says 0, the ring is kept; consumers named in the ring's header need none. An
inlet with ``retire`` removes rings of the dead that nobody needs any more; where there is none,
``sweep_rings`` does it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from edgedaq.errors import WireError
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.ring import is_alive, is_own, map_ring
from edgedaq.ring_view import RingView, Run

__all__ = ["Inlet", "RingView", "Run", "claim_path", "sweep_rings", "withdraw_claim"]

_CLAIM = struct.Struct("<QQ")


class Inlet:
    """All rings of a directory, as one consumer. A context manager.

    Args:
        consumer: Name of the claim; one inlet of a name at a time.
        topics: Subscriptions; ``""`` is everything.
        retire: Remove rings of the dead that all consumers are through with: for one consumer per
            directory, the one that carries data away.
        context: For the sockets; the process's own by default.
    """

    def __init__(
        self,
        rings_dir: Path,
        consumer: str,
        topics: Sequence[str],
        *,
        retire: bool = False,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._dir = rings_dir
        self._consumer = check_name("consumer", consumer)
        self._topics = tuple(topics)
        self._retire = retire
        self._context = context if context is not None else zmq.Context.instance()
        self._rings: dict[str, RingView] = {}
        self._claims: dict[str, int] = {}
        self._done: set[str] = set()
        self._log = get_logger(consumer=consumer)

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
        for fd in self._claims.values():
            os.close(fd)
        self._claims.clear()

    def _open(self, life: str, path: Path) -> None:
        resume_at = 0
        try:
            if not self._retire:
                resume_at, is_through = self._claim(life)
                if is_through:
                    self._done.add(life)
                    return
            ring = RingView(path, self._consumer, self._topics, self._context)
        except FileNotFoundError:
            self._drop_claim(life)
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
        except WireError as e:
            self._reject(ring, e)

    def _reject(self, ring: RingView, error: WireError) -> None:
        """Set a damaged ring aside; nothing more comes from it."""
        self._log.error("ring.rejected", job=ring.job, life=ring.life, reason=str(error))
        if self._retire and ring.is_dead:
            with contextlib.suppress(OSError):
                ring.path.rename(ring.path.with_suffix(".bad"))
        self._forget(ring)

    def _put_away(self, ring: RingView) -> None:
        if not self._retire:
            self._note(ring, through=True)
            self._forget(ring)
        elif not _is_claimed(self._dir, ring.life):
            _unlink(self._dir, ring.life)
            self._forget(ring)

    def _forget(self, ring: RingView) -> None:
        self._rings.pop(ring.life, None)
        self._done.add(ring.life)
        ring.close()
        fd = self._claims.pop(ring.life, None)
        if fd is not None:
            os.close(fd)

    def _claim(self, life: str) -> tuple[int, bool]:
        """Hold the ring by a file; return what an earlier inlet of this name wrote there."""
        fd = os.open(claim_path(self._dir, life, self._consumer), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._claims[life] = fd
        held = os.pread(fd, _CLAIM.size, 0)
        if len(held) < _CLAIM.size:
            os.pwrite(fd, _CLAIM.pack(0, 0), 0)
            return 0, False
        position, through = _CLAIM.unpack(held)
        if through:
            os.close(self._claims.pop(life))
        return position, bool(through)

    def _drop_claim(self, life: str) -> None:
        fd = self._claims.pop(life, None)
        if fd is not None:
            os.close(fd)
            claim_path(self._dir, life, self._consumer).unlink(missing_ok=True)

    def _note(self, ring: RingView, *, through: bool = False) -> None:
        fd = self._claims.get(ring.life)
        if fd is not None:
            os.pwrite(fd, _CLAIM.pack(ring.released, through), 0)


def claim_path(rings_dir: Path, life: str, consumer: str) -> Path:
    """Return the file by which a consumer holds a ring."""
    return rings_dir / f"{life}.{consumer}.claim"


def withdraw_claim(rings_dir: Path, consumer: str) -> None:
    """End all claims of a consumer that has failed or was removed; producers notice within a second."""
    for path in rings_dir.glob(f"*.{consumer}.claim"):
        path.unlink(missing_ok=True)


def sweep_rings(rings_dir: Path) -> None:
    """Remove rings of the dead that no consumer has a claim on, by header or by file."""
    for path in rings_dir.glob("*.ring"):
        life = path.stem
        if is_own(life):
            continue
        try:
            fd, mapped, layout = map_ring(path)
        except (OSError, WireError):
            continue
        mapped.close()
        is_needed = is_alive(fd) or bool(layout.identity.claims) or _is_claimed(rings_dir, life)
        os.close(fd)
        if not is_needed:
            _unlink(rings_dir, life)
    for path in rings_dir.glob(".*.new"):
        _sweep_unfinished(path)


def _sweep_unfinished(path: Path) -> None:
    """Remove a ring whose producer died while it made it: a file that has bytes was locked before."""
    if is_own(path.name[1:-4]):
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        is_abandoned = os.fstat(fd).st_size > 0 and not is_alive(fd)
        os.close(fd)
        if is_abandoned:
            path.unlink()


def _is_claimed(rings_dir: Path, life: str) -> bool:
    for path in rings_dir.glob(f"{life}.*.claim"):
        try:
            held = path.read_bytes()
        except FileNotFoundError:
            continue
        if len(held) < _CLAIM.size or not _CLAIM.unpack_from(held)[1]:
            return True
    return False


def _unlink(rings_dir: Path, life: str) -> None:
    for path in (*rings_dir.glob(f"{life}.*.claim"), rings_dir / f"{life}.sock", rings_dir / f"{life}.ring"):
        path.unlink(missing_ok=True)
