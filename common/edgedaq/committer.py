"""The thread that makes a log durable: the next fdatasync starts when the last one has ended and bytes wait.

So commits grow with load by themselves, and an idle log sleeps. The appender calls ``wake`` after appending;
when ``durable`` has moved, or the disk has failed, ``fileno`` becomes readable, for the appender's poll loop.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from edgedaq.errors import EdgeDAQError
from edgedaq.segments import LogError, SegmentLog

__all__ = ["Committer"]

_RETRY_FIRST_S = 0.1
_RETRY_LAST_S = 5.0


class Committer:
    """Syncs a log in a thread of its own.

    Args:
        log: Outlives the committer; others keep appending to it.
        gather_s: How long to let bytes gather before each fdatasync: 0 for the lowest latency, 0.2 for an SD
            card.
        on_durable: Called in the thread after each attempt; must not raise or block.

    The thread runs from construction to ``close``.
    """

    def __init__(
        self, log: SegmentLog, *, gather_s: float = 0.0, on_durable: Callable[[], None] | None = None
    ) -> None:
        self.error: LogError | None = None
        """Why the last fdatasync failed; None once one has succeeded again."""
        self.failed_count = 0
        """How many attempts failed."""
        self.commit_count = 0
        """How many moved ``durable``."""
        self._log = log
        self._gather_s = gather_s
        self._on_durable = on_durable
        self._work = threading.Event()
        self._stop = threading.Event()
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return what becomes readable after each attempt, until ``clear``."""
        return self._read_fd

    def clear(self) -> None:
        """Make ``fileno`` unreadable; call it before looking at ``durable``."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read_fd, 4096):
                pass

    def wake(self) -> None:
        """Say that bytes wait."""
        self._work.set()

    def close(self) -> None:
        """Sync once more if bytes wait, and end the thread; safe to call again. Blocks for one fdatasync."""
        if self._write_fd < 0:
            return
        self._stop.set()
        self._work.set()
        self._thread.join()
        os.close(self._read_fd)
        os.close(self._write_fd)
        self._read_fd = self._write_fd = -1

    def _run(self) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            self._work.wait()
            if self._gather_s and not self._stop.is_set():
                self._stop.wait(self._gather_s)
            is_last = self._stop.is_set()
            self._work.clear()
            before = self._log.durable
            try:
                durable = self._log.sync()
            except (EdgeDAQError, OSError) as e:
                self.error = e if isinstance(e, LogError) else LogError(str(e))
                self.failed_count += 1
                self._tell()
                if is_last or self._stop.wait(retry_s):
                    return
                retry_s = min(2 * retry_s, _RETRY_LAST_S)
                self._work.set()
                continue
            self.error = None
            retry_s = _RETRY_FIRST_S
            if durable > before:
                self.commit_count += 1
                self._tell()
            if is_last:
                return

    def _tell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")
        if self._on_durable is not None:
            self._on_durable()
