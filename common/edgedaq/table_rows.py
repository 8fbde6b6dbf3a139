"""Tables of columns as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedaq.errors import JobError

__all__ = ["columns_to_rows"]


def columns_to_rows(
    names: Sequence[str], columns: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]]
) -> list[tuple[Any, ...]]:
    """Return the rows of a table given by columns; numpy columns become Python numbers first.

    Raises:
        JobError: The columns are not these, or not equally long.
    """
    if isinstance(columns, Mapping):
        if set(columns) != set(names):
            message = f"a table must have the columns {', '.join(names)}, got {', '.join(map(str, columns))}"
            raise JobError(message)
        held = [columns[name] for name in names]
    else:
        held = list(columns)
    held = [
        column.tolist() if hasattr(column, "tolist") and getattr(column, "ndim", 1) == 1 else column
        for column in held
    ]
    if len(held) != len(names) or len({len(column) for column in held}) > 1:
        lengths = [len(column) for column in held]
        message = f"a table needs {len(names)} columns, equally long, got lengths {lengths}"
        raise JobError(message)
    return list(zip(*held, strict=True))
