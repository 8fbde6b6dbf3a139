"""The frame keeps what was put, and gives nothing that was damaged."""

from __future__ import annotations

import struct

import pytest
from edgedaq.errors import ChecksumError, WireError
from edgedaq.frame import (
    FLAG_PIECE,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Kind,
    decode,
    encode,
    frame_bytes,
    length_at,
    pack_map,
    split,
    unpack_map,
)
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
SAMPLE = encode(Kind.RAW, 0xABCDEF, 7, b"thirteen byte", rows=1, row0=3, t_first_ns=5, t_put_ns=6)


def resealed(raw: bytes) -> bytes:
    """Return damaged bytes with a checksum that fits them, so that they reach the parser behind it."""
    return struct.pack("<Q", xxh3_64_intdigest(raw[8:])) + raw[8:]


@given(
    kind=st.sampled_from([k for k in Kind if k is not Kind.OPEN]),
    stream=st.integers(1, 2**64 - 1),
    seq=st.integers(1, 2**64 - 1),
    row0=u64,
    rows=st.integers(0, 2**32 - 1),
    t_first_ns=i64,
    t_put_ns=u64,
    body=st.binary(max_size=200),
)
def test_a_frame_comes_back_as_it_was_put(kind, stream, seq, row0, rows, t_first_ns, t_put_ns, body):
    raw = encode(
        kind,
        stream,
        seq,
        body,
        rows=rows,
        row0=row0,
        t_first_ns=t_first_ns,
        t_put_ns=t_put_ns,
        flags=FLAG_PIECE,
    )
    frame = decode(memoryview(raw))
    assert frame[:8] == (kind, FLAG_PIECE, rows, stream, seq, row0, t_first_ns, t_put_ns)
    assert bytes(frame.body) == body
    assert bytes(frame.raw) == raw
    assert len(raw) == frame_bytes(len(body)) and len(raw) % 8 == 0


def test_a_frame_cut_at_any_byte_is_refused():
    for length in range(len(SAMPLE)):
        with pytest.raises(WireError):
            decode(memoryview(SAMPLE[:length]))


def test_a_frame_with_any_bit_flipped_is_refused():
    for bit in range(len(SAMPLE) * 8):
        damaged = bytearray(SAMPLE)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(WireError):
            decode(memoryview(damaged))


def test_damaged_padding_is_refused_too():
    damaged = bytearray(SAMPLE)
    damaged[-1] = 1
    with pytest.raises(ChecksumError):
        decode(memoryview(damaged))


def test_frames_back_to_back_are_split_and_the_first_damaged_one_stops_the_walk():
    second = encode(Kind.RAW, 1, 2, b"x", rows=1)
    walk = split(memoryview(SAMPLE + second + b"\0" * 80))
    assert [next(walk).seq, next(walk).seq] == [7, 2]
    with pytest.raises(WireError):
        next(walk)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (11, 2, "version 2"),
        (8, ord("X"), "no frame"),
        (12, 99, "kind must be 1 to 10, got 99"),
        (12, 1, "seq 0 and OPEN"),
    ],
)
def test_valid_checksums_do_not_make_a_wrong_header_right(offset, value, said):
    damaged = bytearray(SAMPLE)
    damaged[offset] = value
    with pytest.raises(WireError, match=said):
        decode(memoryview(resealed(bytes(damaged))))


def test_a_stream_of_zero_is_refused():
    with pytest.raises(WireError, match="stream must not be 0"):
        decode(memoryview(encode(Kind.RAW, 0, 1, b"")))


def test_a_length_above_the_limit_is_refused_before_anything_is_read():
    damaged = bytearray(SAMPLE)
    damaged[16:20] = struct.pack("<I", MAX_FRAME_BYTES)
    with pytest.raises(WireError, match="at most"):
        length_at(memoryview(damaged))


@given(st.binary(min_size=HEADER_BYTES, max_size=200))
def test_garbage_behind_a_right_magic_raises_nothing_but_wire_errors(garbage):
    raw = bytearray(garbage)
    raw[8:12] = SAMPLE[8:12]
    raw[16:20] = struct.pack("<I", len(raw) - HEADER_BYTES)
    raw += b"\0" * (frame_bytes(len(raw) - HEADER_BYTES) - len(raw))
    try:
        decode(memoryview(resealed(bytes(raw))))
    except WireError:
        return


@given(st.binary(max_size=60))
def test_a_body_that_is_no_map_raises_nothing_but_wire_errors(body):
    try:
        assert isinstance(unpack_map(body), dict)
    except WireError:
        return


def test_maps_keep_their_values():
    assert unpack_map(pack_map({"a": [1, None, b"x", "y", 2.5]})) == {"a": [1, None, b"x", "y", 2.5]}
