"""The TOML files that the demo runs, made for the stores that are wanted.

Tables go to each store but ``raw``, which has the waveforms of the simulated detector, and those alone. A
second demo in the same directory may want other stores: what is not wanted any more is taken away, what it
has stored stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgedaq.errors import ConfigError, nearest
from edgedaq.store_config import STORE_TYPES

from edgedaq_aggregator.stores import STORES

__all__ = ["NODE", "chosen_stores", "write_configs"]

NODE = "demo-node"
"""The demo's node; its files are under ``OUT/demo-node``."""

_ALL = "all"
_WAVEFORMS = "raw"

_AGGREGATOR = """\
supervisor_id = "demo-aggregator"
listen = "tcp://127.0.0.1:{port}"
out_dir = "../.."
"""
_AGENT = f"""\
supervisor_id = "{NODE}"
aggregator = "tcp://127.0.0.1:{{port}}"
state_dir = "../../.state/agent"
"""
_JOBS = {
    "pc_metrics": 'daq_job_type = "DAQJobPCMetrics"\ninterval_seconds = 0.5\n',
    "test": 'daq_job_type = "DAQJobTest"\nrand_min = 1\nrand_max = 100\ninterval_seconds = "10 ms"\n',
    "detector": 'daq_job_type = "DAQJobSimulatedDetector"\nrate_hz = 50.0\n',
    "thermometer": 'daq_job_type = "thermometer.py:DAQJobThermometer"\ninterval_seconds = 0.1\n',
}
_NAMES = {"detector": "events", "thermometer": "temperature"}
"""What a job's rows are called, where it is not the job's name."""

_TABLE_OPTIONS = {
    "csv": 'file_path = "{name}.csv"\nadd_date = true\n',
    "root": 'file_path = "{name}.root"\nadd_date = true\n',
    "hdf5": 'file_path = "{name}.h5"\nadd_date = true\n',
    "parquet": 'file_path = "{name}.parquet"\nadd_date = true\n',
    "sqlite": 'file_path = "demo.sqlite"\nadd_date = true\ntable_name = "{name}"\n',
    "mysql": 'table_name = "{name}"\n',
    "redis": 'key = "{name}"\n',
}
_WAVEFORM_OPTIONS = '\n[waveform_store_config.raw]\nfile_path = "waveforms.bin"\nadd_date = true\n'
_STORE_OPTIONS = {
    "parquet": 'seal_every = "2 s"\n',
    "mysql": 'database = "demo"\nuser = "root"\n',
}


def chosen_stores(text: str) -> tuple[str, ...]:
    """Return the keys of the stores that a list like ``csv,raw`` names; ``all`` is every one there is.

    Raises:
        ConfigError: There is no such store, or none of them takes tables.
    """
    known = [key for key, job_type in STORE_TYPES.items() if job_type in STORES]
    named = [part.strip().lower() for part in text.split(",")]
    for name in named:
        if name not in (*known, _ALL):
            hint = nearest(name, [*known, _ALL])
            message = f"stores must be of {', '.join(known)}, or {_ALL}; got {name!r}{hint}"
            raise ConfigError(message)
    return check_stores([key for key in known if key in named or _ALL in named])


def check_stores(stores: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of stores if one of them takes tables.

    Raises:
        ConfigError: None does.
    """
    if not set(stores) & set(_TABLE_OPTIONS):
        message = f"stores must have one for tables, of {', '.join(_TABLE_OPTIONS)}; got {', '.join(stores)}"
        raise ConfigError(message)
    return tuple(stores)


def write_configs(
    out_dir: Path, port: int, stores: Sequence[str], sockets: Mapping[str, Path]
) -> tuple[Path, Path]:
    """Write the directories of TOMLs below ``out_dir``; return the aggregator's and the agent's.

    Args:
        stores: Their keys, as ``chosen_stores`` returns them.
        sockets: Where the servers of those stores listen that have one.
    """
    aggregator = {"aggregator.toml": _AGGREGATOR.format(port=port)}
    for key in stores:
        place = f"unix_socket = {_quoted(sockets[key])}\n" if key in sockets else ""
        job_type = f'daq_job_type = "{STORE_TYPES[key]}"\n'
        aggregator[_store_file(key)] = job_type + _STORE_OPTIONS.get(key, "") + place
    agent = {"agent.toml": _AGENT.format(port=port)}
    for job, text in _JOBS.items():
        agent[f"{job}.toml"] = text + "".join(
            f"\n[store_config.{key}]\n{_TABLE_OPTIONS[key].format(name=_NAMES.get(job, job))}"
            for key in stores
            if key in _TABLE_OPTIONS
        )
    if _WAVEFORMS in stores:
        agent["detector.toml"] += _WAVEFORM_OPTIONS
    thermometer = Path(__file__).with_name("demo_thermometer.py")
    agent["thermometer.py"] = thermometer.read_text(encoding="utf-8")
    directories = []
    for name, files in (("aggregator", aggregator), ("agent", agent)):
        directory = out_dir / ".demo" / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (directory / file).write_text(text, encoding="utf-8")
        directories.append(directory)
    for key in set(STORE_TYPES) - set(stores):
        (directories[0] / _store_file(key)).unlink(missing_ok=True)
    return directories[0], directories[1]


def _store_file(key: str) -> str:
    return f"store_{key}.toml"


def _quoted(path: Path) -> str:
    """Return a path as a TOML string, whose escapes are those of JSON."""
    return json.dumps(str(path), ensure_ascii=False)
