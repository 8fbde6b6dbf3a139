"""Tables of columns as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedaq.errors import JobError

__all__ = ["check_row", "columns_to_rows"]


def check_row(job: str, row: Any) -> None:
    """Refuse what is no row: one value alone, or what would be taken for the values in it.

    Raises:
        JobError: It is not a sequence of values.
    """
    if isinstance(row, Mapping | str | bytes) or not hasattr(row, "__iter__"):
        message = (
            f"job {job}: rows must be a list of rows, each a list of values, "
            f"got a {type(row).__name__} as a row"
        )
        raise JobError(message)


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
