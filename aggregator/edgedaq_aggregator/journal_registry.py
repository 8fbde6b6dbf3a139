"""Which stores the journal waits for, and how far each has come: ``stores.json`` beside the segments.

Only trimming depends on it, so a position in the file may be old, but a store must not be missing: a new one
is written durably before it is told where to begin. A file that cannot be read is set aside, and nothing is
trimmed until the stores had time to say again that they exist.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from edgedaq.errors import StoreError
from edgedaq.logsetup import get_logger
from edgedaq.storage import OsStorage, Storage, write_all

__all__ = ["StoreRegistry"]

_NAME = "stores.json"


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    stores: dict[str, int]


class StoreRegistry:
    """The registered stores of one journal; ``positions`` says up to where each is done.

    ``was_damaged`` tells that the file could not be read at start.
    """

    def __init__(self, directory: Path, *, storage: Storage | None = None) -> None:
        self.positions: dict[str, int] = {}
        self.was_damaged = False
        self._directory = directory
        self._storage: Storage = storage or OsStorage()
        self._log = get_logger(journal=str(directory))
        self._is_changed = False
        self._read()

    def add(self, store: str, position: int) -> None:
        """Register a store durably.

        Raises:
            StoreError: The file cannot be written: do not tell the store yet.
        """
        before = self.positions.get(store)
        self.positions[store] = position
        if before is None:
            try:
                self.save()
            except StoreError:
                del self.positions[store]
                raise
        elif before != position:
            self._is_changed = True

    def advance(self, store: str, position: int) -> None:
        """Take that a store is done up to a position; positions only grow."""
        if position > self.positions.get(store, position):
            self.positions[store] = position
            self._is_changed = True

    def forget(self, store: str) -> bool:
        """Wait no longer for a store; returns whether it was known.

        Raises:
            StoreError: The file cannot be written; it is forgotten until the next start.
        """
        if self.positions.pop(store, None) is None:
            return False
        self.save()
        return True

    def save_if_changed(self) -> None:
        """Write the file if a position has moved since; a failure is logged: only trimming waits."""
        if self._is_changed:
            try:
                self.save()
            except StoreError as e:
                self._log.warning("journal.registry_failed", reason=str(e))

    def save(self) -> None:
        """Write the file durably, replacing the old one in one step.

        Raises:
            StoreError: The disk does not take it.
        """
        path = self._directory / _NAME
        new = path.with_suffix(".new")
        data = msgspec.json.format(msgspec.json.encode(_Content(self.positions)), indent=1) + b"\n"
        try:
            fd = self._storage.open(new, write=True, create=True)
            try:
                self._storage.truncate(fd, 0)
                write_all(self._storage, fd, [data], 0)
                self._storage.fdatasync(fd)
            finally:
                self._storage.close(fd)
            self._storage.rename(new, path)
            self._storage.sync_directory(self._directory)
        except OSError as e:
            message = f"{path}: cannot be written: {e}"
            raise StoreError(message) from e
        self._is_changed = False

    def _read(self) -> None:
        path = self._directory / _NAME
        try:
            content = msgspec.json.decode(path.read_bytes(), type=_Content)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as e:
            self.was_damaged = True
            self._log.error("journal.registry_damaged", path=str(path), reason=str(e))
            with contextlib.suppress(OSError):
                self._storage.rename(path, path.with_suffix(".json.bad"))
            return
        self.positions = content.stores
