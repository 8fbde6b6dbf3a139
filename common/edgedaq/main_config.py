"""What ``agent.toml`` and ``aggregator.toml`` have in common: directories, limits on a disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from xxhash import xxh3_64_hexdigest

from edgedaq.errors import ConfigError
from edgedaq.runtime_dir import check_runtime_dir, default_runtime_dir
from edgedaq.typed_toml import build, read_toml
from edgedaq.units import format_bytes

__all__ = [
    "check_directory",
    "default_state_dir",
    "fit_on_disk",
    "make_directory",
    "place_of",
    "read_main",
    "resolve_dir",
    "resolve_runtime_dir",
    "service_state_dir",
    "version",
]

M = TypeVar("M", bound=msgspec.Struct)
GIB = 1 << 30


def read_main(cls: type[M], path: Path) -> M:
    """Return what a main file says; all defaults where it does not exist.

    Raises:
        ConfigError: One line for each problem.
    """
    raw: dict[str, Any] = read_toml(path) if path.exists() else {}
    return build(cls, raw, str(path))


def resolve_dir(given: str, config_dir: Path, default: Path) -> Path:
    """Return a directory that a main file names: relative ones begin at that file's own directory."""
    return (config_dir / given).resolve() if given else default.resolve()


def resolve_runtime_dir(given: str, config_dir: Path, role: str, where: Path) -> Path:
    """Return the runtime directory of a supervisor; it need not exist.

    Raises:
        ConfigError: Its path is too long.
    """
    try:
        place = place_of(config_dir)
        is_told = bool(os.environ.get("RUNTIME_DIRECTORY"))
        default = default_runtime_dir(config_dir, role)
        if place is not None and not is_told:
            default = Path("/run") / place
        return check_runtime_dir(resolve_dir(given, config_dir, default))
    except ConfigError as e:
        message = f"{where}: {e}"
        raise ConfigError(message) from e


def place_of(config_dir: Path) -> str | None:
    """Return what the directories of a service are called: ``X`` for ``/etc/X``, ``X-Y`` for ``/etc/X/Y``.

    None for a directory elsewhere, which is a person's and not a service's.
    """
    parts = config_dir.resolve().parts
    return "-".join(parts[2:]) if parts[:2] == ("/", "etc") and len(parts) in (3, 4) else None


def service_state_dir(config_dir: Path) -> Path | None:
    """Return the state directory that systemd makes for the service of this directory, if it is one's."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    place = place_of(config_dir)
    return None if place is None else Path("/var/lib") / place


def default_state_dir(config_dir: Path, node: str) -> Path:
    """Return where a node's state is kept if no file says so: the service's directory, or this user's."""
    given = service_state_dir(config_dir)
    if given:
        return given
    base = os.environ.get("XDG_STATE_HOME", "")
    home = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    digits = xxh3_64_hexdigest(str(config_dir.resolve()).encode("utf-8", "surrogateescape"))[:8]
    return home / "edgedaq" / f"{node}-{digits}"


def check_directory(where: Path, key: str, path: Path) -> None:
    """Return if the directory exists and can be written to, or could be made. Makes nothing.

    Raises:
        ConfigError: It could not; the message names file and key.
    """
    present = path
    while not os.path.lexists(present) and present != present.parent:
        present = present.parent
    if not present.is_dir():
        message = f"{where}: {key} must be a directory, {str(present)!r} is not one, got {str(path)!r}"
    elif not os.access(present, os.W_OK | os.X_OK):
        message = f"{where}: {key} must be writable, {str(present)!r} is not, got {str(path)!r}"
    else:
        return
    raise ConfigError(message)


def make_directory(where: Path, key: str, path: Path, mode: int = 0o750) -> None:
    """Make a directory, and those above it.

    Raises:
        ConfigError: It cannot be made, or cannot be written to.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as e:
        message = f"{where}: {key} cannot be made: {e.strerror}, got {str(path)!r}"
        raise ConfigError(message) from e
    check_directory(where, key, path)


def version() -> str:
    """Return the version of EdgeDAQ; that of a tree which was never installed is not known."""
    try:
        return importlib.metadata.version("edgedaq")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0+tree"


def fit_on_disk(
    where: Path, key: str, limit: int | None, reserve: int | None, directory: Path, *, usual: int
) -> tuple[int, int]:
    """Return ``(limit, reserve)`` in bytes for files in a directory, which need not exist.

    Args:
        limit: What the file says; if nothing, ``usual``, but at most half of the disk.
        reserve: What the file says; if nothing, 1 GiB, but at most a tenth of the disk.

    Raises:
        ConfigError: What the file says does not fit on that disk.
    """
    present = directory
    while not present.exists() and present != present.parent:
        present = present.parent
    total = shutil.disk_usage(present).total
    kept = min(GIB, total // 10) if reserve is None else reserve
    if limit is None:
        return max(min(usual, total // 2), 1), kept
    if limit + kept > total:
        message = (
            f"{where}: {key}.limit and {key}.reserve must fit on the disk of {present}, which has "
            f"{format_bytes(total)}, got {format_bytes(limit)} and {format_bytes(kept)}"
        )
        raise ConfigError(message)
    return limit, kept
