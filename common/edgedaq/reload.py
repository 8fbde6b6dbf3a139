"""What is to be done when the files of a directory have changed while its jobs run; pure.

Each job is for itself: one that did not change is not touched. A file that is broken now leaves the job that
it described before running as it was; only one that is new, or was broken before, is FAILED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgedaq.worker_plan import WorkerPlan

__all__ = ["Changes", "changes_between"]


@dataclass
class Changes:
    """What to do; every plan in it is one of the new ones."""

    added: list[WorkerPlan] = field(default_factory=list)
    changed: list[WorkerPlan] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def to_map(self) -> dict[str, object]:
        """Return plain data."""
        return {
            "added": [plan.unique_id for plan in self.added],
            "changed": [plan.unique_id for plan in self.changed],
            "removed": self.removed,
            "refused": self.refused,
        }


def changes_between(held: Mapping[str, WorkerPlan], wanted: Sequence[WorkerPlan]) -> Changes:
    """Return how to get from the plans that are held to those that are wanted.

    Args:
        held: By unique id, without what was removed before.
        wanted: From the files as they are now; without the parts, which stay what they are.
    """
    changes = Changes()
    of_source = {plan.source: plan for plan in held.values() if not plan.is_part}
    kept: set[str] = set()
    for plan in wanted:
        former = of_source.get(plan.source)
        if plan.problem and former is not None and not former.problem:
            changes.refused[former.unique_id] = plan.problem
            kept.add(former.unique_id)
            continue
        present = held.get(plan.unique_id)
        kept.add(plan.unique_id)
        if present is None:
            changes.added.append(plan)
        elif present != plan:
            changes.changed.append(plan)
            changes.refused.pop(plan.unique_id, None)
    changes.removed = [name for name, plan in held.items() if not plan.is_part and name not in kept]
    return changes
