"""Putting away what a store has: its records, and for a file store its files.

::

    <out_dir>/<node>/data.csv        ──►  data.csv.1.old        where nobody writes to it, or adopts it
    <state_dir>/stores/<store>/      ──►  <state_dir>/put_away/<store>.1/

The records go last: an end in between leaves a store whose files were moved away.
"""

from __future__ import annotations

from pathlib import Path

from edgedaq.errors import StoreError
from edgedaq.storage import OsStorage

from edgedaq_aggregator.stores.commits import read_commits
from edgedaq_aggregator.stores.file_names import unused
from edgedaq_aggregator.stores.reader import StorePlace
from edgedaq_aggregator.stores.undo_log import UndoLog

__all__ = ["put_away", "put_files_away"]


def put_files_away(place: StorePlace) -> list[Path]:
    """Put away the files of a store and its records; return where the files are now.

    Raises:
        StoreError: The store runs, or something cannot be renamed.
    """
    return _put_away(place, has_files=True)


def put_away(place: StorePlace) -> None:
    """Put away the records of a store; its data stays where it is.

    Raises:
        StoreError: The store runs, or they cannot be renamed.
    """
    _put_away(place, has_files=False)


def _put_away(place: StorePlace, *, has_files: bool) -> list[Path]:
    storage = OsStorage()
    if not place.state_dir.is_dir():
        return []
    try:
        lock = storage.lock(place.state_dir / "lock")
    except BlockingIOError as e:
        message = f"{place.name}: the store runs; stop it first"
        raise StoreError(message) from e
    moved: list[Path] = []
    try:
        committed, damage = read_commits(place.state_dir, storage)
        if not damage:
            UndoLog(place.state_dir, storage, committed.files).restore(place.out_dir)
        for name in committed.files if has_files else ():
            path = place.out_dir / name
            if path.is_file() and not path.is_symlink():
                target = unused(path, ".old")
                storage.rename(path, target)
                storage.sync_directory(path.parent)
                moved.append(target)
        old = place.state_dir.parents[1] / "put_away"
        old.mkdir(exist_ok=True)
        storage.rename(place.state_dir, unused(old / place.name, ""))
        storage.sync_directory(old)
        storage.sync_directory(place.state_dir.parent)
    except OSError as e:
        message = f"{place.name}: cannot be put away: {e}"
        raise StoreError(message) from e
    finally:
        storage.close(lock)
    return moved
