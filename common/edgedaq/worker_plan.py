"""What a supervisor is to run: one plan for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedaq.policy import Policy

__all__ = ["WorkerPlan"]


@dataclass(frozen=True)
class WorkerPlan:
    """What is to run: one worker, or, with a ``problem``, one that cannot.

    Args:
        group: At a stop, groups end one after the other, the lowest first.
        spec: The map that the worker gets as its first message (``worker.WorkerSpec``).
        problem: What is wrong with its configuration; it is FAILED from the start.
        source: The file that describes it; empty for a part of EdgeDAQ itself.
        code: Tells versions of the job's own file of code apart; empty where it has none.
        start_order: It is started once everything with a lower one has begun.
    """

    unique_id: str
    job_type: str
    group: int
    policy: Policy
    spec: Mapping[str, Any]
    problem: str = ""
    source: str = ""
    code: str = ""
    start_order: int = 0

    @property
    def is_part(self) -> bool:
        """True for what EdgeDAQ runs of itself: uplink and intake, which no job's file describes."""
        return not self.source
