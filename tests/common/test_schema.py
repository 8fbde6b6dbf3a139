from __future__ import annotations

import array
import datetime as dt
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgedaq.dtypes import DTYPES, dtype_of, dtype_text, parse_dtype, widen
from edgedaq.errors import JobError, WireError
from edgedaq.frame import Kind, decode, encode, pack_map, unpack_map
from edgedaq.schema import (
    MISFIT,
    Column,
    OpenInfo,
    Schema,
    decode_columns,
    decode_open,
    encode_columns,
    encode_open,
    pack_columns,
    pack_rows,
    row_packer,
    split_columns,
    to_columns,
    unpack_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SCALARS = Schema(tuple(Column(f"c{i}", dtype) for i, dtype in enumerate(DTYPES[:12])))
VALUES = {
    "bool": st.booleans(),
    **{f"i{n}": st.integers(-(2 ** (8 * n - 1)), 2 ** (8 * n - 1) - 1) for n in (1, 2, 4, 8)},
    **{f"u{n}": st.integers(0, 2 ** (8 * n) - 1) for n in (1, 2, 4, 8)},
    "f4": st.floats(width=32, allow_nan=False),
    "f8": st.floats(allow_nan=False),
    "timestamp": st.integers(-(2**63), 2**63 - 1),
    "utf8": st.text(max_size=10),
    "bytes": st.binary(max_size=10),
}
ANY_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=5),
    st.binary(max_size=5),
    st.datetimes(),
    st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=2)), max_size=4),
    st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.complex_numbers(),
)


def info_of(schema: Schema | None, **fields: object) -> OpenInfo:
    values = {
        "node": "n",
        "job": "j",
        "job_type": "T",
        "life": "0" * 16,
        "boot": "b",
        "topics": ("store.X",),
        "form": "table" if schema else "raw",
        "schema": schema,
        **fields,
    }
    return OpenInfo(**values)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(st.lists(st.tuples(*[VALUES[column.dtype] for column in SCALARS.columns]), max_size=5))
def test_packed_rows_come_back_as_they_were_put(rows):
    assert unpack_rows(SCALARS, pack_rows(SCALARS, rows)) == rows
    if rows:
        assert pack_columns(SCALARS, list(zip(*rows, strict=True))) == pack_rows(SCALARS, rows)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.none() | VALUES[dtype] for dtype in DTYPES]), min_size=1, max_size=5))
def test_columns_come_back_as_they_were_put_with_what_is_missing(rows):
    schema = Schema(tuple(Column(dtype, dtype) for dtype in DTYPES))
    columns, dtypes = decode_columns(schema, encode_columns(schema, to_columns(schema, rows)))
    assert dtypes == {}
    assert list(zip(*columns, strict=True)) == rows


@settings(max_examples=200)
@given(st.sampled_from([*DTYPES, "u2[2]", "f8[]", "bool[]"]), st.lists(ANY_VALUE, max_size=4))
def test_no_value_stops_an_experiment(text, values):
    dtype, shape = parse_dtype(text)
    schema = Schema((Column("x", dtype, shape),))
    columns, dtypes = decode_columns(schema, encode_columns(schema, [values]))
    assert [value is None for value in columns[0]] == [value is None for value in values]
    assert set(dtypes) <= {"x"}


@settings(max_examples=100)
@given(st.lists(ANY_VALUE, max_size=4))
def test_what_is_inferred_from_values_holds_them_without_widening(values):
    schema = Schema.infer(["x"], [[value] for value in values])
    _, dtypes = decode_columns(schema, encode_columns(schema, [values]))
    assert dtypes in ({}, {"x": "utf8"})  # what no number holds, e.g. 10 ** 400


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], "i8"),
        ([1, 2.5], "f8"),
        ([2**63, 1], "f8"),
        ([2**63], "u8"),
        ([None], "f8"),
        ([None, 3], "i8"),
        ([], "f8"),
        ([True], "bool"),
        ([True, 3], "i8"),
        ([1, "x"], "utf8"),
        ([b"x"], "bytes"),
        ([b"x", "x"], "utf8"),
        ([[1, 2], [3]], "i8[]"),
        ([[1, 2.5]], "f8[]"),
        ([array.array("H", [1])], "u2[]"),
        ([np.zeros(4, "<u2")], "u2[]"),
        ([np.zeros((2, 3), "f4")], "f4[2,3]"),
        ([np.float32(1)], "f8"),
        ([np.int16(1)], "i8"),
        ([dt.datetime(2026, 5, 1, tzinfo=dt.UTC)], "timestamp"),
        ([{"a": 1}], "utf8"),
    ],
)
def test_a_column_gets_the_dtype_of_what_is_put_first(values, expected):
    assert Schema.infer(["x"], [[value] for value in values]).columns[0].text == expected


