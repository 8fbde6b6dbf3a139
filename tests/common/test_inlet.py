from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from edgedaq.claim_files import claim_path, sweep_rings
from edgedaq.delivery import StreamTable, Verdict, gap_of
from edgedaq.frame import Frame, Kind
from edgedaq.inlet import Inlet, withdraw_claim
from edgedaq.messages import DAQJobMessageStoreRaw, MessageReader
from edgedaq.outlet import Outlet
from edgedaq.ring import Identity
from edgedaq.schema import decode_open, unpack_rows

from tests.common.producing import LIMIT_S, SCHEMA, Producer, Taken, message_of, pump, row_of

SMALL: dict[str, Any] = {"ring_bytes": 64 << 10, "slot_bytes": 4096}


def accepted(taken: Taken) -> StreamTable:
    """Judge all frames as a receiver does: each is taken, none twice, none missing."""
    table = StreamTable()
    for frame in taken.frames:
        assert table.judge(frame) is Verdict.ACCEPT, (frame.kind, frame.seq)
        if frame.seq:
            state = table.streams[frame.stream]
            assert frame.row0 == state.next_row or frame.kind is Kind.GAP
        table.apply(frame)
    return table


def rows_of(taken: Taken) -> list[tuple[Any, ...]]:
    return [
        row for frame in taken.frames if frame.kind is Kind.PACKED for row in unpack_rows(SCHEMA, frame.body)
    ]


def messages_of(taken: Taken) -> list[bytes]:
    reader = MessageReader()
    infos = {frame.stream: decode_open(frame) for frame in taken.frames if frame.kind is Kind.OPEN}
    return [
        bytes(message.data)
        for frame in taken.frames
        for message in reader.read(infos[frame.stream], frame)
        if isinstance(message, DAQJobMessageStoreRaw)
    ]


