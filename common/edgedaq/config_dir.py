"""A directory of TOML files, one per job: every file is read, every problem found, nothing is started.

``agent.toml`` and ``aggregator.toml`` are not jobs. A broken file is a ``JobFile`` with problems, so that who
runs the directory can refuse it all (a person is watching) or run the rest (a service). To check a job's
settings its class is imported, which runs the code of its module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edgedaq.config import DAQJobConfig, build_job_config
from edgedaq.errors import ConfigError
from edgedaq.import_limit import import_limit
from edgedaq.job import DAQJob
from edgedaq.registry import JOB_TABLE, STORE_TABLE, forget_modules, load_class, load_table, resolve
from edgedaq.store_config import STORE_TYPES, DAQJobStoreConfig
from edgedaq.typed_toml import read_toml

__all__ = [
    "MAIN_FILES",
    "RESERVED_IDS",
    "JobFile",
    "destinations",
    "load_directory",
    "load_jobs",
    "missing_stores",
    "reload_jobs",
    "require_directory",
]

MAIN_FILES = ("agent.toml", "aggregator.toml")
RESERVED_IDS = ("uplink", "intake")
"""Ids of the workers that every agent or aggregator has of itself."""


@dataclass
class JobFile:
    """One job's file as far as it could be understood.

    Args:
        unique_id: Unique in the directory and a valid name, even where the file says none.
        config: None if there are problems.
        has_reset: The job can reset its device.
        problems: One line each, beginning with the file.
    """

    path: Path
    unique_id: str
    job_type: str = ""
    target: str = ""
    is_store: bool = False
    raw: dict[str, Any] = field(default_factory=dict)
    config: DAQJobConfig | None = None
    has_reset: bool = False
    problems: list[str] = field(default_factory=list)


def require_directory(config_dir: Path) -> None:
    """Return if this is a directory that can be read.

    Raises:
        ConfigError: It is not.
    """
    try:
        if not config_dir.is_dir():
            what = "is not a directory" if config_dir.exists() else "does not exist"
            message = f"{config_dir}: {what}; --config-dir must name a directory of TOML files"
            raise ConfigError(message)
        next(config_dir.iterdir(), None)
    except OSError as e:
        message = f"{config_dir}: cannot be read: {e.strerror}"
        raise ConfigError(message) from e


def load_jobs(
    config_dir: Path, jobs: Mapping[str, str], stores: Mapping[str, str], *, takes_stores: bool
) -> list[JobFile]:
    """Return every job of a directory, in the order of the files' names.

    Args:
        jobs: Table of registered jobs, ``daq_job_type`` → target.
        stores: Table of registered stores.
        takes_stores: False where stores cannot run: on a node.
    """
    require_directory(config_dir)
    found = [
        _load(path, config_dir, jobs, stores, takes_stores=takes_stores)
        for path in sorted(config_dir.glob("*.toml"))
        if path.name not in MAIN_FILES and not path.name.startswith(".")
    ]
    _check_ids(found)
    _check_files(found)
    return found


def load_directory(config_dir: Path, *, takes_stores: bool) -> list[JobFile]:
    """Return every job of a directory, with the registered jobs and stores that are installed."""
    return load_jobs(config_dir, load_table(JOB_TABLE), load_table(STORE_TABLE), takes_stores=takes_stores)


def reload_jobs(config_dir: Path, *, takes_stores: bool) -> list[JobFile]:
    """Return every job of a directory as it is now: code of users in it is read again, too."""
    forget_modules(config_dir)
    return load_directory(config_dir, takes_stores=takes_stores)


def missing_stores(files: Iterable[JobFile]) -> list[str]:
    """Return a warning for each store that a job's data goes to and that the directory does not have."""
    held = list(files)
    present = {file.job_type for file in held if file.is_store}
    return [
        f"{file.path}: [{name}.{key}] needs a store of type {STORE_TYPES[key]}, which no file of "
        f"{file.path.parent} has; its data waits in the journal"
        for file in held
        for name, key, _ in _destinations(file)
        if STORE_TYPES[key] not in present
    ]


