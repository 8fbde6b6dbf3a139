"""Signals as something to poll."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence

__all__ = ["arrived", "signal_wakeup"]


@contextlib.contextmanager
def signal_wakeup(numbers: Sequence[signal.Signals]) -> Iterator[socket.socket]:
    """Turn these signals, and the end of a child, into bytes on the socket that is yielded.

    A loop that polls it misses none. Only in the main thread; the former handlers come back at the end.
    SIGHUP is left alone where it is ignored already (nohup).
    """
    reading, writing = socket.socketpair()
    reading.setblocking(False)  # noqa: FBT003
    writing.setblocking(False)  # noqa: FBT003
    former_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    wanted = [
        number
        for number in (*numbers, signal.SIGCHLD)
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)  # nohup
    ]
    former = {number: signal.signal(number, lambda *_: None) for number in wanted}
    try:
        yield reading
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        reading.close()
        writing.close()


def arrived(wakeup: socket.socket) -> bytes:
    """Return the numbers of the signals that have arrived since the last time."""
    try:
        return wakeup.recv(4096)
    except BlockingIOError:
        return b""
