"""A million mutated messages and frames, checksums repaired, against what takes them: none gets in wrongly.

The checksums are those of the mutated bytes, so that the parsers and the verdicts behind them see all of it.
What was taken is judged again here from its bytes alone, by the drawings in ``frame`` and
``session_messages``. ``FUZZ_SEED`` gives a run back, ``FUZZ_COUNT`` makes it longer.
"""

from __future__ import annotations

import os
import random
import secrets
import struct
import time

import msgpack
import pytest
from edgedaq.delivery import StreamTable
from edgedaq.errors import WireError
from edgedaq.frame import Kind, decode, encode, pack_map
from edgedaq.schema import Column, OpenInfo, Schema, encode_open
from edgedaq.session_messages import (
    Bye,
    Hello,
    Join,
    Ping,
    Report,
    decode_from_uplink,
    encode_message,
)
from edgedaq.transport import DataHeader
from edgedaq_aggregator.judging import StreamOwners, judge_part
from xxhash import xxh3_64_intdigest

COUNT = int(os.environ.get("FUZZ_COUNT") or 1_000_000)
CONTROL_COUNT, FRAME_COUNT = COUNT * 2 // 5, COUNT * 3 // 5
TIME_LIMIT_S = 240.0
FIELDS = ((16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 8), (56, 8), (12, 1), (13, 1), (11, 1), (8, 3))
EDGES = (0, 1, 2, 5, 64, 255, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
TOPICS = ("store.X",)
ROWS = Schema((Column("a", "i4"),))

CONTROLS = [
    Hello(protocol_min=1, protocol_max=1, version="1", node="n1", boot="b", instance="i", lanes=["data"]),
    Join(node="n1", secret=b"s" * 16),
    Ping(t_mono_ns=1 << 60, t_utc_ns=-5, sent=[1, 1 << 40], offset_ns=-3, error_ns=1 << 33),
    Report(report={"node": "n1", "jobs": [{"a": [1.5, None, True]}]}),
    Bye(code="stopped", text="the uplink ends"),
]


@pytest.fixture
def chance():
    seed = int(os.environ.get("FUZZ_SEED") or secrets.randbits(32))
    print(f"seed of this run: FUZZ_SEED={seed}")
    return random.Random(seed)


def mutated(raw: bytes, chance: random.Random) -> bytearray:
    """Return bytes that differ: bits, bytes, cuts, repetitions, or edge values."""
    made = bytearray(raw)
    for _ in range(1 + int(chance.random() * 3)):
        at = int(chance.random() * len(made)) if made else 0
        what = int(chance.random() * 6)
        if what == 0 and made:
            made[at] ^= 1 << int(chance.random() * 8)
        elif what == 1 and made:
            made[at] = int(chance.random() * 256)
        elif what == 2:
            del made[at : at + 1 + int(chance.random() * 8)]
        elif what == 3:
            made[at:at] = made[at : at + 1 + int(chance.random() * 16)]
        elif what == 4:
            made[at:at] = msgpack.packb(EDGES[int(chance.random() * len(EDGES))])
        elif made:
            made[at : at + 1] = bytes([0xDF, 0xFF, 0xFF, 0xFF, 0xFF][: 1 + int(chance.random() * 5)])
    return made


def is_within_limits(message: object) -> bool:
    """Tell whether a message holds what the models allow, by rules of our own."""

    def is_word(text: object) -> bool:
        return isinstance(text, str) and len(text) <= 64

    def is_u64(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 64

    def is_int(value: object) -> bool:
        return type(value) is int and -(1 << 63) <= value < 1 << 64

    match message:
        case Hello():
            words = (message.version, message.node, message.boot, message.instance, *message.lanes)
            numbers = is_u64(message.protocol_min) and is_u64(message.protocol_max)
            return numbers and all(map(is_word, words)) and 1 <= len(message.lanes) <= 16
        case Join():
            return is_word(message.node) and type(message.secret) is bytes and len(message.secret) == 16
        case Ping():
            clocks = [held for held in (message.offset_ns, message.error_ns) if held is not None]
            numbers = is_u64(message.t_mono_ns) and is_int(message.t_utc_ns) and all(map(is_int, clocks))
            return numbers and len(message.sent) <= 16 and all(map(is_u64, message.sent))
        case Report():
            return isinstance(message.report, dict) and all(isinstance(key, str) for key in message.report)
        case Bye():
            return is_word(message.code) and isinstance(message.text, str) and len(message.text) <= 1000
    return False


def test_no_mutated_control_message_is_taken_that_is_outside_its_limits(chance):
    originals = [encode_message(message)[8:] for message in CONTROLS]
    taken = 0
    ends_s = time.monotonic() + TIME_LIMIT_S
    for number in range(CONTROL_COUNT):
        raw = bytes(mutated(originals[number % len(originals)], chance))
        part = xxh3_64_intdigest(raw).to_bytes(8, "little") + raw
        try:
            message = decode_from_uplink(part)
        except WireError:
            continue
        taken += 1
        assert is_within_limits(message), (part, message)
        assert encode_message(decode_from_uplink(encode_message(message))) == encode_message(message)
        assert time.monotonic() < ends_s, f"only {number} of {CONTROL_COUNT} within the time"
    print(
        f"{CONTROL_COUNT} mutated control messages, {taken} were messages all the same, 0 outside the limits"
    )
    assert 0 < taken < CONTROL_COUNT // 2


def streams() -> tuple[StreamTable, StreamOwners]:
    """Return an intake's knowledge of three streams: 7 and 8 are n1's, 9 is n2's."""
    table = StreamTable()
    owners = StreamOwners(table)
    for stream, node, schema in ((7, "n1", None), (8, "n1", ROWS), (9, "n2", None)):
        raw = opening(stream, node, schema)
        judged = judge_part(table, owners, node, DataHeader(0, 0, 0, 1, len(raw)), memoryview(raw))
        for frame in judged.accepted:
            table.apply(frame)
    for seq in (1, 2):
        table.apply(decode(memoryview(encode(Kind.RAW, 7, seq, b"x" * 20, rows=1, row0=seq - 1))))
    return table, owners


def opening(stream, node="n1", schema=None, topics=TOPICS):
    info = OpenInfo(
        node=node,
        job="j",
        job_type="J",
        life="0" * 16,
        boot="b",
        topics=topics,
        form="table" if schema else "raw",
        schema=schema,
        store_config={"csv": {"file_path": "a.csv"}},
    )
    return encode_open(stream, info)


def is_rightly_taken(raw: bytes, frames_before: int) -> str:
    """Return what is wrong with a frame that was taken from n1; empty where nothing is. From bytes alone."""
    if raw[8:12] != b"EDQ\x01" or len(raw) % 8 or len(raw) > 4 << 20:
        return "magic or length"
    kind, body_bytes, rows = raw[12], *struct.unpack_from("<II", raw, 16)
    stream, seq = struct.unpack_from("<QQ", raw, 24)
    if len(raw) != 64 + ((body_bytes + 7) & ~7):
        return "body_bytes"
    if xxh3_64_intdigest(raw[8:]) != int.from_bytes(raw[:8], "little"):
        return "checksum"
    body = raw[64 : 64 + body_bytes]
    if kind == Kind.OPEN:
        info = msgpack.unpackb(body)
        fits = info["node"] == "n1" and set(info["topics"]) <= set(TOPICS)
        return "" if seq == 0 and stream not in {0, 7, 8, 9} and fits else "OPEN"
    if stream not in {7, 8}:
        return "stream"
    expected = 3 if stream == 7 else 1
    if kind == Kind.GAP:
        told = msgpack.unpackb(body)
        fits = type(told["last"]) is int and seq <= expected + frames_before <= told["last"] < 1 << 63
        return "" if fits else "GAP"
    if seq != expected + frames_before:
        return "seq"
    if kind == Kind.PACKED and (stream != 8 or body_bytes != 4 * rows):
        return "PACKED"
    if kind in {Kind.START, Kind.STOP, Kind.CLOSE} and not isinstance(msgpack.unpackb(body), dict):
        return "map"
    return "" if 1 <= kind <= 10 else "kind"


def test_no_mutated_frame_is_taken_that_is_not_this_nodes_whole_and_next(chance):
    originals = [
        encode(Kind.RAW, 7, 3, b"\x05\0\0\0hello", rows=1, row0=2, t_first_ns=5, t_put_ns=6),
        encode(Kind.PACKED, 8, 1, b"1234" * 5, rows=5, row0=0),
        encode(Kind.GAP, 7, 3, pack_map({"last": 9, "rows": 4, "reason": "r"}), row0=2),
        encode(Kind.CLOSE, 7, 3, pack_map({"rows": 2, "tail_unknown": False, "bound_s": 0.0}), row0=2),
        encode(Kind.EVENT, 7, 3, b"\x01\0\0\0\x80x", rows=1, row0=2),
        opening(10),
        opening(11, topics=("store.Y",)),
        opening(12, node="n2"),
        encode(Kind.RAW, 9, 1, b"\x05\0\0\0hello", rows=1),
    ]
    taken = 0
    table, owners = streams()
    known = dict(owners.facts)
    ends_s = time.monotonic() + TIME_LIMIT_S
    for number in range(FRAME_COUNT):
        made = bytearray(originals[number % len(originals)])
        if chance.random() < 0.5:
            at, size = FIELDS[int(chance.random() * len(FIELDS))]
            value = EDGES[int(chance.random() * len(EDGES))] + int(chance.random() * 12) - 1
            made[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        else:
            made[64:] = mutated(bytes(made[64:]), chance)
            if chance.random() < 0.8:  # whole again, so that it gets further
                made[16:20] = (len(made) - 64).to_bytes(4, "little")
                made += bytes(-len(made) % 8)
        made[:8] = xxh3_64_intdigest(made[8:]).to_bytes(8, "little")
        header = DataHeader(0, 0, 0, 1, len(made))
        judged = judge_part(table, owners, "n1", header, memoryview(made), topics=TOPICS)
        for before, frame in enumerate(judged.accepted):
            taken += 1
            wrong = is_rightly_taken(bytes(frame.raw), before)
            assert not wrong, (wrong, made.hex())
        if judged.accepted:
            for stream in owners.facts.keys() - known.keys():
                del owners.facts[stream]
            owners._open_count.clear()
        assert time.monotonic() < ends_s, f"only {number} of {FRAME_COUNT} within the time"
    print(f"{FRAME_COUNT} mutated frames, {taken} were this node's next ones all the same, 0 taken wrongly")
    assert 0 < taken < FRAME_COUNT // 2
