"""Wires an agent: from its directory of TOMLs to a supervisor with device jobs and an uplink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedaq.command_line import refuse_broken, run_supervisor
from edgedaq.config_dir import JobFile, destinations, load_directory, reload_jobs, require_directory
from edgedaq.errors import ConfigError
from edgedaq.keys import enrolment_path
from edgedaq.lane_options import LaneSpec, fit_lanes
from edgedaq.logsetup import configure, get_logger, is_service
from edgedaq.main_config import (
    check_directory,
    default_state_dir,
    make_directory,
    read_main,
    resolve_dir,
    resolve_runtime_dir,
    version,
)
from edgedaq.plans import Place, check_rings, job_plan, uplink_plan
from edgedaq.stats import NodeReport
from edgedaq.supervisor import Supervisor, SupervisorSetup

from edgedaq_agent.config import FILE_NAME, AgentConfig
from edgedaq_agent.dialling import Dialling

__all__ = ["ROLE", "Agent", "load", "run", "runtime_dir_of"]

ROLE = "agent"


@dataclass
class Agent:
    """An agent's directory as far as it could be understood; nothing runs.

    Args:
        problems: About ``agent.toml``, one line each; those of jobs are with their files.
    """

    place: Place
    config: AgentConfig
    path: Path
    files: list[JobFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load(config_dir: Path) -> Agent:
    """Read and check a directory. Starts nothing and makes nothing.

    Raises:
        ConfigError: ``agent.toml`` itself is broken or missing; problems of job files come with it.
    """
    require_directory(config_dir)
    path = config_dir / FILE_NAME
    try:
        config, runtime_dir = _main(path, config_dir)
    except ConfigError as e:
        files = _jobs(config_dir)
        lines = [str(e), *(problem for file in files for problem in file.problems)]
        raise ConfigError("\n".join(lines)) from e
    files = _jobs(config_dir)
    state_dir = resolve_dir(config.state_dir, config_dir, default_state_dir(config_dir, config.supervisor_id))
    problems: list[str] = []
    lanes: list[LaneSpec] = []
    try:
        lanes = fit_lanes(path, config.lanes, config.forward, state_dir)
    except ConfigError as e:
        problems.append(str(e))
    place = Place(
        node=config.supervisor_id,
        config_dir=config_dir,
        runtime_dir=runtime_dir,
        state_dir=state_dir,
        out_dir=state_dir,
        lanes=lanes,
        verbosity=config.verbosity,
    )
    agent = Agent(place, config, path, files, problems)
    for key, directory in (("state_dir", state_dir), ("runtime_dir", runtime_dir)):
        try:
            check_directory(path, key, directory)
        except ConfigError as e:
            agent.problems.append(str(e))
    try:
        Dialling(config.aggregator, enrolment_path(config_dir), config.supervisor_id).destination()
    except ConfigError as e:
        agent.warnings.append(f"{path}: {e}; until then data waits in the spool")
    too_large, warnings = check_rings(path, files, config.ring_bytes, runtime_dir)
    agent.problems += too_large
    agent.warnings += warnings
    if not files:
        agent.warnings.append(f"{config_dir}: has no job; each *.toml besides {FILE_NAME} is one")
    return agent


def runtime_dir_of(config_dir: Path) -> Path:
    """Return where an agent with this directory has its sockets.

    Raises:
        ConfigError: ``agent.toml`` is broken or missing.
    """
    require_directory(config_dir)
    return _main(config_dir / FILE_NAME, config_dir)[1]


def run(config_dir: Path, *, lifeline_fd: int | None = None) -> int:
    """Run the agent until it is stopped; return the exit status.

    Args:
        lifeline_fd: Its end is a stop, too.

    Raises:
        ConfigError: It cannot run with this directory.
    """
    agent = load(config_dir)
    refuse_broken(agent.files, agent.problems)
    place = agent.place
    configure(place.verbosity, facts={"node": place.node})
    for warning in agent.warnings:
        get_logger().warning("config.doubted", reason=warning)
    make_directory(agent.path, "state_dir", place.state_dir)
    return run_supervisor(place.runtime_dir, lambda: _setup(agent, lifeline_fd))


def _setup(agent: Agent, lifeline_fd: int | None) -> SupervisorSetup:
    place = agent.place
    uplink = {
        "aggregator": agent.config.aggregator,
        "enrolment": str(enrolment_path(place.config_dir)),
        "stored": destinations(agent.files),
    }
    plans = [job_plan(file, place) for file in agent.files]
    plans.append(uplink_plan(uplink, place, config_file=agent.path))

    def forward_report(supervisor: Supervisor, report: NodeReport) -> None:
        supervisor.send("uplink", {"type": "node_report", "report": report.to_map()})

    def facts() -> Mapping[str, Any]:
        return {
            "config_dir": str(place.config_dir),
            "state_dir": str(place.state_dir),
            "aggregator": agent.config.aggregator,
        }

    return SupervisorSetup(
        node=place.node,
        role=ROLE,
        version=version(),
        runtime_dir=place.runtime_dir,
        plans=plans,
        on_report=forward_report,
        facts=facts,
        lifeline_fd=lifeline_fd,
        reload=lambda: [job_plan(file, place) for file in reload_jobs(place.config_dir, takes_stores=False)],
        reloads_on_hangup=is_service(),
    )


def _main(path: Path, config_dir: Path) -> tuple[AgentConfig, Path]:
    if not path.exists():
        message = f"{path}: is missing; it must say at least supervisor_id, the name of this node"
        raise ConfigError(message)
    config = read_main(AgentConfig, path)
    return config, resolve_runtime_dir(config.runtime_dir, config_dir, ROLE, path)


def _jobs(config_dir: Path) -> list[JobFile]:
    return load_directory(config_dir, takes_stores=False)
