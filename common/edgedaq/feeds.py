"""What hands frames to a job that consumes: one interface over rings, the live plane, and the journal.

A job polls all of its feeds and takes their portions one by one. When it is through with a portion it says
``done``: whoever keeps that data for the job may then forget it. A feed of the journal comes from the
aggregator's package (``journal_feed``); it is named in the worker's specification, because an agent has none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import zmq

from edgedaq.delivery import gap_of
from edgedaq.errors import WireError
from edgedaq.frame import FLAG_CONTINUES, FLAG_PIECE, Frame, Kind, unpack_map
from edgedaq.kept_views import LARGE_BYTES
from edgedaq.live_feed import LiveFeed, Shown
from edgedaq.messages import DAQJobMessageGap, MessageReader, Source
from edgedaq.open_info import OpenInfo

if TYPE_CHECKING:
    from edgedaq.job import DAQJob
    from edgedaq.job_context import WorkerSpec

__all__ = ["Feed", "LiveTopics", "Portion", "hand_over", "journal_feed"]


class Portion(NamedTuple):
    """Some frames, each with what the OPEN of its stream tells; ``done`` when they were handled.

    ``is_in_place``: the memory of large frames stays as it is while anyone refers to it.
    """

    frames: Iterator[tuple[OpenInfo, Frame]]
    done: Callable[[], None]
    is_in_place: bool = False


class Feed(Protocol):
    """One source of frames. Used by one thread."""

    reader: MessageReader

    def pollables(self) -> list[Any]:
        """Return what to poll for reading; may change with each call of ``receive``."""

    def receive(self) -> list[Portion]:
        """Return what there is, in order; called when a pollable is ready, and every 100 ms. Never blocks."""

    def close(self) -> None:
        """End it; what was not ``done`` comes again to the next feed of the same name."""


class LiveTopics:
    """The live plane: as far as the job keeps up."""

    def __init__(
        self, runtime_dir: Path, topics: Sequence[str], own_life: str, context: zmq.Context[Any]
    ) -> None:
        self.reader = MessageReader(is_live=True)
        self._feed = LiveFeed(runtime_dir, topics, apart_from_life=own_life, context=context)

    def pollables(self) -> list[Any]:
        """Return the socket."""
        return self._feed.pollables()

    def receive(self) -> list[Portion]:
        """Return what has arrived."""
        return [Portion(self._frames(shown), _forget) for shown in self._feed.receive()]

    def close(self) -> None:
        """Stop listening."""
        self._feed.close()

    def _frames(self, shown: Shown) -> Iterator[tuple[OpenInfo, Frame]]:
        if not shown.is_continuous:
            self.reader.forget(shown.frames[0].stream)
        for frame in shown.frames:
            yield shown.info, frame


def hand_over(portion: Portion, reader: MessageReader, job: DAQJob) -> None:
    """Let a job handle a portion, message by message, then be done with it."""
    for info, frame in portion.frames:
        in_place = portion.is_in_place and len(frame.raw) >= LARGE_BYTES
        try:
            gap = _gap(info, frame)
            messages = list(reader.read(info, frame, in_place=in_place))
        except WireError as e:  # it would be so again: it must not hold up what follows
            messages, gap = [], (frame.seq, frame.rows, f"refused: {e}")
        is_last_piece = frame.flags & FLAG_PIECE and not frame.flags & FLAG_CONTINUES
        is_incomplete = gap is None and is_last_piece and not messages
        if is_incomplete:
            gap = (frame.seq, frame.rows, "a piece of it is missing")
        if gap is not None:
            reader.forget(frame.stream)
            last, rows, reason = gap
            job.context.missed(rows)
            source = Source(info.node, info.job, frame.stream, frame.seq, frame.t_first_ns)
            job.handle_gap(
                DAQJobMessageGap(
                    tag=info.tag, topics=info.topics, source=source, last=last, rows=rows, reason=reason
                )
            )
        for message in messages:
            job.handle_message(message)
            job.write_down_missed()
        job.context.took(0 if is_incomplete else frame.rows, len(frame.body))
    portion.done()


def journal_feed(spec: WorkerSpec, topics: Sequence[str], context: zmq.Context[Any]) -> Feed:
    """Return the feed that the specification names, of a package that is not imported here."""
    module, _, name = spec.journal_feed.partition(":")
    feed: Feed = getattr(importlib.import_module(module), name)(spec, topics, context)
    return feed


def _gap(info: OpenInfo, frame: Frame) -> tuple[int, int | None, str] | None:
    """Return what a frame says to be missing: up to which seq, how much, why."""
    if frame.kind is Kind.GAP:
        return gap_of(frame)
    if frame.kind is Kind.CLOSE:
        body = unpack_map(frame.body)
        if body.get("tail_unknown"):
            reason = f"the end of {info.job} is not known, at most {body.get('bound_s')} s of it"
            return frame.seq, None, reason
    return None


def _forget() -> None:
    """What is live nobody keeps."""
