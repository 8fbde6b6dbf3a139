"""Which directory and name a stream's rows go to: never outside ``<out_dir>/<node>/``.

::

    <out_dir>/<node>/<parents>/<date>_<stem>.<n><suffix>         data.csv, 2026-05-01_data.2.csv.zst

Parent directories are made. A symbolic link below ``out_dir`` is never followed.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path, PurePosixPath

from edgedaq.errors import ConfigError
from edgedaq.names import check_name
from edgedaq.store_config import check_file_path

__all__ = ["PathRefusedError", "numbered", "resolve", "unused"]

_MARKS = re.compile(r"_marks(\.[a-z0-9]+)*\.csv\Z")


class PathRefusedError(Exception):
    """Rows cannot go where their stream asks; they go to ``_refused/`` instead."""


def resolve(out_dir: Path, node: str, file_path: str, *, is_ours: bool) -> tuple[Path, str, set[Path]]:
    """Return the directory, made if it was absent, and the name in it.

    Args:
        is_ours: The name was not asked for by a stream; only then may it be that of marks.

    Returns:
        Also the directories that got a new entry.

    Raises:
        PathRefusedError: It leads elsewhere.
        OSError: A directory cannot be made now.
    """
    try:
        parts = PurePosixPath(
            check_name("node", node), file_path if is_ours else check_file_path(file_path)
        ).parts
    except ConfigError as e:
        raise PathRefusedError(str(e)) from e
    if not is_ours and _MARKS.match(parts[-1]):
        message = f"{parts[-1]} is the name of a file of marks"
        raise PathRefusedError(message)
    directory = out_dir
    directory.mkdir(parents=True, exist_ok=True)
    changed: set[Path] = set()
    for part in parts[:-1]:
        parent, directory = directory, directory / part
        try:
            directory.mkdir()
            changed.add(parent)
        except FileExistsError:
            if directory.is_symlink() or not directory.is_dir():
                message = f"{directory} is not a directory of its own"
                raise PathRefusedError(message) from None
    return directory, parts[-1], changed


def numbered(base: str, number: int, suffix: str) -> str:
    """Return the n-th name of a file: ``data.csv``, ``data.2.csv``; ``suffix`` stays behind its own."""
    if number == 1:
        return base
    stem = base[: -len(suffix)] if suffix else base
    found = re.match(r"(.+)(\.[^.]+)\Z", stem)
    name = f"{found[1]}.{number}{found[2]}" if found else f"{stem}.{number}"
    return name + suffix


def unused(path: Path, suffix: str) -> Path:
    """Return the first of ``<path>.1<suffix>``, ``<path>.2<suffix>``, ... that is not there."""
    names = (path.with_name(f"{path.name}.{number}{suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