@given(st.sampled_from([*DTYPES, "u2[4]", "i8[]"]), st.sampled_from([*DTYPES, "u2[4]", "f8[]"]))
def test_widening_is_symmetric_and_keeps_what_it_has(a, b):
    assert widen(a, b) == widen(b, a)
    assert widen(a, a) == a
    assert widen(widen(a, b), a) == widen(a, b)
    parse_dtype(widen(a, b))


def test_whole_numbers_widen_to_whole_numbers_as_long_as_there_are_any():
    assert widen("u1", "i1") == "i2"
    assert widen("u4", "i8") == "i8"
    assert widen("u8", "i1") == "f8"
    assert widen("i2", "f4") == "f4"
    assert widen("i4", "f4") == "f8"
    assert widen("timestamp", "i8") == "i8"
    assert widen("u2[4]", "u2[5]") == "u2[]"
    assert widen("u2[4]", "u2") == "utf8"


def test_rows_of_scalars_pack_by_one_struct():
    schema = Schema((Column("a", "i8"), Column("b", "f4"), Column("c", "u1")))
    assert schema.row_format == "<qfB"
    assert schema.row_struct is not None
    assert schema.row_struct.pack(1, 2.0, 3) == pack_rows(schema, [(1, 2.0, 3)])
    for row in ((1.5, 2.0, 3), (1, "x", 3), (1, 2.0, None), (1, 2.0, 300), (1, 1e300, 3), (1, 2.0)):
        with pytest.raises(MISFIT):
            schema.row_struct.pack(*row)


