"""The default ``DAQJob.start``: hands a job what comes of its topics, until it is to end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import zmq

from edgedaq.config import InputOptions
from edgedaq.feeds import Feed, LiveTopics, hand_over, journal_feed
from edgedaq.ring_feed import Rings

if TYPE_CHECKING:
    from edgedaq.job import DAQJob

__all__ = ["consume"]

_SCAN_MS = 100


def consume(job: DAQJob, topics: tuple[str, ...], options: InputOptions) -> None:
    """Let a job handle what ``topics`` and its ``live_topics`` cover; used by its main thread."""
    with zmq.Context() as context, ExitStack() as stack:
        feeds = _feeds(job, topics, options, context)
        for feed in feeds:
            stack.callback(feed.close)
        has_more = False
        while not job.is_stopping:
            poller = zmq.Poller()
            poller.register(job.stop_fd, zmq.POLLIN)
            for feed in feeds:
                for socket in feed.pollables():
                    poller.register(socket, zmq.POLLIN)
            poller.poll(0 if has_more else _SCAN_MS)
            job.beat()
            has_more = False
            for feed in feeds:
                for portion in feed.receive():
                    if job.is_stopping:
                        break
                    has_more = True
                    hand_over(portion, feed.reader, job)
    job.context.interrupt()


def _feeds(
    job: DAQJob, topics: tuple[str, ...], options: InputOptions, context: zmq.Context[Any]
) -> list[Feed]:
    spec = job.context.spec
    feeds: list[Feed] = []
    if topics:
        feeds.append(
            Rings(job.rings_dir, job.daq_job_unique_id, topics, options, context, views=job.takes_views)
        )
    if topics and spec.journal_feed:
        feeds.append(journal_feed(spec, topics, context))
    if job.live_topics:
        feeds.append(LiveTopics(job.runtime_dir, job.live_topics, job.life, context))
    return feeds
