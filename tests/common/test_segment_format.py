from __future__ import annotations

import pytest
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import Kind
from edgedaq.segment_format import (
    PREFIX_BYTES,
    SEGMENT_HEADER_BYTES,
    Control,
    Entry,
    Header,
    Record,
    RecordKind,
    checkpoint_payload,
    control_record,
    decode_header,
    encode_header,
    file_name,
    first_of,
    open_map,
    parse,
    read_checkpoint,
    seal_map,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from tests.common.log_model import frame_of, frames_in, open_of, raw_of

_U64 = st.integers(0, (1 << 64) - 1)
_SALT = 0x1234_5678_9ABC_DEF1


def _record(frame, position, salt=_SALT):
    head = salt.to_bytes(8, "little") + len(frame.raw).to_bytes(4, "little") + (1).to_bytes(4, "little")
    check = xxh3_64_intdigest(head + bytes(frame.raw[:64]), position)
    return check.to_bytes(8, "little") + head + bytes(frame.raw)


@given(st.builds(Header, _U64, _U64, _U64, _U64, _U64, _U64))
def test_a_header_comes_back_as_it_was_written(header):
    assert decode_header(encode_header(header)) == header


def test_a_header_with_any_bit_flipped_is_refused():
    data = encode_header(Header(4096, _SALT, 0, 100, 50, 7))
    for bit in range(0, 8 * SEGMENT_HEADER_BYTES, 1 if SEGMENT_HEADER_BYTES < 128 else 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_header(damaged)


def test_a_header_cut_anywhere_is_refused():
    data = encode_header(Header(4096, _SALT, 0, 100, 50, 7))
    for size in range(0, SEGMENT_HEADER_BYTES, 61):
        with pytest.raises(WireError):
            decode_header(data[:size])


@given(_U64)
def test_a_name_says_the_first_position(first):
    assert first_of(file_name(first)) == first


@pytest.mark.parametrize(
    "name",
    ["", ".seg", "lock", "0.seg", "000000000000000G.seg", "0000000000000000.seg.bad", "000000000000000A.seg"],
)
def test_other_names_are_no_segments(name):
    assert first_of(name) is None


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 1 << 60) | st.binary(max_size=20), max_size=5))
def test_a_sealed_map_comes_back_and_is_aligned(value):
    payload = seal_map(value)
    assert len(payload) % 8 == 0
    assert open_map(memoryview(payload)) == value


def test_a_sealed_map_with_any_bit_flipped_is_refused():
    payload = seal_map({"a": [1, 2, 3], "b": b"xyz"})
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            open_map(memoryview(damaged))


def test_a_checkpoint_is_the_exact_account():
    table = StreamTable()
    for frame in (open_of(1), raw_of(1, 1), open_of(2)):
        table.apply(frame)
    again, cursor = read_checkpoint(memoryview(checkpoint_payload(table, {"at": 5})))
    assert again.snapshot() == table.snapshot()
    assert cursor == {"at": 5}


def test_parse_returns_frames_and_controls_and_says_what_it_needs():
    frames = [open_of(1), raw_of(1, 1, 1000)]
    data = b""
    position = 800
    for frame in frames:
        data += _record(frame, position + len(data))
    data += control_record(RecordKind.SYNCED, _SALT, position + len(data), bytes(8))
    for size in range(len(data) + 1):
        entries: list[Entry] = []
        reached, need = parse(memoryview(data)[:size], position, _SALT, position + len(data), entries)
        assert need >= 0
        ends = [entry.end for entry in entries]
        assert reached == (ends[-1] if ends else position)
        assert need == 0 or reached - position + need > size
    assert [type(entry) for entry in entries] == [Record, Record, Control]
    assert [bytes(frame.raw) for frame in frames_in(entries)] == [bytes(frame.raw) for frame in frames]


def test_a_record_at_another_position_or_of_another_use_is_not_valid():
    data = memoryview(_record(raw_of(1, 1), 800))
    for position, salt in ((808, _SALT), (800, _SALT + 2)):
        entries: list[Entry] = []
        assert parse(data, position, salt, 1 << 20, entries) == (position, -1)
        assert entries == []


def test_any_flipped_bit_of_a_record_makes_it_invalid():
    data = _record(raw_of(1, 1, 40), 800)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        entries: list[Entry] = []
        reached, need = parse(memoryview(damaged), 800, _SALT, 800 + len(data), entries)
        assert (reached, entries) == (800, [])
        assert need < 0


def test_frames_of_unwanted_streams_are_passed_over_by_a_checked_header_and_opens_are_not():
    frames = [open_of(1), raw_of(1, 1), raw_of(2, 1)]
    data = b""
    for frame in frames:
        data += _record(frame, len(data))
    entries: list[Entry] = []
    asked = []

    def wants(stream):
        asked.append(stream)
        return stream == 2

    reached, need = parse(memoryview(data), 0, _SALT, len(data), entries, wants)
    assert (reached, need) == (len(data), 0)
    assert asked == [1, 2]
    assert [(frame.kind, frame.stream) for frame in frames_in(entries)] == [(Kind.OPEN, 1), (Kind.RAW, 2)]
    damaged = bytearray(data)
    damaged[len(frames[0].raw) + 2 * PREFIX_BYTES + 24] ^= 1  # the stream of the second frame
    assert parse(memoryview(damaged), 0, _SALT, len(data), [], wants)[1] == -1


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 1 << 40))
def test_random_bytes_are_no_records(data, position):
    entries: list[Entry] = []
    parse(memoryview(data), position, _SALT, position + len(data), entries)
    assert entries == []


def test_a_frame_of_an_unknown_version_is_a_hole_of_known_size():
    frame = frame_of(Kind.RAW, 1, 1, b"12345678", rows=1)
    raw = bytearray(frame.raw)
    raw[11] = 9
    raw[:8] = xxh3_64_intdigest(bytes(raw[8:])).to_bytes(8, "little")
    data = _record(frame._replace(raw=memoryview(raw)), 0)
    assert parse(memoryview(data), 0, _SALT, len(data), []) == (0, -len(data))
