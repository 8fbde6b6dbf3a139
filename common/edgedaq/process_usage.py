"""What a worker and all that it started take of the machine; read where a job's TOML sets a limit."""

from __future__ import annotations

import contextlib
from typing import Any

from edgedaq.clock import mono_ns

__all__ = ["UsageMeter"]


class UsageMeter:
    """Reads one process and its descendants. Processor time counts from the second reading on."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._cpu_s: dict[int, float] = {}
        self._read_ns = 0

    def read(self) -> tuple[int, float] | None:
        """Return ``(memory_bytes, cpu_percent)`` since the last reading; None if the process has ended.

        Memory is what nobody else holds: rings and libraries that are shared with others do not count.
        """
        import psutil  # noqa: PLC0415  # only where a limit is set

        try:
            process = psutil.Process(self.pid)
            found = [process, *process.children(recursive=True)]
        except psutil.Error:
            return None
        now_ns = mono_ns()
        memory_bytes, used_s, held = 0, 0.0, {}
        for one in found:
            with contextlib.suppress(psutil.Error):
                memory_bytes += _own_bytes(one.memory_info())
                times = one.cpu_times()
                held[one.pid] = times.user + times.system
                used_s += held[one.pid] - self._cpu_s.get(one.pid, 0.0)
        elapsed_s = (now_ns - self._read_ns) / 1e9
        percent = 100.0 * used_s / elapsed_s if self._read_ns else 0.0
        self._cpu_s, self._read_ns = held, now_ns
        return memory_bytes, percent


def _own_bytes(info: Any) -> int:
    return int(info.rss - getattr(info, "shared", 0))
