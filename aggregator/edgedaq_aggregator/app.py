"""Wires an aggregator: from its directory of TOMLs to a supervisor with intake, stores and statistics.

Device jobs in the directory run as well; an uplink then carries their data to the intake of the same machine.
``standalone`` is that with everything chosen: name, port and output directory.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedaq.command_line import refuse_broken, run_supervisor
from edgedaq.config_dir import (
    JobFile,
    destinations,
    load_directory,
    missing_stores,
    reload_jobs,
    require_directory,
)
from edgedaq.errors import ConfigError, WireError
from edgedaq.keys import ENROLMENT_NAME, Enrolment, aggregator_keys, new_key_pair, write_enrolment
from edgedaq.lane_options import LaneSpec, fit_lanes
from edgedaq.logsetup import configure, get_logger, is_service
from edgedaq.main_config import (
    check_directory,
    fit_on_disk,
    make_directory,
    read_main,
    resolve_dir,
    resolve_runtime_dir,
    service_state_dir,
    version,
)
from edgedaq.plans import Place, check_rings, job_plan, part_plan, uplink_plan
from edgedaq.registry import load_class
from edgedaq.stats import NodeReport
from edgedaq.store_config import STORE_TYPES
from edgedaq.supervisor import INTAKE, Supervisor, SupervisorSetup
from edgedaq.worker_plan import WorkerPlan

from edgedaq_aggregator.config import FILE_NAME, AggregatorConfig
from edgedaq_aggregator.node_commands import own_address
from edgedaq_aggregator.stats_files import Statistics
from edgedaq_aggregator.stores.base import DAQJobStore

__all__ = ["ROLE", "Aggregator", "LiveView", "load", "run", "runtime_dir_of", "store_doubts"]

ROLE = "aggregator"
JOURNAL_FEED = "edgedaq_aggregator.journal_feed:JournalFeed"
INTAKE_TARGET = "edgedaq_aggregator.intake:Intake"
DEFAULT_NODE = "aggregator"
DEFAULT_LISTEN = "tcp://127.0.0.1:7770"
JOURNAL_USUAL = 20 << 30
_INTAKE_STOP_LIMIT_S = 3.0


@dataclass
class Aggregator:
    """An aggregator's directory as far as it could be understood; nothing runs.

    Args:
        listen: Empty where a free port is to be found when it runs.
        problems: About ``aggregator.toml``, one line each; those of jobs are with their files.
    """

    place: Place
    config: AggregatorConfig
    path: Path
    listen: str
    is_standalone: bool
    files: list[JobFile] = field(default_factory=list)
    journal: tuple[int, int] = (0, 0)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class LiveView:
    """What is told to whoever watches a running aggregator; this one tells nobody."""

    def show(self, supervisor: Supervisor) -> None:
        """Take a look, once a second."""


def load(config_dir: Path, *, is_standalone: bool = False, out_dir: Path | None = None) -> Aggregator:
    """Read and check a directory. Starts nothing and makes nothing.

    Args:
        out_dir: Given by the caller, in place of what the file says.

    Raises:
        ConfigError: ``aggregator.toml`` itself is broken; problems of job files come with it.
    """
    require_directory(config_dir)
    path = config_dir / FILE_NAME
    try:
        config, runtime_dir = _main(path, config_dir)
    except ConfigError as e:
        lines = [str(e), *(problem for file in _jobs(config_dir) for problem in file.problems)]
        raise ConfigError("\n".join(lines)) from e
    files = _jobs(config_dir)
    stored = out_dir.resolve() if out_dir else resolve_dir(config.out_dir, config_dir, Path("out"))
    state_dir = resolve_dir(config.state_dir, config_dir, service_state_dir(config_dir) or stored / ".state")
    problems: list[str] = []
    lanes: list[LaneSpec] = []
    if any(not file.is_store for file in files):
        try:
            lanes = fit_lanes(path, config.lanes, ("store",), state_dir)
        except ConfigError as e:
            problems.append(str(e))
    place = Place(
        node=config.supervisor_id or (_host_node() if is_standalone else DEFAULT_NODE),
        config_dir=config_dir,
        runtime_dir=runtime_dir,
        state_dir=state_dir,
        out_dir=stored,
        lanes=lanes,
        journal_feed="" if is_standalone else JOURNAL_FEED,  # no other node reaches a standalone one
        verbosity=config.verbosity,
    )
    listen = config.listen or ("" if is_standalone else DEFAULT_LISTEN)
    aggregator = Aggregator(place, config, path, listen, is_standalone, files, problems=problems)
    _check(aggregator)
    return aggregator


def store_doubts(files: Iterable[JobFile]) -> list[str]:
    """Return what stores doubt about their backends, which are asked: one that is away is a doubt, too."""
    found = []
    for file in files:
        store = load_class(file.target, None) if file.is_store and file.config is not None else None
        if store is not None and issubclass(store, DAQJobStore):
            found += [f"{file.path}: {doubt}" for doubt in store.doubts(file.config)]
    return found


def runtime_dir_of(config_dir: Path) -> Path:
    """Return where an aggregator with this directory has its sockets.

    Raises:
        ConfigError: ``aggregator.toml`` is broken.
    """
    require_directory(config_dir)
    return _main(config_dir / FILE_NAME, config_dir)[1]


def run(aggregator: Aggregator, view: LiveView | None = None, *, lifeline_fd: int | None = None) -> int:
    """Run it until it is stopped; return the exit status.

    Args:
        lifeline_fd: Its end is a stop, too.

    Raises:
        ConfigError: It cannot run with this directory.
    """
    refuse_broken(aggregator.files, aggregator.problems)
    place = aggregator.place
    configure(place.verbosity, facts={"node": place.node})
    for warning in aggregator.warnings:
        get_logger().warning("config.doubted", reason=warning)
    make_directory(aggregator.path, "out_dir", place.out_dir, mode=0o755)
    make_directory(aggregator.path, "state_dir", place.state_dir)
    return run_supervisor(place.runtime_dir, lambda: _setup(aggregator, view or LiveView(), lifeline_fd))


def _setup(aggregator: Aggregator, view: LiveView, lifeline_fd: int | None) -> SupervisorSetup:
    place = aggregator.place
    listen = aggregator.listen or _free_endpoint()
    statistics = Statistics(place.out_dir, place.state_dir)
    log = get_logger()

    def take_report(supervisor: Supervisor, report: NodeReport) -> None:
        statistics.take_own(report)
        statistics.service()
        view.show(supervisor)

    def take_message(_: str, message: dict[str, Any]) -> None:
        if message.get("type") == "node_report":
            try:
                statistics.take(message.get("report"))
            except WireError as e:
                log.warning("report.rejected", reason=str(e))

    def facts() -> Mapping[str, Any]:
        return {
            "config_dir": str(place.config_dir),
            "state_dir": str(place.state_dir),
            "out_dir": str(place.out_dir),
            "listen": listen,
            "statistics": statistics.status(),
        }

    return SupervisorSetup(
        node=place.node,
        role="standalone" if aggregator.is_standalone else ROLE,
        version=version(),
        runtime_dir=place.runtime_dir,
        plans=_plans(aggregator, listen, _own_key(aggregator, listen)),
        on_report=take_report,
        on_message=take_message,
        on_end=statistics.close,
        facts=facts,
        lifeline_fd=lifeline_fd,
        reload=lambda: _reloaded(place),
        reloads_on_hangup=is_service(),
    )


def _own_key(aggregator: Aggregator, listen: str) -> str:
    """Return the public key of this aggregator's own uplink, made anew; empty where it needs none.

    It is in no file of nodes: the intake is told.
    """
    place = aggregator.place
    if not aggregator.config.has_keys or not place.lanes:
        return ""
    keys = new_key_pair()
    enrolment = Enrolment(
        node=place.node,
        aggregator=own_address(listen),
        aggregator_key=aggregator_keys(place.state_dir).public,
        secret_key=keys.secret,
    )
    write_enrolment(place.runtime_dir / ENROLMENT_NAME, enrolment)
    return keys.public


def _reloaded(place: Place) -> list[WorkerPlan]:
    """Return the plans of all files as they are now; without an uplink, a job could not hand its data on."""
    files = reload_jobs(place.config_dir, takes_stores=True)
    for file in files if not place.lanes else ():
        if not file.is_store and not file.problems:
            file.config = None
            file.problems.append(f"{file.path}: the first job beside stores is taken at the next start only")
    return _job_plans(files, place)


def _job_plans(files: Sequence[JobFile], place: Place) -> list[WorkerPlan]:
    own = replace(place, lanes=())
    return [job_plan(file, own if file.is_store else place) for file in files]


def _plans(aggregator: Aggregator, listen: str, own_key: str) -> list[WorkerPlan]:
    config, place, path = aggregator.config, aggregator.place, aggregator.path
    plans = _job_plans([file for file in aggregator.files if not file.is_store], place)
    if place.lanes:
        uplink: dict[str, Any] = {"aggregator": listen}
        if own_key:
            uplink = {"enrolment": str(place.runtime_dir / ENROLMENT_NAME)}
        uplink["stored"] = destinations(aggregator.files)
        plans.append(uplink_plan(uplink, place, config_file=path))
    own = replace(place, lanes=())
    intake = {
        "listen": listen,
        "segment": config.journal.segment,
        "limit": aggregator.journal[0],
        "reserve": aggregator.journal[1],
        "keep": config.journal.keep,
        "store_limit": config.journal.store_limit,
        "stores": [file.unique_id for file in aggregator.files if file.is_store],
        "has_keys": config.has_keys,
        "own_key": own_key,
        "store_keys": _store_keys(aggregator),
    }
    plans.append(
        part_plan(
            "intake",
            INTAKE_TARGET,
            INTAKE,
            intake,
            own,
            config_file=path,
            stop_limit_s=_INTAKE_STOP_LIMIT_S,
        )
    )
    plans += _job_plans([file for file in aggregator.files if file.is_store], place)
    return plans


def _store_keys(aggregator: Aggregator) -> list[str] | None:
    """Return the keys in ``store_config`` that there are stores for; None if one is of a type of its own."""
    keys = {job_type: key for key, job_type in STORE_TYPES.items()}
    types = {file.job_type for file in aggregator.files if file.is_store}
    return sorted(keys[one] for one in types) if types <= keys.keys() else None


def _check(aggregator: Aggregator) -> None:
    """Find what is wrong with directories and limits, and what is doubtful."""
    place, config, path = aggregator.place, aggregator.config, aggregator.path
    for key, directory in (
        ("out_dir", place.out_dir),
        ("state_dir", place.state_dir),
        ("runtime_dir", place.runtime_dir),
    ):
        try:
            check_directory(path, key, directory)
        except ConfigError as e:
            aggregator.problems.append(str(e))
    journal = config.journal
    try:
        aggregator.journal = fit_on_disk(
            path, "journal", journal.limit, journal.reserve, place.state_dir, usual=JOURNAL_USUAL
        )
    except ConfigError as e:
        aggregator.problems.append(str(e))
    problems, warnings = check_rings(path, aggregator.files, None, place.runtime_dir)
    aggregator.problems += problems
    aggregator.warnings += warnings
    aggregator.warnings += missing_stores(aggregator.files)
    if not any(file.is_store for file in aggregator.files):
        aggregator.warnings.append(f"{place.config_dir}: has no store; what arrives waits in the journal")
    agent_toml = place.config_dir / "agent.toml"
    if aggregator.is_standalone and agent_toml.exists():
        aggregator.warnings.append(
            f"{agent_toml}: is not read here; {FILE_NAME} may hold what standalone needs"
        )
    if aggregator.is_standalone and not place.lanes:
        aggregator.warnings.append(f"{place.config_dir}: has no job besides stores; nothing is taken")


def _main(path: Path, config_dir: Path) -> tuple[AggregatorConfig, Path]:
    config = read_main(AggregatorConfig, path)
    return config, resolve_runtime_dir(config.runtime_dir, config_dir, ROLE, path)


def _jobs(config_dir: Path) -> list[JobFile]:
    return load_directory(config_dir, takes_stores=True)


def _host_node() -> str:
    """Return this machine's name as a node may be called."""
    host = socket.gethostname().partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "-", host).lstrip("_-")[:63] or "standalone"


def _free_endpoint() -> str:
    """Return an address of this machine alone that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