def test_all_that_was_put_arrives_in_order_and_the_ring_is_removed_at_the_end(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        producer.tell("rows", first=0, count=20_000)
        pump(inlet, taken, lambda: taken.rows() == 20_000)
        producer.tell("close")
        producer.process.wait(LIMIT_S)
        pump(inlet, taken, lambda: inlet.all_dead_and_drained)
        inlet.scan()
        assert inlet.rings == {}
    assert rows_of(taken) == [row_of(n) for n in range(20_000)]
    table = accepted(taken)
    assert not table.streams
    assert [state.rows for state in table.tombstones.values()] == [20_000]
    assert list(runtime_dir.iterdir()) == []


def test_messages_of_any_size_arrive_whole(runtime_dir: Path) -> None:
    sizes = [0, 1, 7, 2047, 2048, 2049, 4095, 4096, 16_384, 16_385, 33_000, 65_536, 300_000, 5]
    messages = list(enumerate(sizes))
    taken = Taken()
    with Producer(runtime_dir, **SMALL) as producer, Inlet(runtime_dir, "up", [""], retire=True) as inlet:
        producer.tell("raw", messages=messages)
        pump(inlet, taken, lambda: taken.rows() == len(sizes))
        producer.tell("close")
        producer.process.wait(LIMIT_S)
        pump(inlet, taken, lambda: not inlet.rings)
    assert messages_of(taken) == [message_of(n, size) for n, size in messages]
    accepted(taken)


def test_a_lone_row_arrives_at_once(runtime_dir: Path) -> None:
    with Producer(runtime_dir, linger_s=5.0) as producer, Inlet(runtime_dir, "up", ["store"]) as inlet:
        taken = Taken()
        producer.ask("rows", first=0, count=1)
        pump(inlet, taken, lambda: taken.rows() == 1, limit_s=2.0)


def test_rows_that_follow_each_other_are_gathered_for_the_linger_time(runtime_dir: Path) -> None:
    with Producer(runtime_dir, linger_s=0.5) as producer, Inlet(runtime_dir, "up", ["store"]) as inlet:
        taken = Taken()
        producer.ask("rows", first=0, count=1)
        pump(inlet, taken, lambda: taken.rows() == 1, limit_s=2.0)
        for n in range(1, 50):
            producer.ask("rows", first=n, count=1)
        pump(inlet, taken, lambda: taken.rows() == 50)
        assert sum(1 for frame in taken.frames if frame.rows) < 10


def test_what_a_consumer_does_not_release_is_gathered_and_comes_after_the_linger_time(
    runtime_dir: Path,
) -> None:
    with Producer(runtime_dir, linger_s=0.02) as producer, Inlet(runtime_dir, "up", ["store"]) as inlet:
        taken = Taken()
        for n in range(50):
            producer.ask("rows", first=n, count=1)
        pump(inlet, taken, lambda: taken.rows() == 50, release=False)


def test_a_full_ring_makes_put_wait_until_something_is_released(runtime_dir: Path) -> None:
    with Producer(runtime_dir, **SMALL) as producer, Inlet(runtime_dir, "up", ["store"]) as inlet:
        taken = Taken()
        producer.tell("rows", first=0, count=10_000)
        held = 0
        while held < 40_000:
            pump(inlet, taken, lambda: True, release=False)
            held = sum(len(frame.raw) for frame in taken.frames)
        time.sleep(0.2)
        pump(inlet, taken, lambda: True, release=False)
        assert taken.rows() < 10_000
        ring = next(iter(inlet.rings.values()))
        ring.release(taken.runs[-1][1])
        pump(inlet, taken, lambda: taken.rows() == 10_000)
        answer = producer._answer()
        assert answer["put_blocked_s"] > 0.1
        assert answer["is_blocked"] is False
        assert rows_of(taken) == [row_of(n) for n in range(10_000)]


def test_a_put_with_a_limit_takes_what_it_says_and_nothing_of_the_rest(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        answer = producer.ask("rows", first=0, count=100_000, timeout_s=0.1)
        assert answer["error"] == "PutTimeout"
        count = answer["accepted"]
        assert 0 < count < 10_000
        refused = producer.ask("raw", messages=[(0, 300_000)], timeout_s=0.05)
        assert refused["error"] == "PutTimeout"
        pump(inlet, taken, lambda: taken.rows() == count)
        producer.ask("raw", messages=[(1, 100)])
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    assert rows_of(taken) == [row_of(n) for n in range(count)]
    assert messages_of(taken) == [message_of(1, 100)]
    accepted(taken)


def test_a_message_that_was_left_half_way_is_parted_from_the_next(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        assert producer.ask("raw", messages=[(0, 300_000)], timeout_s=0.1)["accepted"] == 0
        producer.tell("raw", messages=[(1, 200_000), (2, 10)])
        pump(inlet, taken, lambda: taken.rows() == 2)
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    assert messages_of(taken) == [message_of(1, 200_000), message_of(2, 10)]
    gaps = [gap_of(frame) for frame in taken.frames if frame.kind is Kind.GAP]
    assert [(rows, reason) for _, rows, reason in gaps] == [(0, "message not completed")]
    accepted(taken)


def test_losses_become_gaps_and_the_account_of_the_stream_goes_on(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        producer.ask("rows", first=0, count=3)
        producer.ask("loss", count=40, reason="overrun")
        producer.ask("loss", count=None, reason="unplugged")
        answer = producer.ask("rows", first=43, count=2)
        assert (answer["out_count"], answer["dropped_count"]) == (5, 40)
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    (state,) = accepted(taken).tombstones.values()
    assert (state.rows, state.gap_rows, state.gaps_unknown) == (5, 40, 1)
    assert [row[0] for row in rows_of(taken)] == [0, 1, 2, 43, 44]
    assert [frame.row0 for frame in taken.frames if frame.kind is Kind.PACKED][-1] == 43


def test_two_consumers_get_everything_and_the_slower_one_holds_the_ring(runtime_dir: Path) -> None:
    fast, slow = Taken(), Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as uplink,
        Inlet(runtime_dir, "operator", ["store.X"]) as operator,
    ):
        pump(operator, slow, lambda: operator.rings)
        pump(uplink, fast, lambda: uplink.rings)
        producer.tell("rows", first=0, count=8_000)
        pump(uplink, fast, lambda: fast.rows() > 1_000)
        while fast.rows() < 8_000:
            pump(operator, slow, lambda: True)
            pump(uplink, fast, lambda: True)
        producer.kill()
        pump(uplink, fast, lambda: uplink.all_dead_and_drained)
        uplink.scan()
        assert list(runtime_dir.glob("*.ring")), "the operator is not through with it"
        pump(operator, slow, lambda: not operator.rings)
        pump(uplink, fast, lambda: not uplink.rings)
    assert rows_of(fast) == rows_of(slow) == [row_of(n) for n in range(8_000)]
    assert [path.name for path in runtime_dir.iterdir()] == ["operator.wants"]


def test_a_consumer_is_told_only_of_the_topics_it_asked_for(runtime_dir: Path) -> None:
    taken, all_of_it = Taken(), Taken()
    with (
        Producer(runtime_dir, claims={"up": [""]}, **SMALL) as producer,
        Inlet(runtime_dir, "some", ["alarm"]) as some,
        Inlet(runtime_dir, "up", [""], retire=True) as up,
    ):
        pump(some, taken, lambda: some.rings)
        for n in range(6):
            producer.tell("rows", first=200 * n, count=200, topics=["store.X"], tag="a")
            producer.tell("rows", first=n, count=1, topics=["alarm.high", "store.X"], tag="b")
            producer.tell("rows", first=n, count=1, topics=["alarmist"], tag="c")
        pump(some, taken, lambda: taken.rows() == 6)  # before the other claim lets go of what it waits for
        pump(up, all_of_it, lambda: all_of_it.rows() == 1212)
        producer.kill()
        pump(some, taken, lambda: not some.rings)
    assert [row[0] for row in rows_of(taken)] == list(range(6))
    accepted(taken)


def test_a_consumer_that_comes_back_gets_what_it_had_not_released(runtime_dir: Path) -> None:
    first, second = Taken(), Taken()
    with Producer(runtime_dir) as producer:
        with Inlet(runtime_dir, "up", ["store"]) as inlet:
            producer.ask("rows", first=0, count=5)
            pump(inlet, first, lambda: first.rows() == 5)
            producer.ask("rows", first=5, count=5)
            pump(inlet, first, lambda: first.rows() == 10, release=False)
        with Inlet(runtime_dir, "up", ["store"], retire=True) as inlet:
            producer.ask("rows", first=10, count=5)
            pump(inlet, second, lambda: second.rows() == 10)
            producer.kill()
            pump(inlet, second, lambda: not inlet.rings)
    assert [row[0] for row in rows_of(second)] == list(range(5, 15))


def test_a_consumer_that_comes_back_after_the_death_goes_on_where_it_was(runtime_dir: Path) -> None:
    taken = Taken()
    with Producer(runtime_dir) as producer:
        with Inlet(runtime_dir, "operator", ["store"]) as inlet:
            pump(inlet, taken, lambda: inlet.rings)
            producer.ask("rows", first=0, count=5)
            pump(inlet, taken, lambda: taken.rows() == 5)
            producer.ask("rows", first=5, count=5)
            producer.kill()
            pump(inlet, taken, lambda: taken.rows() >= 10, release=False)
        again = Taken()
        with Inlet(runtime_dir, "operator", ["store"]) as inlet:
            pump(inlet, again, lambda: not inlet.rings)
        assert [row[0] for row in rows_of(again)] == list(range(5, 10))
        with Inlet(runtime_dir, "operator", ["store"]) as inlet:
            inlet.scan()
            assert inlet.rings == {}, "it is through with this ring"


def test_everything_of_a_ring_that_was_dead_before_anyone_looked_is_delivered(runtime_dir: Path) -> None:
    taken = Taken()
    with Producer(runtime_dir) as producer:
        producer.ask("rows", first=0, count=5000)
        producer.ask("event", metadata={"a": 1}, data="xyz")
        producer.kill()
    with Inlet(runtime_dir, "up", ["store"], retire=True) as inlet:
        pump(inlet, taken, lambda: not inlet.rings)
    assert rows_of(taken) == [row_of(n) for n in range(5000)]
    assert not accepted(taken).streams
    assert list(runtime_dir.iterdir()) == []


def _witness(producer: Producer, said: list[dict[str, Any]]) -> None:
    said += producer.last_answers()


@pytest.mark.parametrize("kind", ["rows", "columns", "raw"])
def test_what_put_has_returned_for_survives_kill_9(runtime_dir: Path, kind: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    choose = random.Random(seed)
    for _ in range(2):
        taken = Taken()
        with (
            Producer(runtime_dir, **SMALL) as producer,
            Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
        ):
            producer.tell("endless", kind=kind, largest=choose.choice([300, 9000]))
            witness: list[dict[str, Any]] = []
            reader = threading.Thread(target=_witness, args=(producer, witness))
            reader.start()
            pump(inlet, taken, taken.rows)
            end = time.monotonic() + choose.uniform(0.0, 0.2)
            while time.monotonic() < end:
                pump(inlet, taken, lambda: True)
            producer.process.kill()
            producer.process.wait()
            reader.join()
            pump(inlet, taken, lambda: not inlet.rings)
        table = accepted(taken)
        returned = witness[-1]["n"]
        (state,) = [s for s in table.tombstones.values() if s.rows]
        assert state.rows in (returned, returned + 1)
        if kind == "rows":
            assert rows_of(taken) == [row_of(n) for n in range(state.rows)]
        elif kind == "raw":
            found = messages_of(taken)
            assert [int.from_bytes(message[:8], "little") for message in found] == list(range(state.rows))
            assert all(message == message_of(n, len(message)) for n, message in enumerate(found))


def test_a_claim_that_is_withdrawn_lets_the_producer_go_on(runtime_dir: Path) -> None:
    with Producer(runtime_dir, claims={}, **SMALL) as producer:
        with Inlet(runtime_dir, "operator", ["store"]) as inlet:
            taken = Taken()
            producer.ask("rows", first=0, count=1)
            pump(inlet, taken, lambda: taken.rows() == 1, release=False)
            answer = producer.ask("rows", first=1, count=50_000, timeout_s=0.2)
            assert answer["error"] == "PutTimeout"
        withdraw_claim(runtime_dir, "operator")
        answer = producer.ask("rows", first=0, count=50_000, timeout_s=LIMIT_S)
        assert "error" not in answer
        producer.kill()
    sweep_rings(runtime_dir)
    assert list(runtime_dir.iterdir()) == []


def test_a_producer_born_later_holds_its_ring_for_a_consumer_that_is_away(runtime_dir: Path) -> None:
    Inlet(runtime_dir, "operator", ["store"]).close()
    taken = Taken()
    with Producer(runtime_dir, claims={}, **SMALL) as producer:
        producer.ask("rows", first=0, count=100)
        assert producer.ask("rows", first=0, count=50_000, timeout_s=0.1)["error"] == "PutTimeout"
        producer.kill()
        sweep_rings(runtime_dir)
    with Inlet(runtime_dir, "operator", ["store"]) as inlet:
        pump(inlet, taken, lambda: not inlet.rings)
    assert rows_of(taken)[:100] == [row_of(n) for n in range(100)]
    sweep_rings(runtime_dir)
    withdraw_claim(runtime_dir, "operator")
    assert list(runtime_dir.iterdir()) == []


def test_a_ring_that_nobody_claims_is_gone_when_its_job_ends_in_order(runtime_dir: Path) -> None:
    with Producer(runtime_dir, claims={}, **SMALL) as producer:
        producer.ask("rows", first=0, count=50_000)
        producer.tell("close")
        producer.process.wait(LIMIT_S)
        assert list(runtime_dir.iterdir()) == []


def test_a_ring_that_a_header_or_a_file_claims_is_not_swept(runtime_dir: Path) -> None:
    with Producer(runtime_dir) as held, Producer(runtime_dir, claims={}) as free:
        claim_path(runtime_dir, free.life, "operator").write_bytes(b"")
        held.kill()
        free.kill()
        sweep_rings(runtime_dir)
        assert {path.stem for path in runtime_dir.glob("*.ring")} == {held.life, free.life}


def test_a_process_does_not_see_its_own_ring_and_keeps_its_lock(runtime_dir: Path) -> None:
    identity = Identity("node", "job", "Type", "0123456789abcdef", "boot", {"up": ["store"]})
    with Outlet(runtime_dir, identity), Inlet(runtime_dir, "up", [""], retire=True) as inlet:
        inlet.scan()
        sweep_rings(runtime_dir)
        assert inlet.rings == {}
        pid = os.fork()
        if pid == 0:  # another process must still find the lock held
            from edgedaq.ring import is_alive

            fd = os.open(runtime_dir / "0123456789abcdef.ring", os.O_RDONLY)
            os._exit(0 if is_alive(fd) else 1)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_damaged_ring_of_the_dead_tells_what_is_whole_and_what_is_not_and_is_kept(
    runtime_dir: Path,
) -> None:
    taken = Taken()
    with Producer(runtime_dir, **SMALL) as bad, Producer(runtime_dir, **SMALL) as good:
        bad.ask("rows", first=0, count=1000)
        good.ask("rows", first=0, count=1000)
        bad.kill()
        good.kill()
        path = runtime_dir / f"{bad.life}.ring"
        data = bytearray(path.read_bytes())
        data[-(64 << 10) + 700] ^= 1  # in the first frame of rows in the data area
        path.write_bytes(data)
        (runtime_dir / "0000000000000000.ring").write_bytes(b"no ring")
        with Inlet(runtime_dir, "up", ["store"], retire=True) as inlet:
            pump(inlet, taken, lambda: not inlet.rings)
    assert path.with_suffix(".bad").exists()
    streams: dict[str, list[Frame]] = {life: [] for life in (bad.life, good.life)}
    lives = {f.stream: decode_open(f).life for f in taken.frames if f.kind is Kind.OPEN}
    for frame in taken.frames:
        streams[lives[frame.stream]].append(frame)
    taken.frames = streams[good.life]
    assert rows_of(taken) == [row_of(n) for n in range(1000)]
    gaps = [gap_of(frame) for frame in streams[bad.life] if frame.kind is Kind.GAP]
    assert [reason for _, _, reason in gaps] == ["damaged in shared memory"]
    taken.frames = streams[bad.life]
    lost = gaps[0][1]
    assert lost
    assert rows_of(taken) == [row_of(n) for n in range(lost, 1000)]
    assert taken.frames[-1].kind is Kind.CLOSE


def test_nonsense_on_the_socket_harms_neither_producer_nor_consumers(runtime_dir: Path) -> None:
    context = zmq.Context()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"ipc://{runtime_dir / producer.life}.sock")
            for raw in (
                b"",
                b"\xc1",
                b"\x80",
                b"\x82\xa4type\xa7release\xa8position\x05",
                b"\x82\xa4type\xa7release\xa8position\xff",
                b"\x83\xa4type\xa9subscribe\xa8consumer\xa3../\xa6topics\x90",
                b"x" * 4096,
            ):
                socket.send(raw)
            taken = Taken()
            producer.tell("rows", first=0, count=10_000)
            pump(inlet, taken, lambda: taken.rows() == 10_000)
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    context.term()
    assert rows_of(taken) == [row_of(n) for n in range(10_000)]


def test_a_release_beyond_what_was_delivered_is_refused(runtime_dir: Path) -> None:
    with Producer(runtime_dir) as producer, Inlet(runtime_dir, "up", ["store"]) as inlet:
        taken = Taken()
        producer.ask("rows", first=0, count=1)
        pump(inlet, taken, lambda: taken.rows() == 1, release=False)
        ring = inlet.rings[producer.life]
        with pytest.raises(ValueError, match="nothing beyond"):
            ring.release(taken.runs[-1][1] + 8)


def test_rows_of_many_threads_are_all_there_once(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        producer.tell("side", count=2000)
        pump(inlet, taken, lambda: taken.rows() == 8000)
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    accepted(taken)
    found = [row[0] for row in rows_of(taken)]
    assert sorted(found) == [*range(6000), *range(10**6, 10**6 + 2000)]
    for low, high in ((0, 2000), (2000, 4000), (4000, 6000), (10**6, 10**7)):
        mine = [n for n in found if low <= n < high]
        assert mine == sorted(mine), "each thread's rows are in order"


def test_more_streams_than_slots_take_turns_and_lose_nothing(runtime_dir: Path) -> None:
    taken = Taken()
    with (
        Producer(runtime_dir, slots=2, **SMALL) as producer,
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
    ):
        for n in range(60):
            producer.tell("rows", first=n * 3, count=3, tag=f"t{n % 7}")
        pump(inlet, taken, lambda: taken.rows() == 180)
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
    assert len(accepted(taken).tombstones) == 7
    assert sorted(row[0] for row in rows_of(taken)) == list(range(180))
