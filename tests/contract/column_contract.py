"""What stores of tables promise: each value is read back as it was put, or as the store's page says.

Values are compared in one plain form: whole numbers, floats, booleans, text and bytes as Python has them, a
timestamp as UTC ns, an array as nested lists, a missing value as None.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from edgedaq.batch import arrow_body, arrow_schema_bytes
from edgedaq.dtypes import INT_RANGES
from edgedaq.frame import Kind
from edgedaq.schema import Column, Schema

from tests.contract.store_contract import StoreContract
from tests.contract.store_feed import T0_NS, Feed

__all__ = ["ColumnStoreContract", "arrow_values"]

SCALARS = Schema(
    (
        *(Column(name, name) for name in INT_RANGES if name != "timestamp"),
        Column("f4", "f4"),
        Column("f8", "f8"),
        Column("ok", "bool"),
        Column("t", "timestamp"),
    )
)
TEXTS = Schema((Column("n", "i8"), Column("s", "utf8"), Column("y", "bytes")))
ARRAYS = Schema(
    (
        Column("n", "i8"),
        Column("w", "u2", (3,)),
        Column("m", "i4", (2, 2)),
        Column("ok", "bool", (2,)),
        Column("r", "f8", (-1,)),
        Column("q", "i2", (-1,)),
    )
)
HOSTILE_COLUMNS = [
    "a,b",
    '"quoted"',
    "'; DROP TABLE data; --",
    "select",
    "µ ☢",
    " ",
    "%s",
    "`x`",
    "A",
    "rowid",
]


class ColumnStoreContract(StoreContract):
    """Inherit it, and fill in what is marked."""

    def read_columns(self, base: Path, name: str, schema: Schema) -> dict[str, list[Any]]:
        """Return the columns that went where ``config(name)`` says, in plain form.

        Args:
            schema: Of what was put, for stores whose data does not tell it.
        """
        raise NotImplementedError

    def stored(self, column: Column, value: Any) -> Any:  # noqa: ARG002 -- the default changes nothing
        """Return what this store is documented to make of a value."""
        return value

    def stored_name(self, name: str) -> str:
        """Return what this store is documented to call a column."""
        return name

    def other(self, name: str) -> str:
        """Return where rows go that are to go to ``name``, but have other columns than those there."""
        raise NotImplementedError

    def check(self, base: Path, name: str, schema: Schema, rows: list[Any]) -> None:
        """Check that the rows are stored, and nothing else."""
        expected = {
            self.stored_name(column.name): [_plain(self.stored(column, row[index])) for row in rows]
            for index, column in enumerate(schema.columns)
        }
        found = self.read_columns(base, name, schema)
        assert {key: [_plain(value) for value in values] for key, values in found.items()} == expected

    @pytest.mark.parametrize("is_general", [False, True])
    def test_every_number_is_read_back_up_to_its_limits(self, tmp_path, is_general):
        limits = [INT_RANGES[column.dtype] for column in SCALARS.columns[:-4]]
        rows = [
            [*(low for low, _ in limits), -0.5, 0.1 + 0.2, True, T0_NS + 1],
            [*(high for _, high in limits), 65504.0, 1e-310, False, 0],
            [*(1 for _ in limits), math.inf, -math.inf, False, -1],
            [*(0 for _ in limits), math.nan, math.nan, True, T0_NS + 123_000_000],
        ]
        feed = Feed()
        feed.open(1, self.config(), schema=SCALARS)
        feed.rows(1, rows, general=is_general)
        self.feed_all(tmp_path, feed)
        self.check(tmp_path, "data.dat", SCALARS, rows)

    def test_texts_and_bytes_are_read_back(self, tmp_path):
        texts = [
            "",
            "plain",
            'a "b", c',
            "line\nbreak\r\n",
            "µ ☢ 😀",
            "null",
            "0012",
            "\\N",
            "a\0b",
            " x ",
            "'",
        ]
        rows = [[index, text, text.encode()] for index, text in enumerate(texts)]
        rows.append([99, "x" * 100_000, bytes(range(256)) * 40])
        feed = Feed()
        feed.open(1, self.config(), schema=TEXTS)
        feed.rows(1, rows)
        self.feed_all(tmp_path, feed)
        self.check(tmp_path, "data.dat", TEXTS, rows)

    def test_missing_values_of_every_dtype_are_read_back(self, tmp_path):
        feed = Feed()
        schemas = {"a.dat": SCALARS, "b.dat": TEXTS, "c.dat": ARRAYS}
        for stream, (name, schema) in enumerate(schemas.items(), 1):
            feed.open(stream, self.config(name), schema=schema)
        rows: dict[str, list[list[Any]]] = {
            "a.dat": [[None] * 12, [*[5] * 8, 0.5, 0.5, True, T0_NS], [None] * 12],
            "b.dat": [[None, None, b"x"], [1, "", None], [None, "x", b""]],
            "c.dat": [[None] * 6, [1, [1, 2, 3], [[1, 2], [3, 4]], [True, False], [], [1]], [None] * 6],
        }
        for stream, name in enumerate(schemas, 1):
            feed.rows(stream, rows[name], general=True)
        self.feed_all(tmp_path, feed)
        for name, schema in schemas.items():
            self.check(tmp_path, name, schema, rows[name])

    def test_fixed_and_ragged_arrays_are_read_back(self, tmp_path):
        rows = [
            [
                index,
                [index, 2, 65535],
                [[-1, index], [2**31 - 1, -(2**31)]],
                [index % 2 == 0, True],
                [0.1, math.inf, -0.0][: index % 4],
                list(range(-index, index)),
            ]
            for index in range(50)
        ]
        feed = Feed()
        feed.open(1, self.config(), schema=ARRAYS)
        feed.rows(1, rows[:30])
        feed.rows(1, rows[30:])
        self.feed_all(tmp_path, feed, per_commit=2)
        self.check(tmp_path, "data.dat", ARRAYS, rows)

    def test_packed_arrays_are_read_back(self, tmp_path):
        schema = Schema((Column("n", "i8"), Column("w", "u2", (4,)), Column("m", "f4", (2, 2))))
        rows = [[n, [n, 1, 2, 65535], [[0.5, float(n)], [1.5, -2.0]]] for n in range(200)]
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, rows)
        self.feed_all(tmp_path, feed)
        self.check(tmp_path, "data.dat", schema, rows)

    def test_arrow_batches_are_read_back(self, tmp_path):
        schema = Schema((Column("i", "i4"), Column("x", "f8"), Column("s", "utf8"), Column("l", "i8", (-1,))))
        rows = [[1, 0.5, "µ,", [1, 2]], [None, None, None, None], [3, -1.5, "", []]]
        columns = list(zip(*rows, strict=True))
        types = [pa.int32(), pa.float64(), pa.string(), pa.list_(pa.int64())]
        batch = pa.record_batch(
            [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)], list(schema.names)
        )
        feed = Feed()
        feed.open(1, self.config(), schema=None, arrow_schema=arrow_schema_bytes(batch.schema))
        for _ in range(2):
            body = bytes(memoryview(arrow_body(batch)))
            feed.put(Kind.ARROW, 1, body, rows=3, t_first_ns=T0_NS)
        self.feed_all(tmp_path, feed)
        self.check(tmp_path, "data.dat", schema, rows * 2)

    def test_columns_of_any_name_are_stored_under_it(self, tmp_path):
        schema = Schema(tuple(Column(name, "i8") for name in HOSTILE_COLUMNS))
        rows = [[10 * row + index for index in range(len(HOSTILE_COLUMNS))] for row in range(3)]
        feed = Feed()
        feed.open(1, self.config(), schema=schema)
        feed.rows(1, rows)
        self.feed_all(tmp_path, feed)
        feed.rows(1, rows)
        self.feed_all(tmp_path, feed)
        self.check(tmp_path, "data.dat", schema, rows * 2)

    def test_rows_with_other_columns_go_elsewhere_and_come_back_to_their_own(self, tmp_path):
        schema = Schema((Column("sequence", "i8"), Column("other", "utf8")))
        feed = Feed()
        feed.open(1, self.config())
        feed.open(2, self.config(), schema=schema)
        feed.open(3, self.config())
        expected = feed.pairs(1, 0, 3)
        feed.rows(2, [[5, "x"]])
        expected += feed.pairs(1, 3, 1)
        self.feed_all(tmp_path, feed)
        expected += feed.pairs(3, 4, 3)
        feed.rows(2, [[6, "y"]])
        self.feed_all(tmp_path, feed)
        assert self.read_pairs(tmp_path, "data.dat") == expected
        self.check(tmp_path, self.other("data.dat"), schema, [[5, "x"], [6, "y"]])

    def test_a_column_that_widens_while_the_job_runs_loses_no_row(self, tmp_path):
        numbers = Schema((Column("sequence", "i8"), Column("value", "i8")))
        texts = Schema((Column("sequence", "i8"), Column("value", "utf8")))
        feed = Feed()
        feed.open(1, self.config(), schema=numbers)
        feed.rows(1, [[0, 7]])
        feed.rows(1, [[1, "off"], [2, None]], general=True)
        feed.rows(1, [[3, 8]])
        self.feed_all(tmp_path, feed)
        found: list[tuple[Any, Any]] = []
        for name in ("data.dat", self.other("data.dat")):
            try:
                columns = self.read_columns(tmp_path, name, texts)
            except LookupError:  # nothing went there
                continue
            found += zip(columns["sequence"], columns["value"], strict=True)
        missing = self.stored(texts.columns[1], None)
        assert [(n, str(v) if v is not None else v) for n, v in sorted(found)] == [
            (0, "7"),
            (1, "off"),
            (2, missing),
            (3, "8"),
        ]


def arrow_values(column: Any) -> list[Any]:
    """Return an Arrow column in plain form."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("ns")).cast(pa.int64())
    values: list[Any] = column.to_pylist()
    return values


def _plain(value: Any) -> Any:
    """Return a value that equals another one if it is the same, sign and nan included."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else (value, math.copysign(1, value))
    return value
