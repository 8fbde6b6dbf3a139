"""A journal that is served as the intake serves it, for tests of those who follow it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
from edgedaq_aggregator.journal import Journal


@contextmanager
def serving(journal: Journal) -> Iterator[None]:
    """Serve in a thread, as the intake does in its loop; the test appends only before or after."""
    stop = threading.Event()

    def serve() -> None:
        poller = zmq.Poller()
        for one in journal.pollables():
            poller.register(one, zmq.POLLIN)
        while not stop.is_set():
            poller.poll(5)
            journal.service(time.monotonic_ns())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
