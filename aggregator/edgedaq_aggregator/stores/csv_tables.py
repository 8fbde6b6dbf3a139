"""Lines of CSV back to a table, with the types that the stream had: the inverse of what ``csv.py`` writes.

A column of which some value is not of its type (it was widened while the job ran) comes back as text.
"""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
from edgedaq.errors import StoreError, WireError
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.column_types import column_types
from edgedaq_aggregator.stores.ranges import Block

__all__ = ["parse_lines"]

_NO_JSON = re.compile(r"-?\b(nan|inf)\b")
_JSON = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def parse_lines(info: OpenInfo, block: Block, data: bytes) -> Any:
    """Return the rows of a block of a CSV file.

    Raises:
        StoreError: They are not lines of that table.
    """
    try:
        types = column_types(info)
        if block.file.endswith(".zst"):
            with pa.input_stream(io.BytesIO(data), compression="zstd") as stream:
                data = stream.read()
        return _typed(_texts(list(types), data, has_header=block.start == 0), types)
    except (pa.ArrowException, WireError, ValueError) as e:
        message = f"{block.file}: bytes {block.start} to {block.end} cannot be read as CSV: {e}"
        raise StoreError(message) from e


def _texts(names: list[str], data: bytes, *, has_header: bool) -> Any:
    read = pc.ReadOptions(column_names=names, skip_rows_after_names=int(has_header))
    parse = pc.ParseOptions(newlines_in_values=True, ignore_empty_lines=False)
    convert = pc.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return pc.read_csv(io.BytesIO(data), read, parse, convert)


def _typed(texts: Any, types: dict[str, Any]) -> Any:
    columns = []
    for column, kind in zip(texts.columns, types.values(), strict=True):
        try:
            columns.append(_column(column, kind))
        except (pa.ArrowException, ValueError, TypeError):
            columns.append(column)
    return pa.Table.from_arrays(columns, names=list(types))


def _column(column: Any, kind: Any) -> Any:
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        values = [None if text is None else bytes.fromhex(text) for text in column.to_pylist()]
        return pa.array(values, kind)
    if types.is_nested(kind):
        return pa.array([None if text is None else _json(text) for text in column.to_pylist()], kind)
    if types.is_timestamp(kind) and kind.tz is None:
        return column.cast(pa.timestamp(kind.unit, tz="UTC")).cast(kind)
    return column.cast(kind)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(_NO_JSON.sub(lambda found: _JSON[found[0]], text))
