"""Frames of a ring that a consumer looks at in place, for as long as it likes: the memory waits for it.

A large frame gets an object of its own (the *base*) over its bytes in the ring; every view, numpy array or
Arrow batch that is made of it keeps that alive. A run is released when it was handled and all of its bases
are gone, so that what someone keeps is back-pressure, named after a while, and never memory that changes.
Small frames are given as they lie: who makes messages of them copies them.

Without numpy, whose arrays are these bases, large frames are copied. Used by one thread, except that a view
may end in any.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from edgedaq.clock import mono_ns
from edgedaq.frame import Frame, decode, length_at
from edgedaq.inlet import RingView, Run
from edgedaq.logsetup import get_logger

__all__ = ["LARGE_BYTES", "KeptViews"]

LARGE_BYTES = 64 << 10
"""Frames from this size on are not copied."""

_TOLD_AFTER_NS = 5_000_000_000


@dataclass(slots=True, eq=False)
class _Region:
    end: int
    refs: list[weakref.ref[Any]] = field(default_factory=list)
    held: int = 0
    done_ns: int = 0
    is_told: bool = False


class KeptViews:
    """What a consumer has of all its rings."""

    def __init__(self) -> None:
        self._regions: dict[RingView, deque[_Region]] = {}
        self._gone: deque[_Region] = deque()
        self._log = get_logger()

    @property
    def is_any_kept(self) -> bool:
        """Some memory waits for views that someone keeps."""
        return any(self._regions.values())

    def frames(self, run: Run) -> Iterator[Frame]:
        """Yield the frames of a run, checked; call ``done`` when they were handled.

        Raises:
            WireError: At the first that is not valid.
        """
        region = _Region(run.end)
        self._regions.setdefault(run.ring, deque()).append(region)
        at = 0
        while at < len(run.frames):
            length = length_at(run.frames, at)
            if run.in_ring and length >= LARGE_BYTES:
                yield decode(self._base(run.frames[at : at + length], region))
            else:
                yield decode(run.frames, at)
            at += length

    def done(self, run: Run) -> None:
        """Note that a run was handled."""
        for region in self._regions.get(run.ring, ()):
            if region.end <= run.end:
                region.done_ns = region.done_ns or mono_ns()

    def settle(self) -> None:
        """Release what nobody can see any more, and say what somebody keeps."""
        while self._gone:
            self._gone.popleft().held -= 1
        for ring, regions in list(self._regions.items()):
            end = 0
            while regions and regions[0].done_ns and not regions[0].held:
                end = regions.popleft().end
            if end:
                ring.release(end)
            if not regions:
                del self._regions[ring]
            elif regions[0].done_ns:
                self._tell(ring, regions[0])

    def _tell(self, ring: RingView, region: _Region) -> None:
        kept_ns = mono_ns() - region.done_ns
        if kept_ns > _TOLD_AFTER_NS and not region.is_told:
            region.is_told = True
            self._log.warning(
                "view.kept", source=ring.job, kept_s=kept_ns / 1e9, held_bytes=ring.unreleased_bytes
            )

    def _base(self, frame: memoryview, region: _Region) -> memoryview:
        frombuffer = _frombuffer()
        if frombuffer is None:
            return memoryview(bytes(frame))
        base = frombuffer(frame, "u1")
        region.held += 1
        region.refs.append(weakref.ref(base, lambda _: self._gone.append(region)))
        return memoryview(base)


@functools.cache
def _frombuffer() -> Callable[..., Any] | None:
    try:
        import numpy as np  # noqa: PLC0415  # only who is given large frames, and has it
    except ImportError:
        return None
    return np.frombuffer
