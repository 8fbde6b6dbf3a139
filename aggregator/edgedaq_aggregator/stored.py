"""Which stores an aggregator has, found in its directories, and what reads each of them.

Of stores that keep their commits in ``commits.log`` the state directory tells everything. Of others only
their TOML tells where their data is; they are found where the directory of TOMLs is given.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from edgedaq.config_dir import JobFile
from edgedaq.errors import ConfigError, StoreError
from edgedaq.storage import OsStorage
from edgedaq.store_config import STORE_TYPES

from edgedaq_aggregator import app
from edgedaq_aggregator.config import FILE_NAME
from edgedaq_aggregator.stores import READERS
from edgedaq_aggregator.stores.commits import LOG_NAME, read_commits
from edgedaq_aggregator.stores.reader import StorePlace, StoreReader

__all__ = ["Stored", "find_stored"]

_KEYS = {job_type: key for key, job_type in STORE_TYPES.items()}


class Stored(NamedTuple):
    """An aggregator's stores: by name, the key in ``store_config`` and a reader; or why there is none."""

    state_dir: Path
    out_dir: Path
    readers: dict[str, tuple[str, StoreReader]]
    silent: dict[str, str]


def find_stored(path: Path) -> Stored:
    """Return the stores of a directory of TOMLs, or of an ``out_dir`` that has its state within.

    Raises:
        ConfigError: It is neither.
    """
    if (path / FILE_NAME).exists() or (not (path / ".state").is_dir() and any(path.glob("*.toml"))):
        place = (aggregator := app.load(path)).place
        files = [file for file in aggregator.files if file.is_store]
        return _find(place.state_dir, place.out_dir, files)
    if not (path / ".state").is_dir():
        message = f"{path}: is neither a directory of TOML files nor an out_dir (it has no .state)"
        raise ConfigError(message)
    return _find(path / ".state", path, ())


def _find(state_dir: Path, out_dir: Path, files: Iterable[JobFile]) -> Stored:
    found = Stored(state_dir, out_dir, {}, {})
    configs = {file.unique_id: file for file in files}
    own = state_dir / "stores"
    names = {path.parent.name for path in own.glob(f"*/{LOG_NAME}")} | set(configs)
    for name in sorted(names):
        file = configs.get(name)
        has_log = (own / name / LOG_NAME).exists()
        key = read_commits(own / name, OsStorage())[0].store if has_log else ""
        key = key or (_KEYS.get(file.job_type, "") if file is not None else "")
        target = READERS.get(key)
        if target is None:
            found.silent[name] = f"a store of {key or 'this type'} cannot be asked what it has"
            continue
        if file is None and not has_log:
            continue
        module, _, make = target.partition(":")
        place = StorePlace(name, own / name, out_dir, file.config if file is not None else None)
        try:
            found.readers[name] = key, getattr(importlib.import_module(module), make)(place)
        except (StoreError, OSError, ImportError) as e:
            found.silent[name] = f"cannot be read: {e}"
    return found
