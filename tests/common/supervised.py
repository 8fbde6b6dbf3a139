"""Runs a supervisor over a directory of job files, without uplink or intake: only what supervision does.

The group of a job is told by its name: ``uplink_x``, ``intake_x``, ``stores_x``; any other is a device.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from edgedaq.command_line import guarded, run_supervisor
from edgedaq.config_dir import load_jobs
from edgedaq.logsetup import configure, is_service
from edgedaq.plans import Place, job_plan
from edgedaq.registry import forget_modules
from edgedaq.supervisor import DEVICES, INTAKE, STORES, UPLINK, SupervisorSetup
from edgedaq.worker_plan import WorkerPlan

_GROUPS = {"uplink": UPLINK, "intake": INTAKE, "stores": STORES}


def main(config_dir: Path, runtime_dir: Path) -> int:
    """Run until stopped."""
    configure()
    place = Place("n1", config_dir, runtime_dir, config_dir / "state", config_dir / "out")

    def plans() -> list[WorkerPlan]:
        forget_modules(config_dir)
        return [
            dataclasses.replace(
                job_plan(file, place), group=_GROUPS.get(file.unique_id.partition("_")[0], DEVICES)
            )
            for file in load_jobs(config_dir, {}, {}, takes_stores=False)
        ]

    setup = SupervisorSetup(
        "n1", "agent", "0", runtime_dir, plans(), reload=plans, reloads_on_hangup=is_service()
    )
    return guarded(lambda: run_supervisor(runtime_dir, lambda: setup))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
