"""How long to wait, how often to try, when to give up: numbers and arithmetic, no clock and no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgedaq.config import DAQJobConfig

__all__ = ["CPU_OVER_S", "KILL_LIMIT_S", "START_LIMIT_S", "Policy", "backoff_s"]

START_LIMIT_S = 60.0
"""How long a new process may take until it says that it has started."""

KILL_LIMIT_S = 2.0
"""How long the kernel may take to end a process after SIGKILL, until it counts as unkillable."""

CPU_OVER_S = 10.0
"""How long a job may use more than its ``cpu_limit``."""

_DOUBLINGS_MAX = 60


@dataclass(frozen=True, slots=True)
class Policy:
    """What the supervisor does about one worker; the fields are those of ``DAQJobConfig``.

    Args:
        has_reset: The job can reset its device.
    """

    restart: Literal["always", "on_failure", "never"] = "on_failure"
    backoff_initial_s: float = 0.5
    backoff_max_s: float = 60.0
    healthy_after_s: float = 30.0
    restart_limit: int | None = None
    stop_limit_s: float = 3.0
    hang_limit_s: float | None = None
    start_limit_s: float = START_LIMIT_S
    kill_limit_s: float = KILL_LIMIT_S
    startup_error: Literal["restart", "retry", "fail", "ignore"] = "restart"
    has_reset: bool = False
    memory_limit_bytes: int | None = None
    cpu_limit_percent: float | None = None

    @classmethod
    def of(cls, config: DAQJobConfig, *, has_reset: bool = False) -> Policy:
        """Return the policy that a job's TOML asks for."""
        return cls(
            restart=config.restart,
            backoff_initial_s=config.restart_backoff,
            backoff_max_s=config.restart_backoff_max,
            healthy_after_s=config.restart_healthy_after,
            restart_limit=config.restart_limit,
            stop_limit_s=config.stop_limit,
            hang_limit_s=config.hang_limit,
            startup_error=config.startup_error_behavior,
            has_reset=has_reset,
            memory_limit_bytes=config.memory_limit,
            cpu_limit_percent=config.cpu_limit,
        )


def backoff_s(policy: Policy, attempt: int, jitter: float) -> float:
    """Return the wait before restart number ``attempt`` (0 is the first) in a row.

    Doubles from ``backoff_initial_s`` up to ``backoff_max_s``; between one half and the whole of that is
    waited, so that what failed together does not come back together.

    Args:
        jitter: Random, from 0 up to 1.
    """
    whole = min(policy.backoff_initial_s * 2.0 ** min(attempt, _DOUBLINGS_MAX), policy.backoff_max_s)
    return whole * (0.5 + 0.5 * jitter)