@pytest.mark.parametrize("value", [3, None, "no", [], 0.5])
def test_a_boolean_column_does_not_take_the_truth_of_anything_else(value):
    schema = Schema((Column("a", "bool"),))
    assert schema.row_struct is None
    with pytest.raises(MISFIT):
        pack_rows(schema, [[value]])


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3, 4],
        (1, 2, 3, 4),
        array.array("H", [1, 2, 3, 4]),
        array.array("q", [1, 2, 3, 4]),
        np.array([1, 2, 3, 4], "<u2"),
        np.array([1, 2, 3, 4], ">i4"),
        np.arange(1, 9, dtype="<u2")[:4],
        np.array([1, 9, 2, 9, 3, 9, 4, 9], "<u2")[::2],
        struct.pack("<4H", 1, 2, 3, 4),
        bytearray(struct.pack("<4H", 1, 2, 3, 4)),
        memoryview(struct.pack("<4H", 1, 2, 3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_are_taken_in_every_form(value):
    fixed = Schema((Column("n", "i8"), Column("w", "u2", (4,)), Column("ok", "bool")))
    assert unpack_rows(fixed, pack_rows(fixed, [(7, value, True)])) == [(7, [1, 2, 3, 4], True)]
    ragged = Schema((Column("w", "u2", (-1,)),))
    assert decode_columns(ragged, encode_columns(ragged, [[value]])) == ([[[1, 2, 3, 4]]], {})


def test_arrays_of_several_dimensions_keep_their_shape():
    schema = Schema((Column("w", "i4", (2, 3)),))
    rows = [([[1, 2, 3], [4, 5, 6]],), (np.arange(6, dtype="i4").reshape(2, 3),), (list(range(6)),)]
    expected = [([[1, 2, 3], [4, 5, 6]],), ([[0, 1, 2], [3, 4, 5]],), ([[0, 1, 2], [3, 4, 5]],)]
    assert unpack_rows(schema, pack_rows(schema, rows)) == expected


@pytest.mark.parametrize(
    "value", [[1, 2, 3], [[1, 2], [3, 4]], [1, 2, 3, 70000], [1, 2, 3, "x"], b"odd", 5, None]
)
def test_an_array_that_does_not_fit_is_a_misfit_and_columns_hold_it(value):
    schema = Schema((Column("w", "u2", (4,)),))
    with pytest.raises(MISFIT):
        pack_rows(schema, [[value]])
    columns, _ = decode_columns(schema, encode_columns(schema, [[value]]))
    assert (columns[0][0] is None) == (value is None)


def test_a_row_that_fits_partly_leaves_the_row_before_it_whole():
    schema = Schema((Column("n", "i8"), Column("w", "u2", (2,))))
    buffer = bytearray(2 * schema.row_bytes)
    pack = row_packer(schema)
    pack(buffer, 0, (1, [2, 3]))
    with pytest.raises(MISFIT):
        pack(buffer, schema.row_bytes, (1, [2]))
    assert unpack_rows(schema, bytes(buffer[: schema.row_bytes])) == [(1, [2, 3])]


def test_a_missing_or_widening_value_keeps_the_others_as_they_are():
    schema = Schema((Column("a", "i8"), Column("b", "f8")))
    columns, dtypes = decode_columns(schema, encode_columns(schema, [[1, None, 2.5], [1, 2, "x"]]))
    assert columns == [[1.0, None, 2.5], ["1", "2", "x"]]
    assert dtypes == {"a": "f8", "b": "utf8"}


def test_times_without_a_zone_are_local_and_those_with_one_are_converted():
    zone = dt.timezone(dt.timedelta(hours=2))
    schema = Schema((Column("t", "timestamp"),))
    local = dt.datetime(2026, 5, 1, 12, 0, 0, 5)  # noqa: DTZ001 -- what users put
    values = [dt.datetime(2026, 5, 1, 14, 0, 0, 5, tzinfo=zone), local]
    columns, dtypes = decode_columns(schema, encode_columns(schema, [values]))
    assert dtypes == {}
    assert columns[0][0] == int(dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC).timestamp()) * 10**9 + 5000
    assert columns[0][1] == int(local.replace(microsecond=0).timestamp()) * 10**9 + 5000


def test_missing_elements_of_an_array_of_floats_are_nan():
    schema = Schema((Column("w", "f8", (-1,)),))
    columns, _ = decode_columns(schema, encode_columns(schema, [[[1.0, None]]]))
    assert columns[0][0][0] == 1.0
    assert math.isnan(columns[0][0][1])


def test_columns_that_are_too_large_are_split_by_rows():
    schema = Schema((Column("s", "utf8"), Column("n", "i8")))
    columns: list[list[object]] = [["x" * (index % 90) for index in range(1000)], list(range(1000))]
    parts = split_columns(schema, columns, 4000)
    assert all(len(body) <= 4000 for body, _ in parts)
    assert sum(rows for _, rows in parts) == 1000
    back = [decode_columns(schema, body)[0] for body, _ in parts]
    assert [value for part in back for value in part[1]] == columns[1]
    assert [value for part in back for value in part[0]] == columns[0]
    with pytest.raises(JobError, match="one row must have at most 4000 bytes"):
        split_columns(schema, [["x" * 5000], [1]], 4000)


@pytest.mark.parametrize(
    "columns",
    [
        (),
        (Column("a", "i8"), Column("a", "f8")),
        (Column("a", "f8", (600_000,)),),
        (Column("a", "f8", (262_144,)), Column("b", "f8", (262_144,))),
    ],
)
def test_a_schema_that_cannot_be_is_refused(columns):
    with pytest.raises(JobError):
        Schema(columns)


@pytest.mark.parametrize(
    "column",
    [
        ("", "i8", ()),
        ("a\nb", "i8", ()),
        ("x" * 257, "i8", ()),
        ("a", "i16", ()),
        ("a", "utf8", (3,)),
        ("a", "i8", (0,)),
        ("a", "i8", (-1, 2)),
        ("\ud800", "i8", ()),
    ],
)
def test_a_column_that_cannot_be_is_refused(column):
    with pytest.raises(JobError):
        Column(*column)


def test_a_schema_survives_its_map_and_hostile_maps_are_wire_errors():
    schema = Schema((Column("a", "i8", (), "mV"), Column("b", "u2", (4, 2)), Column("c", "f8", (-1,))))
    assert Schema.from_map(schema.to_map()) == schema
    assert hash(Schema.from_map(schema.to_map())) == hash(schema)
    hostile: list[object] = [
        None,
        {},
        {"columns": []},
        {"columns": [{"name": "a", "dtype": "x"}]},
        {"columns": [{"name": 1}]},
    ]
    for bad in hostile:
        with pytest.raises(WireError):
            Schema.from_map(bad)


def test_open_comes_back_as_it_was():
    info = info_of(SCALARS, tag="channel µ", store_config={"csv": {"file_path": "x"}}, arrow_schema=b"\0\xff")
    assert decode_open(decode(memoryview(encode_open(7, info)))) == info


@pytest.mark.parametrize(
    "fields",
    [
        {"node": "../up"},
        {"node": "ALL"},
        {"job": ""},
        {"job": "a/b"},
        {"topics": ("a..b",)},
        {"topics": ("t",) * 17},
        {"life": "x"},
        {"life": "0" * 15 + "\n"},
        {"tag": "a\nb"},
        {"tag": "x" * 257},
        {"boot": "\0"},
        {"form": "raw"},
        {"form": "other"},
        {"schema": None},
        {"t_open_ns": 2**63},
        {"store_config": []},
        {"versions": {"a": 1}},
    ],
)
def test_an_open_that_is_not_valid_is_a_wire_error(fields):
    body = unpack_map(decode(memoryview(encode_open(7, info_of(SCALARS)))).body)
    frame = decode(memoryview(encode(Kind.OPEN, 7, 0, pack_map({**body, **fields}))))
    with pytest.raises(WireError):
        decode_open(frame)


def test_keys_of_a_newer_version_are_passed_over():
    body = unpack_map(decode(memoryview(encode_open(7, info_of(SCALARS)))).body)
    frame = decode(memoryview(encode(Kind.OPEN, 7, 0, pack_map({**body, "newer": [1]}))))
    assert decode_open(frame) == info_of(SCALARS)


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_columns_are_wire_errors(data):
    schema = Schema((Column("a", "i8"), Column("w", "u2", (2,))))
    with pytest.raises(WireError):
        decode_columns(schema, data)


@pytest.mark.parametrize(
    "body",
    [
        {"columns": [[1], [b"\0" * 4]]},
        {"columns": [[1]], "dtypes": {}},
        {"columns": [[1], [b"\0" * 4, None]], "dtypes": {}},
        {"columns": [[1.5], [b"\0" * 4]], "dtypes": {}},
        {"columns": [[True], [b"\0" * 4]], "dtypes": {}},
        {"columns": [[1], [b"\0" * 3]], "dtypes": {}},
        {"columns": [[1], [[1, 2]]], "dtypes": {}},
        {"columns": [[300], [b"\0" * 4]], "dtypes": {"a": "u1"}},
        {"columns": [[1], [b"\0" * 4]], "dtypes": {"b": "u1"}},
        {"columns": [[1], [b"\0" * 4]], "dtypes": {"a": "u99"}},
        {"columns": [[1], [b"\0" * 4]], "dtypes": {"a": 5}},
        {"columns": [[1], [b"\0" * 4]], "dtypes": {"w": "f8[99999999]"}},
        {"columns": [[1], [b"\2\0"]], "dtypes": {"w": "bool[2]"}},
        {"columns": "ab", "dtypes": {}},
    ],
)
def test_columns_that_are_not_what_open_says_are_wire_errors(body):
    schema = Schema((Column("a", "i8"), Column("w", "u2", (2,))))
    with pytest.raises(WireError):
        decode_columns(schema, pack_map(body))


def test_every_cut_of_a_columns_body_is_a_wire_error():
    schema = Schema((Column("a", "i8"), Column("s", "utf8")))
    body = encode_columns(schema, [[1, None], ["x", "y"]])
    for end in range(len(body)):
        with pytest.raises(WireError):
            decode_columns(schema, body[:end])


def test_dtype_texts_are_what_they_say():
    for text in ("i8", "u2[1024]", "i4[16,4]", "f8[]", "utf8"):
        assert dtype_text(*parse_dtype(text)) == text
    for text in ("", "i16", "u2[0]", "u2[-1]", "utf8[]", "u2[1,]", "u2[1024", "u2[1]\n"):
        with pytest.raises(ValueError):
            parse_dtype(text)
    assert dtype_of([]) == "f8[]"


def test_an_agent_needs_neither_numpy_nor_pyarrow():
    code = (
        "import sys; sys.modules['numpy'] = sys.modules['pyarrow'] = None\n"
        "from edgedaq.schema import *\nfrom edgedaq.batch import frame_columns\n"
        "s = Schema.infer(['a', 'b'], [[1, [1.5, 2]]])\n"
        "print(decode_columns(s, encode_columns(s, [[1, None], [[1.5], [2]]])))"
    )
    root = Path(__file__).parents[2] / "common"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "([[1, None], [[1.5], [2.0]]], {})"
