from __future__ import annotations

from edgedaq.bad_files import BadFiles
from edgedaq.delivery import gap_of
from edgedaq.frame import Kind, decode, encode, pack_map
from edgedaq.open_info import OpenInfo, decode_open, encode_open
from edgedaq.session_messages import TOPIC, Ahead, Pong, Refused, Resend, Unknown
from edgedaq.transport import PART_BYTES, PART_BYTES_MIN
from edgedaq_agent.clock_offset import ClockOffset, Offset
from edgedaq_agent.corrector import Corrector, whole_frames

OPEN = encode(Kind.OPEN, 7, 0, b"open")
S = 1_000_000_000


def raw(seq, rows=3, stream=7):
    return decode(memoryview(encode(Kind.RAW, stream, seq, b"x" * 20, rows=rows, row0=3 * (seq - 1))))


def corrector(tmp_path, opens=None):
    return Corrector(BadFiles(tmp_path / "bad"), (opens or {}).get)


def names(chunks):
    frames = [decode(memoryview(chunk)) for chunk in chunks]
    return [(frame.kind.name, frame.seq) for frame in frames]


def test_a_refused_frame_is_set_aside_and_a_gap_takes_its_place(tmp_path):
    made = corrector(tmp_path)
    assert not made.is_needed
    made.note(Refused(lane=0, position=0, stream=7, seq=2, code="body", text="t"), 100, 0)
    assert made.is_needed
    chunks = made.correct([raw(1), raw(2), raw(3)])
    assert names(chunks) == [("RAW", 1), ("GAP", 2), ("RAW", 3)]
    frame = decode(memoryview(chunks[1]))
    assert gap_of(frame) == (2, 3, "refused: body")
    assert frame.row0 == 3
    (kept,) = (tmp_path / "bad").glob("*.bad")
    assert kept.read_bytes() == raw(2).raw
    made.passed(100 + (1 << 20))
    assert not made.is_needed


def test_a_stream_whose_open_is_refused_is_set_aside_until_its_close_and_others_pass(tmp_path):
    made = corrector(tmp_path)
    made.note(Refused(lane=0, position=0, stream=7, seq=0, code="node", text="t"), 0, 0)
    close = decode(memoryview(encode(Kind.CLOSE, 7, 3, pack_map({"rows": 6}))))
    opened = decode(memoryview(OPEN))
    chunks = made.correct([opened, raw(1), raw(1, stream=8), raw(2)])
    assert names(chunks) == [("RAW", 1)]
    made.begin_session()
    assert made.is_needed
    assert made.correct([close]) == []
    assert not made.is_needed


def test_a_stream_whose_topics_are_refused_is_opened_for_its_gaps_alone(tmp_path):
    info = OpenInfo(
        node="n1",
        job="j",
        job_type="J",
        life="0" * 16,
        boot="b",
        topics=("store.X",),
        form="raw",
        store_config={"csv": {}},
    )
    opened = decode(memoryview(encode_open(7, info)))
    close = decode(memoryview(encode(Kind.CLOSE, 7, 3, pack_map({"rows": 6}))))
    made = corrector(tmp_path, {7: bytes(opened.raw)})
    made.note(Refused(lane=0, position=0, stream=7, seq=0, code=TOPIC, text="n1 may not send it"), 0, 0)
    chunks = made.correct([opened, raw(1), raw(1, stream=8), raw(2)])
    assert names(chunks) == [("OPEN", 0), ("GAP", 1), ("RAW", 1), ("GAP", 2)]
    told = decode_open(decode(memoryview(chunks[0])))
    assert (told.topics, told.store_config, told.job) == ((), {}, "j")
    assert gap_of(decode(memoryview(chunks[3]))) == (2, 3, "refused: topic: n1 may not send it")
    made.begin_session()
    made.note(Unknown(lane=0, position=0, stream=7), 0, 0)
    assert names(made.correct([raw(3), close])) == [("OPEN", 0), ("GAP", 3), ("CLOSE", 3)]
    made.begin_session()
    assert not made.is_needed
    assert len(list((tmp_path / "bad").glob("*.bad"))) == 3


def test_an_unknown_stream_is_opened_before_its_next_frame_or_set_aside_where_nobody_has_its_open(tmp_path):
    made = corrector(tmp_path, {7: OPEN})
    for stream in (7, 8):
        made.note(Unknown(lane=0, position=0, stream=stream), 0, 0)
    chunks = made.correct([raw(5), raw(6), raw(1, stream=8)])
    assert names(chunks) == [("OPEN", 0), ("RAW", 5), ("RAW", 6)]
    assert len(list((tmp_path / "bad").glob("*.bad"))) == 1


