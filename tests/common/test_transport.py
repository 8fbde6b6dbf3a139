import msgspec
import pytest
from edgedaq.errors import ChecksumError, ConfigError, WireError
from edgedaq.session_messages import (
    Ack,
    Ahead,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Reject,
    Report,
    Resend,
    Unknown,
    Welcome,
    decode_from_intake,
    decode_from_uplink,
    encode_message,
)
from edgedaq.transport import (
    DATA_HEADER_BYTES,
    FLAG_REPLAY,
    DataHeader,
    backoff_s,
    check_address,
    pack_data_header,
    unpack_data_header,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
U8 = st.integers(0, 255)
HELLO = Hello(protocol_min=1, protocol_max=1, version="1", node="n1", boot="b", instance="00", lanes=["data"])
UPLINK = [
    HELLO,
    Ping(t_mono_ns=1, t_utc_ns=-2, offset_ns=None, error_ns=3),
    Report(report={"node": "n1", "jobs": [{"a": 1.5}]}),
    Bye(code="stopped", text="why"),
]
INTAKE = [
    Welcome(protocol=1, version="1", credit=8, max_frame_bytes=1, max_part_bytes=1, t_utc_ns=1),
    Reject(code="protocol", text="words", retry_after_s=1.5),
    Ack(lane=0, durable=2**63, credit=2**64 - 1),
    Resend(lane=0, position=7, text="damaged"),
    Refused(lane=0, position=7, stream=2**64 - 1, seq=3, code="node", text="not yours"),
    Unknown(lane=0, position=7, stream=9),
    Ahead(lane=0, position=7, stream=9, expected=1, seq=5, rows=None),
    Pong(t_mono_ns=1, t_utc_ns=2, received_utc_ns=3, sent_utc_ns=4),
    Bye(code="stopped"),
]


@settings(max_examples=60)
@given(U8, U8, U64, U32, U32)
def test_a_data_header_says_what_was_packed(lane, flags, position, count, size):
    packed = pack_data_header(lane, flags, position, count, size)
    assert len(packed) == DATA_HEADER_BYTES
    assert unpack_data_header(packed) == DataHeader(lane, flags, position, count, size)


def test_the_bytes_of_a_data_header_are_those_of_the_drawing():
    packed = pack_data_header(1, FLAG_REPLAY, 0x0807060504030201, 0x0C0B0A09, 0x1D1C1B1A)
    assert packed[:24] == b"EDS\x01\x01\x01\0\0" + bytes(
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 26, 27, 28, 29]
    )


def test_a_data_header_cut_or_flipped_anywhere_is_refused():
    packed = pack_data_header(0, 0, 12345, 3, 4096)
    for end in range(DATA_HEADER_BYTES):
        with pytest.raises(WireError):
            unpack_data_header(packed[:end])
    for bit in range(8 * DATA_HEADER_BYTES):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack_data_header(bytes(flipped))


def test_a_data_header_of_another_version_is_refused_by_name_and_damage_as_damage():
    packed = bytearray(pack_data_header(0, 0, 0, 1, 72))
    packed[9] ^= 1
    with pytest.raises(ChecksumError):
        unpack_data_header(bytes(packed))
    with pytest.raises(WireError, match="version 2 is not known"):
        unpack_data_header(b"EDS\x02" + bytes(packed[4:]))


@pytest.mark.parametrize("message", UPLINK, ids=lambda message: type(message).__name__)
def test_what_an_uplink_says_arrives_and_is_refused_when_an_intake_says_it(message):
    assert decode_from_uplink(encode_message(message)) == message
    if not isinstance(message, Bye):
        with pytest.raises(WireError):
            decode_from_intake(encode_message(message))


@pytest.mark.parametrize("message", INTAKE, ids=lambda message: type(message).__name__)
def test_what_an_intake_says_arrives_and_is_refused_when_an_uplink_says_it(message):
    assert decode_from_intake(encode_message(message)) == message
    if not isinstance(message, Bye):
        with pytest.raises(WireError):
            decode_from_uplink(encode_message(message))


@pytest.mark.parametrize("message", [*UPLINK, *INTAKE], ids=lambda message: type(message).__name__)
def test_a_message_cut_at_any_byte_is_refused(message):
    raw = encode_message(message)
    for end in range(len(raw)):
        for decode in (decode_from_intake, decode_from_uplink):
            with pytest.raises(WireError):
                decode(raw[:end])


@pytest.mark.parametrize("message", [*UPLINK, *INTAKE], ids=lambda message: type(message).__name__)
def test_a_message_in_which_any_bit_was_flipped_is_refused_as_damaged(message):
    raw = encode_message(message)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        for decode in (decode_from_intake, decode_from_uplink):
            with pytest.raises(ChecksumError):
                decode(bytes(flipped))


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.sampled_from([*UPLINK, *INTAKE]).map(encode_message)), st.data())
def test_garbled_messages_raise_wire_errors_and_nothing_else(raw, data):
    garbled = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 3))):
        if garbled:
            garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(U8)
    for decode in (decode_from_intake, decode_from_uplink):
        try:
            decode(bytes(garbled))
        except WireError:
            continue


def test_values_outside_their_limits_are_refused():
    wrong: list[dict[str, object]] = [
        {"node": "x" * 65},
        {"lanes": []},
        {"lanes": ["data"] * 17},
        {"protocol_min": -1},
        {"node": 7},
    ]
    for bad in wrong:
        with pytest.raises(WireError):
            decode_from_uplink(_hello_with(bad))


def _hello_with(changes):
    raw = msgspec.msgpack.encode({"type": "HELLO", **msgspec.structs.asdict(HELLO), **changes})
    return xxh3_64_intdigest(raw).to_bytes(8, "little") + raw


def test_a_newer_minor_version_may_add_keys():
    assert decode_from_uplink(_hello_with({"colour": "green"})) == HELLO


@settings(max_examples=100)
@given(st.integers(0, 100), st.floats(0, 1, exclude_max=True))
def test_backoff_lies_within_its_limits_and_spreads(attempt, chance):
    wait_s = backoff_s(attempt, chance)
    assert 0.1 <= wait_s <= min(5.0, 0.1 * 2 ** (attempt + 1)) + 1e-9
    assert backoff_s(attempt, 0.0) == 0.1
    assert backoff_s(20, 0.999999) > 4.9


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "must be tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "must be tcp://HOST:PORT"),
        ("ipc:///tmp/x", "must be tcp://HOST:PORT"),
        ("tcp://127.0.0.1:0", "port from 1 to 65535, got 0"),
        ("tcp://127.0.0.1:65536", "port from 1 to 65535, got 65536"),
        ("tcp://0.0.0.0:7770", "this machine alone"),
        ("tcp://*:7770", "this machine alone"),
        ("tcp://192.168.1.4:7770", "this machine alone"),
        ("tcp://example.org:7770", "this machine alone"),
        ("tcp://[::]:7770", "this machine alone"),
    ],
)
def test_an_address_that_another_machine_could_reach_or_that_is_none_is_refused_with_words(address, words):
    with pytest.raises(ConfigError, match=r"agent\.toml: aggregator") as caught:
        check_address("agent.toml: aggregator", address)
    assert words in str(caught.value)


def test_addresses_of_this_machine_are_accepted():
    for address in ("tcp://127.0.0.1:7770", "tcp://127.8.8.8:1", "tcp://[::1]:65535"):
        assert check_address("x", address) == address
    assert check_address("x", "tcp://localhost:7770") == "tcp://127.0.0.1:7770"
    assert check_address("x", "tcp://10.0.0.1:7770", has_keys=True) == "tcp://10.0.0.1:7770"
