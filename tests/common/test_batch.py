from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from edgedaq.batch import (
    BatchDecoder,
    arrow_body,
    arrow_schema_bytes,
    event_of,
    frame_columns,
    raw_body,
    raw_messages,
    to_arrow,
)
from edgedaq.errors import WireError
from edgedaq.frame import FLAG_CONTINUES, FLAG_PIECE, Frame, Kind, decode, encode, pack_map
from edgedaq.schema import Column, OpenInfo, Schema, encode_columns, pack_rows, to_columns
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")
PACKED = Schema(
    (
        *(Column(dtype, dtype) for dtype in NUMBERS),
        Column("ok", "bool"),
        Column("t", "timestamp"),
        Column("w", "u2", (3,)),
        Column("m", "i4", (2, 2)),
        Column("bits", "bool", (2,)),
    )
)
GENERAL = Schema(
    (
        *PACKED.columns,
        Column("s", "utf8"),
        Column("y", "bytes"),
        Column("r", "f8", (-1,)),
        Column("q", "i8", (-1,)),
    )
)


def info_of(schema: Schema | None = None, arrow_schema: bytes = b"") -> OpenInfo:
    return OpenInfo(
        node="n",
        job="j",
        job_type="T",
        life="0" * 16,
        boot="b",
        topics=("store.X",),
        form="table" if schema or arrow_schema else "raw",
        schema=schema,
        arrow_schema=arrow_schema,
    )


def frame(kind: Kind, body: bytes | memoryview, rows: int, flags: int = 0, seq: int = 1) -> Frame:
    return decode(memoryview(encode(kind, 7, seq, body, rows=rows, flags=flags)))


def packed_row(value: int) -> list[object]:
    numbers: list[object] = [value] * 10
    return [*numbers, value % 2 == 0, value * 1000, [value] * 3, [[value, 1], [2, 3]], [True, False]]


def values_of(batch: pa.RecordBatch) -> list[tuple[object, ...]]:
    columns = [
        column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column for column in batch.columns
    ]
    return list(zip(*[column.to_pylist() for column in columns], strict=True))


def test_every_dtype_of_packed_rows_is_the_arrow_type_of_its_name():
    rows = [packed_row(value) for value in range(5)]
    batch = to_arrow(info_of(PACKED), frame(Kind.PACKED, pack_rows(PACKED, rows), 5))
    batch.validate(full=True)
    assert values_of(batch) == [tuple(row) for row in rows]
    names = [str(field.type) for field in batch.schema]
    assert names[:10] == [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float",
        "double",
    ]
    assert names[10:] == [
        "bool",
        "timestamp[ns, tz=UTC]",
        "fixed_size_list<item: uint16>[3]",
        "fixed_size_list<item: fixed_size_list<item: int32>[2]>[2]",
        "fixed_size_list<item: bool>[2]",
    ]


def test_every_dtype_of_columns_holds_missing_values():
    rows: list[list[object]] = [
        [*packed_row(3), "é,\n", b"\0\xff", [1.5, 2.5], []],
        [None] * len(GENERAL.columns),
        [*packed_row(4), "", b"", [], [1, 2, 3]],
    ]
    body = encode_columns(GENERAL, to_columns(GENERAL, rows))
    held = frame(Kind.COLUMNS, body, 3)
    batch = to_arrow(info_of(GENERAL), held)
    batch.validate(full=True)
    assert values_of(batch) == [tuple(row) for row in rows]
    names, columns = frame_columns(info_of(GENERAL), held)
    assert names == GENERAL.names
    assert list(zip(*columns, strict=True)) == [tuple(row) for row in rows]


def test_the_two_forms_of_one_table_make_the_same_batch():
    rows = [packed_row(value) for value in range(4)]
    one = to_arrow(info_of(PACKED), frame(Kind.PACKED, pack_rows(PACKED, rows), 4))
    other = to_arrow(
        info_of(PACKED), frame(Kind.COLUMNS, encode_columns(PACKED, to_columns(PACKED, rows)), 4)
    )
    assert one.equals(other)


def test_neighbouring_frames_become_one_batch_in_order():
    schema = Schema((Column("a", "i8"), Column("b", "f8")))
    frames = [frame(Kind.PACKED, pack_rows(schema, [[n, n / 2]]), 1) for n in range(4)]
    general = [frame(Kind.COLUMNS, encode_columns(schema, [[n], [None]]), 1) for n in range(4, 6)]
    widened = [frame(Kind.COLUMNS, encode_columns(schema, [["x"], [1.0]]), 1)]
    batches = BatchDecoder(info_of(schema)).batches([*frames, *general, *widened, *frames])
    assert [batch.num_rows for batch in batches] == [4, 2, 1, 4]
    assert batches[1].to_pydict() == {"a": [4, 5], "b": [None, None]}
    assert batches[2].schema.field("a").type == pa.string()


def test_arrow_batches_come_through():
    batch = pa.record_batch({"a": [1, None], "s": ["x", None], "l": [[1.0], []]})
    info = info_of(arrow_schema=arrow_schema_bytes(batch.schema))
    held = frame(Kind.ARROW, memoryview(arrow_body(batch)), 2)
    assert to_arrow(info, held).equals(batch)
    assert frame_columns(info, held) == (("a", "s", "l"), [[1, None], ["x", None], [[1.0], []]])


def test_every_cut_and_many_flips_of_an_arrow_body_are_wire_errors_or_valid_batches():
    batch = pa.record_batch({"a": list(range(20)), "s": ["text"] * 20, "l": [[1.0, 2.0]] * 20})
    info = info_of(arrow_schema=arrow_schema_bytes(batch.schema))
    body = bytes(memoryview(arrow_body(batch)))
    decoder = BatchDecoder(info)
    for end in range(0, len(body) - 8, 3):
        with pytest.raises(WireError):
            decoder.batches([frame(Kind.ARROW, body[:end], 20)])
    for at in range(0, len(body), 2):
        flipped = bytearray(body)
        flipped[at] ^= 0x41
        try:
            (found,) = decoder.batches([frame(Kind.ARROW, bytes(flipped), 20)])
        except WireError:
            continue
        assert found.num_rows == 20


