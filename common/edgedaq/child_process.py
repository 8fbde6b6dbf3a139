"""What a supervisor asks the kernel about a process that it started, and tells it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

__all__ = ["has_ended", "reason_of", "volunteer"]

_OOM_SCORE = "300"


def volunteer(pid: int) -> None:
    """Let the kernel end a job before what carries the data of all, where memory runs out."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")


def has_ended(pid: int) -> bool:
    """Tell whether a child has ended, without reaping it: until then its pid and group are its own."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def reason_of(code: int) -> str:
    """Return in words how a process ended; empty if it did so by itself, well."""
    if code == 0:
        return ""
    if code > 0:
        return f"ended with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
