"""The rings of this host as a job's feed: frames, and before them what is missing.

A run of frames is given back to its producer when all of its messages were handled and nobody keeps a view of
it (``kept_views``). What does not come, because this job was too slow (``[input] policy``) or away too long,
is told as a GAP frame before the frame that follows, or at the end of the producer's life.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from edgedaq.config import InputOptions
from edgedaq.errors import WireError
from edgedaq.feeds import Portion
from edgedaq.frame import Frame, Kind, decode, encode, pack_map
from edgedaq.inlet import Inlet, RingView, Run
from edgedaq.kept_views import KeptViews
from edgedaq.messages import MessageReader
from edgedaq.missing import Gap, GapFinder
from edgedaq.open_info import OpenInfo

__all__ = ["Rings"]


@dataclass(slots=True)
class _Life:
    ring: RingView
    gaps: GapFinder


class Rings:
    """The rings of this host, again what an earlier life was not through with.

    Args:
        views: Give large data as views, without a copy.
    """

    def __init__(
        self,
        rings_dir: Path,
        consumer: str,
        topics: tuple[str, ...],
        options: InputOptions,
        context: zmq.Context[Any],
        *,
        views: bool = False,
    ) -> None:
        self.reader = MessageReader(views=views)
        self._kept = KeptViews()
        self._lives: dict[str, _Life] = {}
        self._inlet = Inlet(
            rings_dir, consumer, topics, policy=options.policy, limit_bytes=options.limit, context=context
        )

    def pollables(self) -> list[Any]:
        """Return the sockets of the rings."""
        return self._inlet.pollables()

    def receive(self) -> list[Portion]:
        """Return the runs that have arrived, and what is missing at the end of lives."""
        self._kept.settle()
        held = dict(self._inlet.rings)
        self._inlet.scan()
        ended = [self._end(held[life]) for life in held.keys() - self._inlet.rings.keys()]
        runs = [
            Portion(self._frames(run), self._done(run), is_in_place=True) for run in self._inlet.receive()
        ]
        return [*ended, *runs]

    def close(self) -> None:
        """Let the rings go; the claims stay."""
        self._inlet.close()

    def _life(self, ring: RingView) -> _Life:
        life = self._lives.get(ring.life)
        if life is None:
            life = self._lives[ring.life] = _Life(ring, GapFinder(ring.account))
        return life

    def _end(self, ring: RingView) -> Portion:
        gaps = self._life(ring).gaps.finish(ring.ends)
        del self._lives[ring.life]
        return Portion(iter([_gap_frame(ring, gap) for gap in gaps]), _nothing)

    def _done(self, run: Run) -> Any:
        return lambda: self._kept.done(run)

    def _frames(self, run: Run) -> Iterator[tuple[OpenInfo, Frame]]:
        life = self._life(run.ring)
        for frame in self._kept.frames(run):
            is_news, gaps = life.gaps.take(frame)
            for gap in gaps:
                yield _gap_frame(run.ring, gap)
            if is_news and frame.kind is not Kind.GAP:
                yield _info(run.ring, frame.stream), frame


def _gap_frame(ring: RingView, gap: Gap) -> tuple[OpenInfo, Frame]:
    body = pack_map({"last": gap.last, "rows": gap.rows, "reason": gap.reason})
    return _info(ring, gap.stream), decode(memoryview(encode(Kind.GAP, gap.stream, gap.first, body)))


def _info(ring: RingView, stream: int) -> OpenInfo:
    info = ring.open_info(stream)
    if info is None:
        text = f"a frame of stream {stream:016x}, which was never opened"
        raise WireError(text)
    return info


def _nothing() -> None:
    """Be done: what is missing nobody keeps."""
