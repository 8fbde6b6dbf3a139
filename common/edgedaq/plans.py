"""From checked files to what a supervisor runs: one ``WorkerPlan`` for each worker.

Agent and aggregator share this, because an aggregator may have device jobs of its own (``standalone`` is
nothing else): they reach its intake through an uplink like those of any node.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgedaq.clock import boot_id
from edgedaq.config import DAQJobConfig, RingOptions
from edgedaq.config_dir import JobFile
from edgedaq.job_context import WorkerSpec
from edgedaq.lane_options import LaneSpec
from edgedaq.policy import Policy
from edgedaq.supervisor import DEVICES, STORES, UPLINK
from edgedaq.units import format_bytes
from edgedaq.worker_plan import WorkerPlan

__all__ = ["UPLINK_TARGET", "Place", "check_rings", "job_plan", "part_plan", "uplink_plan"]

UPLINK_TARGET = "edgedaq_agent.uplink:Uplink"
_STORE_STOP_LIMIT_S = 5.0
_UPLINK_STOP_LIMIT_S = 6.0


@dataclass(frozen=True)
class Place:
    """Where workers run: what all of one supervisor have in common.

    Args:
        lanes: Of the uplink; none where there is no uplink.
        journal_feed: What hands the data of other nodes to jobs, in a control room.
    """

    node: str
    config_dir: Path
    runtime_dir: Path
    state_dir: Path
    out_dir: Path
    lanes: Sequence[LaneSpec] = ()
    journal_feed: str = ""
    verbosity: str = "INFO"

    def spec(
        self,
        unique_id: str,
        job_type: str,
        target: str,
        config: Mapping[str, Any],
        *,
        config_file: str,
        verbosity: str,
        ring: RingOptions,
    ) -> dict[str, Any]:
        """Return a worker's first message."""
        spec = WorkerSpec(
            unique_id=unique_id,
            job_type=job_type,
            target=target,
            config=dict(config),
            config_file=config_file,
            node=self.node,
            boot=boot_id(),
            runtime_dir=str(self.runtime_dir),
            state_dir=str(self.state_dir),
            out_dir=str(self.out_dir),
            verbosity=verbosity,
            claims={lane.claim: list(lane.topics) for lane in self.lanes},
            ring=msgspec.to_builtins(ring),
            journal_feed=self.journal_feed,
        )
        return dict(msgspec.to_builtins(spec))


def job_plan(file: JobFile, place: Place) -> WorkerPlan:
    """Return the plan of a device job or a store; one with problems is FAILED from the start."""
    group = STORES if file.is_store else DEVICES
    config = file.config
    if config is None:
        problem = "; ".join(file.problems)
        return WorkerPlan(file.unique_id, file.job_type, group, Policy(), {}, problem, str(file.path))
    spec = place.spec(
        file.unique_id,
        file.job_type,
        file.target,
        msgspec.to_builtins(config),
        config_file=str(file.path),
        verbosity=config.verbosity,
        ring=config.ring,
    )
    return WorkerPlan(
        file.unique_id,
        file.job_type,
        group,
        _policy(config, is_store=file.is_store, has_reset=file.has_reset),
        spec,
        source=str(file.path),
        code=_version_of(file.target),
        start_order=config.start_order,
    )


def part_plan(
    unique_id: str,
    target: str,
    group: int,
    config: Mapping[str, Any],
    place: Place,
    *,
    config_file: Path,
    stop_limit_s: float,
) -> WorkerPlan:
    """Return the plan of a worker that EdgeDAQ has of itself: it is always started again."""
    job_type = target.partition(":")[2]
    spec = place.spec(
        unique_id,
        job_type,
        target,
        {"daq_job_type": job_type, "daq_job_unique_id": unique_id, **config},
        config_file=str(config_file),
        verbosity=place.verbosity,
        ring=RingOptions(),
    )
    policy = Policy(
        restart="always",
        backoff_initial_s=0.2,
        backoff_max_s=1.0,  # nothing moves without it, and a start costs a fraction of a second
        healthy_after_s=5.0,
        stop_limit_s=stop_limit_s,
    )
    return WorkerPlan(unique_id, job_type, group, policy, spec)


def uplink_plan(config: Mapping[str, Any], place: Place, *, config_file: Path) -> WorkerPlan:
    """Return the plan of the uplink, which carries the lanes of a place to where ``config`` says."""
    return part_plan(
        "uplink",
        UPLINK_TARGET,
        UPLINK,
        {**config, "lanes": msgspec.to_builtins(list(place.lanes))},
        place,
        config_file=config_file,
        stop_limit_s=_UPLINK_STOP_LIMIT_S,
    )


def check_rings(
    where: Path, files: Iterable[JobFile], budget: int | None, runtime_dir: Path
) -> tuple[list[str], list[str]]:
    """Return ``(problems, warnings)`` about the shared memory that all jobs together may take.

    Args:
        budget: What the file says; if nothing, half of the disk of ``runtime_dir``, for a warning.
    """
    rings = [file.config.ring for file in files if file.config is not None and not file.is_store]
    total = sum(ring.ring_bytes + ring.slots * ring.slot_bytes for ring in rings)
    if budget is not None:
        if total <= budget:
            return [], []
        problem = (
            f"{where}: ring_bytes must be at least {format_bytes(total)}, which the rings of {len(rings)} "
            f"jobs take, got {format_bytes(budget)}"
        )
        return [problem], []
    present = runtime_dir
    while not present.exists() and present != present.parent:
        present = present.parent
    room = shutil.disk_usage(present).total
    if total <= room // 2:
        return [], []
    warning = (
        f"{where}: the rings of {len(rings)} jobs may take {format_bytes(total)}, more than half of the "
        f"{format_bytes(room)} that {present} has"
    )
    return [], [warning]


def _version_of(target: str) -> str:
    """Return what changes when a user edits the file that a job's class is in; empty for a module."""
    place = target.rpartition(":")[0]
    if not place.endswith(".py"):
        return ""
    try:
        found = Path(place).stat()
    except OSError:
        return ""
    return f"{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"


def _policy(config: DAQJobConfig, *, is_store: bool, has_reset: bool) -> Policy:
    policy = Policy.of(config, has_reset=has_reset)
    if not is_store:
        return policy
    # A store never has finished, and what it was given last takes longer to commit than a device to close.
    limit_s = max(policy.stop_limit_s, _STORE_STOP_LIMIT_S)
    return Policy.of(msgspec.structs.replace(config, restart="always", stop_limit=limit_s))