def test_what_neither_side_has_becomes_a_gap_with_its_rows(tmp_path):
    made = corrector(tmp_path)
    made.note(Ahead(lane=0, position=0, stream=7, expected=2, seq=5, rows=9), 0, 0)
    chunks = made.correct([raw(5)])
    assert names(chunks) == [("GAP", 2), ("RAW", 5)]
    gap = decode(memoryview(chunks[0]))
    assert gap_of(gap)[:2] == (4, 9)
    assert gap.row0 == 3


def test_too_many_problems_at_one_position_are_noticed(tmp_path):
    made = corrector(tmp_path)
    answers = [made.note(Resend(lane=0, position=8, text=""), 0, 0) for _ in range(21)]
    assert answers == [True] * 20 + [False]
    assert made.note(Resend(lane=0, position=8, text=""), 0, 0)


def test_each_damaged_part_halves_the_next_and_what_passes_since_doubles_them_again(tmp_path):
    made = corrector(tmp_path)
    assert made.part_bytes == PART_BYTES
    for _ in range(30):
        made.note(Resend(lane=0, position=0, text=""), 0, 0)
    assert made.part_bytes == PART_BYTES_MIN
    position = 0
    while made.part_bytes < PART_BYTES:
        position += PART_BYTES
        made.passed(position)
    assert position == 8 * PART_BYTES
    assert not made.is_needed


def test_what_is_damaged_in_memory_is_set_aside_and_the_frames_around_it_pass(tmp_path):
    damaged = bytearray(raw(2).raw)
    damaged[70] ^= 1
    buffer = memoryview(bytes(raw(1).raw) + bytes(damaged) + bytes(raw(3).raw) + b"rubbish" * 20)
    bad = BadFiles(tmp_path / "bad")
    assert [frame.seq for frame in whole_frames(buffer, bad)] == [1, 3]
    assert bad.count == 2


def test_bad_files_are_bounded_and_the_newest_stay(tmp_path):
    bad = BadFiles(tmp_path / "bad", limit_bytes=250)
    for number in range(5):
        bad.add(1, number, "why", bytes([number]) * 100)
    kept = sorted(path.read_bytes()[0] for path in (tmp_path / "bad").glob("*.bad"))
    assert kept == [3, 4]
    assert len(list((tmp_path / "bad").glob("*.txt"))) == 2


def pong(sent_mono, sent_utc, received, answered):
    return Pong(t_mono_ns=sent_mono, t_utc_ns=sent_utc, received_utc_ns=received, sent_utc_ns=answered)


def best_of(clock: ClockOffset, now_ns: int) -> Offset:
    best = clock.best(now_ns)
    assert best is not None
    return best


def test_the_shortest_round_trip_tells_the_offset_and_its_error_grows_with_age():
    clock = ClockOffset()
    assert clock.best(0) is None
    for start, there, back in ((0, 100, 900), (S, 1000, 1000), (2 * S, 5000, 0)):
        utc = 50 * S + start
        reached = utc + there * 1000 + 3 * S
        end = there * 1000 + 7 + back * 1000
        clock.add(pong(start, utc, reached, reached + 7), start + end, utc + end)
    best = best_of(clock, 2 * S)
    assert abs(best.offset_ns - 3 * S) <= best.error_ns
    assert best.error_ns < 700_000
    assert best_of(clock, 60 * S).error_ns > best.error_ns


def test_after_a_step_of_the_clock_older_round_trips_are_forgotten():
    clock = ClockOffset()
    clock.add(pong(0, 0, 500, 500), 1000, 1000)
    assert best_of(clock, 1000).offset_ns == 0
    clock.add(pong(S, S - 5 * S, S + 500, S + 500), S + 1000, S - 5 * S + 1000)
    assert best_of(clock, S).offset_ns == 5 * S


def test_a_step_of_the_clock_is_noticed_before_the_next_answer():
    clock = ClockOffset()
    clock.add(pong(0, 0, 500, 500), 1000, 1000)
    clock.watch(S, S + 1000)
    assert clock.best(S) is not None
    clock.watch(2 * S, 3600 * S)
    assert clock.best(2 * S) is None


def test_an_answer_whose_times_cannot_be_is_not_taken():
    clock = ClockOffset()
    clock.add(pong(0, 0, 900, 100), 1000, 1000)
    clock.add(pong(0, 0, 0, 5000), 1000, 1000)
    clock.add(pong(0, 3 * S, 500, 500), 1000, 1000)
    assert clock.best(0) is None
