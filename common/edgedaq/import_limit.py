"""A limit for code of users that is imported where others wait: what hangs must not hang a service."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from edgedaq.clock import mono_ns

__all__ = ["IMPORT_LIMIT_S", "import_limit"]

IMPORT_LIMIT_S = 10.0


@contextlib.contextmanager
def import_limit(limit_s: float = IMPORT_LIMIT_S) -> Iterator[None]:
    """Raise TimeoutError in what runs beneath it for longer; in the main thread alone, elsewhere no limit.

    A timer that somebody else has set is given back with what is left of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_: int, __: FrameType | None) -> NoReturn:
        message = f"its import took longer than {limit_s:g} s"
        raise TimeoutError(message)

    former = signal.signal(signal.SIGALRM, expire)
    begun_ns = mono_ns()
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        if left_s:
            left_s -= (mono_ns() - begun_ns) / 1e9
            signal.setitimer(signal.ITIMER_REAL, max(left_s, 0.001), interval_s)