def _compressed() -> pa.Buffer:
    sink = pa.BufferOutputStream()
    zeros = pa.record_batch({"a": pa.array([0.0] * 100_000)})
    with pa.ipc.new_stream(sink, zeros.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(zeros)
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()
    return messages.read_next_message().serialize()


def _viewing_again_and_again() -> Any:
    views: Any = pa.array(["x" * (1 << 20)], pa.string_view()).buffers()
    return pa.Array.from_buffers(
        pa.string_view(), 100, [None, pa.py_buffer(views[1].to_pybytes() * 100), *views[2:]]
    )


@pytest.mark.parametrize(
    ("array", "body"),
    [
        (pa.array([0.0] * 100_000), _compressed()),
        (pa.nulls(1_000_000), None),
        (pa.ListArray.from_arrays(pa.array([0, 1_000_000], pa.int32()), pa.nulls(1_000_000)), None),
        (pa.RunEndEncodedArray.from_arrays(pa.array([1_000_000], pa.int32()), pa.array(["x" * 100])), None),
        (pa.array([b""] * 1000, pa.binary(0)), None),
        (_viewing_again_and_again(), None),
    ],
    ids=["compressed", "nothing", "list of nothing", "runs", "no width", "views"],
)
def test_an_arrow_body_that_says_much_in_few_bytes_is_a_wire_error(array, body):
    batch = pa.record_batch({"a": array})
    body = memoryview(body or arrow_body(batch))
    with pytest.raises(WireError):
        to_arrow(info_of(arrow_schema=arrow_schema_bytes(batch.schema)), frame(Kind.ARROW, body, len(array)))


def test_texts_in_the_view_layout_become_plain_ones():
    batch = pa.record_batch({"a": pa.array(["short", "long" * 10, None], pa.string_view())})
    held = frame(Kind.ARROW, memoryview(arrow_body(batch)), 3)
    found = to_arrow(info_of(arrow_schema=arrow_schema_bytes(batch.schema)), held)
    assert found.to_pydict() == batch.to_pydict()
    assert found.schema.field("a").type == pa.string()


def test_a_damaged_arrow_schema_is_a_wire_error():
    batch = pa.record_batch({"a": [1]})
    good = arrow_schema_bytes(batch.schema)
    for bad in (good[:20], b"\0" * 40, b"x"):
        with pytest.raises(WireError):
            to_arrow(info_of(arrow_schema=bad), frame(Kind.ARROW, memoryview(arrow_body(batch)), 1))


@pytest.mark.parametrize(
    "held",
    [
        frame(Kind.PACKED, b"\0" * 16, 2),
        frame(Kind.PACKED, b"\0" * 15, 1),
        frame(Kind.COLUMNS, encode_columns(Schema((Column("a", "i8"),)), [[1]]), 2),
        frame(Kind.COLUMNS, b"", 0),
        frame(Kind.EVENT, b"", 1),
        frame(Kind.GAP, pack_map({}), 1),
    ],
    ids=lambda held: f"{held.kind.name}-{held.rows}",
)
def test_a_body_that_its_header_or_open_denies_is_a_wire_error(held):
    info = info_of(Schema((Column("a", "i8"),)))
    for read in (to_arrow, frame_columns):
        if held.kind is Kind.PACKED and len(held.body) == 16:
            assert frame_columns(info, held)[1] == [[0, 0]]
            continue
        with pytest.raises(WireError):
            read(info, held)


def test_packed_frames_of_a_stream_without_a_schema_are_wire_errors():
    for kind in (Kind.PACKED, Kind.COLUMNS):
        with pytest.raises(WireError):
            to_arrow(info_of(arrow_schema=b"x"), frame(kind, b"", 0))


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_raw_messages_come_back_as_they_were_put(messages):
    end, ends = 0, b""
    for message in messages:
        end += len(message)
        ends += end.to_bytes(4, "little")
    held = frame(Kind.RAW, ends + b"".join(messages), len(messages))
    assert raw_messages(held) == messages
    assert raw_body(held) == b"".join(messages)
    assert to_arrow(info_of(), held).to_pydict() == {"message": messages}


@settings(max_examples=300)
@given(st.binary(max_size=30), st.integers(0, 2**32 - 1) | st.integers(0, 8))
def test_bytes_that_are_no_messages_are_wire_errors(body, rows):
    held = frame(Kind.RAW, body, rows)
    try:
        found = raw_messages(held)
    except WireError:
        return
    assert b"".join(found) == body[4 * rows :]
    assert len(found) == rows


def test_a_piece_is_its_bytes():
    held = frame(Kind.RAW, b"part", 0, FLAG_PIECE | FLAG_CONTINUES)
    assert [bytes(piece) for piece in raw_messages(held)] == [b"part"]
    assert bytes(raw_body(held)) == b"part"


def test_events_have_metadata_and_payload():
    metadata = pack_map({"a": 1})
    held = frame(Kind.EVENT, len(metadata).to_bytes(4, "little") + metadata + b"payload", 1)
    found, payload = event_of(held)
    assert (found, bytes(payload)) == ({"a": 1}, b"payload")
    for bad in (b"", b"\xff\xff\xff\xff", b"\5\0\0\0abcd", b"\1\0\0\0\1"):
        with pytest.raises(WireError):
            event_of(frame(Kind.EVENT, bad, 1))
