"""Text for whoever looks, which is stale in a second: it never holds up who writes it.

A terminal that was stopped or a pipe that nobody reads would block a write for as long as it likes. Here a
thread of its own waits; what is written meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import TextIO

__all__ = ["PatientStream"]


class PatientStream:
    """Writes to what ``stream`` writes to, past its buffer, which must be empty and stay unused meanwhile."""

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._is_terminal = stream.isatty()
        self._held: list[str] = []
        self._next: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        # A daemon: it may be within a write that never returns.
        self._thread = threading.Thread(target=self._run, name="patient stream", daemon=True)
        self._thread.start()

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Gather text until ``flush``."""
        self._held.append(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what was gathered; leave it out if what was handed over before is not written yet."""
        text = "".join(self._held)
        self._held.clear()
        with contextlib.suppress(queue.Full):
            self._next.put_nowait(text.encode("utf-8", "replace"))

    def close(self, limit_s: float) -> bool:
        """Wait until all is written, up to a limit; False if nobody reads."""
        with contextlib.suppress(queue.Full):
            self._next.put(None, timeout=limit_s)
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (data := self._next.get()) is not None:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except OSError:
                    return  # nobody looks any more; what comes is left out
