"""Where puts wait for room, and how the service thread is woken; shared by an outlet and its writers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from edgedaq.clock import mono_ns
from edgedaq.errors import JobError

__all__ = ["Gate", "PutTimeout"]

T = TypeVar("T")

_WAIT_S = 0.05


class PutTimeout(JobError):  # noqa: N818  # named for what happened, as TimeoutError is
    """The ring stayed full for as long as the put was to wait.

    ``accepted`` rows or messages of this put were taken, as if only they had been put; nothing of the rest.
    """

    accepted: int = 0


def _go_on() -> None:
    """What interrupts a put where nothing else does."""


class Gate:
    """One lock, one condition (room was made), one pipe (something was put).

    ``interrupt`` is called where a put may be left before it has taken anything; it raises to leave it.
    Once ``shut``, nothing can be put any more.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition(threading.Lock())
        self.interrupt: Callable[[], None] = _go_on
        self.is_hot = False
        self.is_asleep = False
        self.wake_fd, self._write_fd = os.pipe()
        for fd in (self.wake_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._blocked_ns = 0
        self._blocked_since: dict[int, int] = {}

    @property
    def is_blocked(self) -> bool:
        """A put waits for room now."""
        return bool(self._blocked_since)

    @property
    def blocked_s(self) -> float:
        """Seconds that puts have waited for room, those that wait now included."""
        now = mono_ns()
        return (self._blocked_ns + sum(now - since for since in list(self._blocked_since.values()))) / 1e9

    @property
    def blocked_for_s(self) -> float:
        """Seconds for which a put waits for room by now; 0 if none does."""
        since = min(list(self._blocked_since.values()), default=0)
        return (mono_ns() - since) / 1e9 if since else 0.0

    def announce(self) -> None:
        """Tell the service thread that an open frame has its first row, if it waits for that."""
        if self.is_hot:
            self.is_hot = False
            self.wake()

    def wake(self) -> None:
        """Wake the service thread if it sleeps."""
        if self.is_asleep:
            self.is_asleep = False
            with contextlib.suppress(BlockingIOError):
                os.write(self._write_fd, b"\0")

    def woken(self) -> None:
        """Take note, in the service thread, that it is awake."""
        self.is_asleep = False
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 64)

    def wait_until(self, attempt: Callable[[], T | None], deadline: float | None) -> T:
        """Return what ``attempt`` returns once that is not None; it is called with the lock held.

        Args:
            deadline: On the monotonic clock, seconds; None waits for ever.

        Raises:
            PutTimeout: The deadline has passed.
        """
        with self.condition:
            result = attempt()
            if result is not None:
                return result
            me = threading.get_ident()
            self._blocked_since[me] = mono_ns()
            try:
                while True:
                    left_s = _WAIT_S if deadline is None else min(deadline - time.monotonic(), _WAIT_S)
                    if left_s <= 0:
                        message = "the ring is full: its consumers did not take anything in time"
                        raise PutTimeout(message)
                    self.wake()
                    self.condition.wait(left_s)
                    self.interrupt()
                    result = attempt()
                    if result is not None:
                        return result
            finally:
                self._blocked_ns += mono_ns() - self._blocked_since.pop(me)

    def shut(self, reason: str) -> None:
        """Refuse what is put from now on, and what waits for room."""

        def refuse() -> None:
            raise JobError(reason)

        self.interrupt = refuse

    def close(self) -> None:
        """Close the pipe."""
        os.close(self.wake_fd)
        os.close(self._write_fd)
