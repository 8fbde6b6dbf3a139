"""From ``daq_job_type`` to a class: registered names, files of users, modules.

============================ =================================================================
daq_job_type                 target
============================ =================================================================
``DAQJobTest``               what the tables ``JOBS`` and ``STORES`` say
``my_job.py:MyJob``          that class of that file; relative paths begin at the directory of the TOMLs
``my_package.module:MyJob``  that class of that module; that directory and the working directory
                             are searched last
============================ =================================================================

A *target* is ``module:Class`` or ``/absolute/file.py:Class``: what a worker is told to run. The tables name
modules without importing them; ``load_table`` finds them in whichever of the packages is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import msgspec

from edgedaq.config import DAQJobConfig
from edgedaq.errors import ConfigError, nearest
from edgedaq.job import DAQJob

__all__ = ["JOB_TABLE", "STORE_TABLE", "extend_path", "forget_modules", "load_class", "load_table", "resolve"]

JOB_TABLE = "edgedaq_agent.jobs:JOBS"
STORE_TABLE = "edgedaq_aggregator.stores:STORES"


def load_table(name: str) -> dict[str, str]:
    """Return a table ``daq_job_type`` → target; empty where its package is not installed."""
    module_name, attribute = name.split(":")
    try:
        if importlib.util.find_spec(module_name) is None:
            return {}
    except ModuleNotFoundError:
        return {}
    return dict(getattr(importlib.import_module(module_name), attribute))


def extend_path(config_dir: Path) -> None:
    """Let modules beside the TOMLs, and in the working directory, be imported; after everything installed."""
    for entry in (str(config_dir.resolve()), str(Path.cwd())):
        if entry not in sys.path:
            sys.path.append(entry)


def resolve(job_type: str, table: Mapping[str, str], config_dir: Path) -> str:
    """Return the target that a ``daq_job_type`` names; imports nothing.

    Raises:
        ConfigError: It is not a registered name, or the file does not exist. The message begins with the key.
    """
    if ":" not in job_type:
        if job_type in table:
            return table[job_type]
        hint = nearest(job_type, table) or f", known: {', '.join(sorted(table))}"
        message = (
            "daq_job_type must be a registered name, file.py:ClassName or package.module:ClassName, "
            f"got {job_type!r}{hint}"
        )
        raise ConfigError(message)
    place, _, class_name = job_type.rpartition(":")
    if not class_name.isidentifier() or not place:
        message = f"daq_job_type must be file.py:ClassName or package.module:ClassName, got {job_type!r}"
        raise ConfigError(message)
    if place.endswith(".py"):
        path = (config_dir / place).resolve()
        if not path.is_file():
            message = f"daq_job_type names a file that does not exist: {path}"
            raise ConfigError(message)
        return f"{path}:{class_name}"
    if not all(part.isidentifier() for part in place.split(".")):
        message = f"daq_job_type must be file.py:ClassName or package.module:ClassName, got {job_type!r}"
        raise ConfigError(message)
    return job_type


def load_class(target: str, config_dir: Path | None = None) -> type[DAQJob]:
    """Import and return the job class that a target names. Runs the code of its module.

    Args:
        config_dir: Directory of the TOMLs, whose modules may be imported too.

    Raises:
        ConfigError: It cannot be imported, does not exist, or is not a job.
    """
    if config_dir is not None:
        extend_path(config_dir)
    place, _, class_name = target.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import(place)
    found = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, value in vars(module).items() if _is_job(value) and value is not DAQJob]
        hint = nearest(class_name, classes) or (f", it has: {', '.join(sorted(classes))}" if classes else "")
        message = f"daq_job_type names a class that {place} does not have: {class_name!r}{hint}"
        raise ConfigError(message)
    if not _is_job(found):
        message = f"daq_job_type must name a class derived from DAQJob, {class_name!r} in {place} is not"
        raise ConfigError(message)
    config_type = getattr(found, "config_type", None)
    if not (isinstance(config_type, type) and issubclass(config_type, DAQJobConfig)):
        message = (
            f"{class_name}.config_type in {place} must be derived from DAQJobConfig, got {config_type!r}"
        )
        raise ConfigError(message)
    try:
        msgspec.structs.fields(config_type)
    except (NameError, TypeError) as e:
        message = f"{config_type.__name__} in {place} has a type that cannot be used: {e}"
        raise ConfigError(message) from e
    job_class: type[DAQJob] = found
    return job_class


def forget_modules(config_dir: Path) -> None:
    """Forget what was imported from the directory of the TOMLs, so that it is read again."""
    place = str(config_dir.resolve()) + "/"
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(place):
            del sys.modules[name]
    importlib.invalidate_caches()


def _is_job(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, DAQJob)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as e:  # code of users, that may even call sys.exit
        message = f"daq_job_type names a module that cannot be imported: {_where(e, (name,))}"
        raise ConfigError(message) from e


def _import_file(path: Path) -> ModuleType:
    name = f"edgedaq_file_{path.stem}"
    held = sys.modules.get(name)
    if held is not None and held.__file__ == str(path):
        return held
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        message = f"daq_job_type names a file that is no Python module: {path}"
        raise ConfigError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # typed configurations find their names through it
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as e:  # as above
        sys.modules.pop(name, None)
        message = f"daq_job_type names a file that cannot be imported: {_where(e, (str(path),))}"
        raise ConfigError(message) from e
    return module


def _where(error: BaseException, names: Iterable[str]) -> str:
    """Return one line: what went wrong, and the last place in code that is not the import system's own."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
        and frame.filename != __file__
        and "importlib" not in frame.filename
    ]
    if frames:
        return f"{text} ({frames[-1].filename}:{frames[-1].lineno})"
    return f"{text} ({', '.join(names)})"