def destinations(files: Iterable[JobFile]) -> dict[str, list[str]]:
    """Return the keys in ``store_config`` of each job that has some, by its unique id."""
    found = {file.unique_id: sorted({key for _, key, _ in _destinations(file)}) for file in files}
    return {job: keys for job, keys in found.items() if keys}


def _destinations(file: JobFile) -> Iterator[tuple[str, str, Any]]:
    """Yield each ``(setting, key, options)`` that says where data goes, e.g. of ``store_config.csv``."""
    if file.config is None:
        return
    for setting in msgspec.structs.fields(file.config):
        value = getattr(file.config, setting.name)
        if isinstance(value, DAQJobStoreConfig):
            for key in value.keys():  # noqa: SIM118  # not a mapping
                yield setting.encode_name, key, getattr(value, key)


def _load(
    path: Path, config_dir: Path, jobs: Mapping[str, str], stores: Mapping[str, str], *, takes_stores: bool
) -> JobFile:
    file = JobFile(path=path, unique_id=path.stem)
    try:
        file.raw = read_toml(path)
    except ConfigError as e:
        file.problems.append(str(e))
        return file
    job_type = file.raw.get("daq_job_type")
    if isinstance(file.raw.get("daq_job_unique_id"), str):
        file.unique_id = file.raw["daq_job_unique_id"] or path.stem
    if not isinstance(job_type, str):
        allowed = "must be a registered name, file.py:ClassName or package.module:ClassName"
        told = f"is missing; it {allowed}" if job_type is None else f"{allowed}, got {job_type!r}"
        file.problems.append(f"{path}: daq_job_type {told}")
        return file
    file.job_type = job_type
    file.is_store = job_type in stores
    if file.is_store and not takes_stores:
        file.problems.append(
            f"{path}: daq_job_type {job_type!r} is a store; stores run in the aggregator, not in an agent"
        )
        return file
    try:
        file.target = resolve(job_type, {**jobs, **stores} if takes_stores else jobs, config_dir)
        with import_limit():
            job_class = load_class(file.target, config_dir)
        config_type = job_class.config_type
    except ConfigError as e:
        file.problems += [f"{path}: {line}" for line in str(e).splitlines()]
        return file
    try:
        file.config = build_job_config(config_type, file.raw, file=str(path), stem=path.stem)
        file.unique_id = file.config.daq_job_unique_id
        has_own_reset = job_class.reset_device is not DAQJob.reset_device
        file.has_reset = has_own_reset or bool(file.config.reset_command)
    except ConfigError as e:
        file.problems += str(e).splitlines()
    return file


def _check_ids(files: list[JobFile]) -> None:
    """Refuse reserved ids and the later of two files for one; give what is refused an id of its own."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.unique_id in RESERVED_IDS:
            file.problems.append(
                f"{file.path}: daq_job_unique_id must not be {file.unique_id!r}, which EdgeDAQ uses itself"
            )
        elif file.unique_id in seen:
            file.problems.append(
                f"{file.path}: daq_job_unique_id must differ from that of every other file, got "
                f"{file.unique_id!r}, which {seen[file.unique_id]} has"
            )
        if file.problems:
            file.config = None
            file.unique_id = _free_name(file.path.stem, {*seen, *RESERVED_IDS})
        seen[file.unique_id] = file.path


def _free_name(stem: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:50].lstrip("_-") or "job"
    name, number = base, 2
    while name in taken or name == "ALL":
        name, number = f"{base}_{number}", number + 1
    return name


def _check_files(files: list[JobFile]) -> None:
    """Refuse two jobs that would write one file in different ways, as far as that can be known beforehand."""
    writers: dict[tuple[object, ...], tuple[JobFile, object]] = {}
    for file in files:
        for name, key, options in _destinations(file):
            path = getattr(options, "file_path", None)
            if path is None:
                continue
            place = key, path, options.add_date, getattr(options, "table_name", "")
            first, others = writers.setdefault(place, (file, options))
            if first is file:
                continue
            if others != options:
                difference = "other options"
            elif key in ("csv", "raw") and first.job_type != file.job_type:
                difference = f"the data of another type of job ({first.job_type})"
            else:
                continue
            file.problems.append(
                f"{file.path}: {name}.{key}.file_path must not be {path!r}, which {first.path} writes "
                f"with {difference}"
            )
            file.config = None
            break
