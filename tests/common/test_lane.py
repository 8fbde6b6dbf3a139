from __future__ import annotations

import pytest
from edgedaq.errors import WireError
from edgedaq.lane import Lane
from edgedaq.lane_parts import Entry, FromMemory, FromSpool, Release

MS = 1_000_000
NEVER = lambda *_: False  # noqa: E731
ALWAYS = lambda *_: True  # noqa: E731


def entry(size, t_ms=0, *, ring="r", end=None, count=1):
    return Entry(ring, memoryview(bytes(size)), count, end, t_ms * MS)


def lane_with(*sizes, ring="r", **options):
    lane = Lane(part_bytes=1000, **options)
    end = 0
    for size in sizes:
        end += size
        lane.arrive(entry(size, ring=ring, end=end))
    return lane


def send(lane, credit=10_000):
    part = lane.next_part(credit)
    assert isinstance(part, FromMemory)
    lane.sent_memory(part, part.size)
    return part


def test_entries_are_joined_up_to_a_part_and_a_larger_one_goes_alone():
    lane = lane_with(400, 400, 400, 3000, 8)
    assert [len(send(lane).entries) for _ in range(4)] == [2, 1, 1, 1]
    assert lane.next_part(10_000) is None


def test_nothing_is_sent_beyond_the_credit():
    lane = lane_with(400, 400)
    assert lane.next_part(399) is None
    assert send(lane, 500).size == 400
    assert lane.next_part(799) is None
    assert send(lane, 800).size == 400


def test_an_entry_that_is_split_is_sent_acknowledged_and_spooled_like_any_other():
    lane = lane_with(300, 900, 200)
    send(lane)
    whole = lane.next_part(10_000, 300).entries[0]
    pieces = [Entry(whole.holder, whole.frames[at : at + 300], 1, None, whole.t_ns) for at in (0, 300, 600)]
    pieces[-1].release_to = whole.release_to
    lane.split_front(pieces)
    for size in (300, 300):
        part = lane.next_part(10_000, 300)
        assert part.size == size
        lane.sent_memory(part, size)
    assert lane.ack(600, 0) == [Release("r", 300)]
    assert lane.go_back(600)
    assert [entry.index for entry in lane.next_part(10_000).entries] == [2, 3, 4]
    groups = lane.plan_spooling(0, NEVER, all_of_it=True)
    assert [[entry.index for entry in group] for group in groups] == [[2, 3, 4]]
    lane.spooled(groups, [800])
    assert lane.durable(800) == [Release("r", 1400)]
    assert lane.memory_bytes == lane.held_bytes("r") == 0


def test_an_acknowledgement_is_cumulative_releases_once_and_may_be_repeated():
    lane = lane_with(400, 700, 900)
    for _ in range(3):
        send(lane)
    assert lane.ack(0, 0) == []
    assert lane.ack(399, 0) == []
    assert lane.ack(1100, 0) == [Release("r", 1100)]
    assert lane.ack(1100, 0) == []
    assert lane.ack(400, 0) == []
    assert lane.ack(2000, 0) == [Release("r", 2000)]
    assert lane.is_empty


def test_an_acknowledgement_of_what_was_never_sent_is_refused():
    lane = lane_with(400)
    with pytest.raises(WireError, match="only 0 was sent"):
        lane.ack(400, 0)


def test_pieces_of_one_run_release_it_with_the_last_of_them():
    lane = Lane(part_bytes=1000)
    lane.arrive(entry(1000))
    lane.arrive(entry(1000, end=77))
    send(lane)
    send(lane)
    assert lane.ack(1000, 0) == []
    assert lane.ack(2000, 0) == [Release("r", 77)]


def test_a_new_session_begins_with_the_oldest_unacknowledged():
    lane = lane_with(600, 600, 600)
    first = [send(lane) for _ in range(2)]
    lane.ack(600, 0)
    lane.begin_session()
    assert lane.sent == lane.in_flight_bytes == 0
    assert lane.resent_bytes == 600
    again = [send(lane) for _ in range(2)]
    assert again[0].entries == first[1].entries
    assert lane.next_part(10_000) is None


def test_going_back_sends_again_from_there_and_only_to_where_a_part_began():
    lane = lane_with(600, 600, 600)
    parts = [send(lane) for _ in range(3)]
    assert not lane.go_back(599)
    assert lane.go_back(600)
    assert lane.sent == 600
    assert [send(lane).entries for _ in range(2)] == [part.entries for part in parts[1:]]
    lane.ack(600, 0)
    assert not lane.go_back(0)
    assert lane.go_back(1800)


def test_what_is_old_goes_to_the_spool_with_all_that_is_older_and_is_released_when_durable_there():
    lane = Lane(part_bytes=1000, spool_after_ns=200 * MS)
    lane.arrive(entry(100, 0, end=100))
    lane.arrive(entry(100, 50, end=200))
    lane.arrive(entry(100, 150, end=300))
    assert lane.due_ns(NEVER) == 200 * MS
    assert lane.plan_spooling(199 * MS, NEVER) == []
    groups = lane.plan_spooling(260 * MS, NEVER)
    assert [len(group) for group in groups] == [2]
    lane.spooled(groups, [248])
    assert lane.durable(247) == []
    assert lane.durable(248) == [Release("r", 200)]
    assert lane.next_part(10_000) == FromSpool(0, 248)
    lane.sent_spool(248, 200)
    assert send(lane).size == 100
    assert lane.ack(300, 0) == [Release("r", 300)]
    assert lane.is_empty
    assert lane.spool_acked == 248


def test_a_crowded_ring_goes_to_the_spool_early_but_not_while_acknowledgements_come():
    lane = Lane(part_bytes=100, spool_after_ns=200 * MS, crowded_after_ns=50 * MS)
    for number in range(4):
        lane.arrive(entry(100, 0, end=100 * number + 100))
    assert lane.due_ns(ALWAYS) == 50 * MS
    send(lane)
    lane.ack(100, 40 * MS)
    assert lane.plan_spooling(60 * MS, ALWAYS) == []
    assert len(lane.plan_spooling(90 * MS, ALWAYS)[0]) == 1
    assert lane.plan_spooling(90 * MS, NEVER) == []


def test_what_flies_while_it_is_spooled_is_acknowledged_and_sent_again_from_the_spool():
    lane = lane_with(600, 600, 600, spool_after_ns=0)
    send(lane)
    send(lane)
    groups = lane.plan_spooling(0, NEVER)
    assert [len(group) for group in groups] == [1, 1, 1]
    lane.spooled(groups, [624, 1248, 1872])
    assert lane.next_part(10_000) == FromSpool(1248, 1872)
    assert lane.ack(600, 0) == [Release("r", 600)]
    assert lane.spool_acked == 624
    assert lane.go_back(600)
    assert lane.next_part(10_000) == FromSpool(624, 1872)
    lane.begin_session()
    assert lane.next_part(10_000) == FromSpool(624, 1872)


def test_a_plan_that_the_disk_took_only_in_part_leaves_the_rest_in_memory():
    lane = lane_with(600, 600, 600, spool_after_ns=0)
    groups = lane.plan_spooling(0, NEVER)
    lane.spooled(groups, [])
    assert lane.memory_bytes == 1800
    send(lane)
    groups = lane.plan_spooling(0, NEVER)
    lane.spooled(groups, [624])
    assert lane.memory_bytes == 1200
    assert send(lane).size == 600
    lane.ack(1200, 0)
    assert lane.spool_acked == 624


def test_a_spool_that_moved_is_sent_again_as_a_whole():
    lane = lane_with(600, spool_after_ns=0)
    lane.spooled(lane.plan_spooling(0, NEVER), [624])
    lane.sent_spool(624, 600)
    lane.spool_moved(70_000)
    assert lane.next_part(10_000) == FromSpool(0, 70_000)


def test_the_oldest_is_known_in_memory_and_to_a_second_in_the_spool():
    lane = Lane(part_bytes=1000, spool_after_ns=0)
    assert lane.oldest_ns() is None
    lane.arrive(entry(10, 5, end=10))
    assert lane.oldest_ns() == 5 * MS
    lane.spooled(lane.plan_spooling(5 * MS, NEVER), [34])
    lane.arrive(entry(10, 3000, end=20))
    lane.spooled(lane.plan_spooling(3000 * MS, NEVER), [68])
    assert lane.oldest_ns() == 5 * MS
    lane.sent_spool(34, 10)
    lane.sent_spool(68, 10)
    lane.ack(10, 0)
    assert lane.oldest_ns() == 3000 * MS
    lane.ack(20, 0)
    assert lane.oldest_ns() is None


def test_a_part_of_which_nothing_was_left_to_send_is_passed():
    lane = lane_with(600)
    part = lane.next_part(10_000)
    lane.sent_memory(part, 0)
    assert lane.ack(0, 0) == [Release("r", 600)]
    assert lane.is_empty


def test_dropping_from_the_front_keeps_what_is_in_flight_and_frees_its_holder():
    lane = lane_with(600, 600, 600)
    part = lane.next_part(600)
    assert isinstance(part, FromMemory)
    lane.sent_memory(part, part.size)
    flying = part.entries[0]
    was = bytes(flying.frames)
    left = [2]

    def is_enough() -> bool:
        left[0] -= 1
        return left[0] < 0

    dropped, releases = lane.drop_front(lambda _: None, is_enough)
    assert [entry.index for entry in dropped] == [1, 2]
    assert releases[-1].up_to == dropped[-1].release_to
    assert bytes(flying.frames) == was
    assert flying.holder is None
    assert lane.ack(600, 0) == []
    assert lane.is_empty
    assert lane.memory_bytes == 0


def test_what_must_not_be_dropped_stays_in_its_place():
    lane = lane_with(600, 600)
    kept = Entry(None, memoryview(b"close"), 1, None)
    dropped, _ = lane.drop_front(
        lambda entry: kept if entry.index == 0 else None, lambda: lane.memory_bytes == 0
    )
    assert len(dropped) == 2
    part = lane.next_part(1000)
    assert isinstance(part, FromMemory)
    assert part.entries == [kept]
