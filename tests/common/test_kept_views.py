from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edgedaq.frame import Kind, split
from edgedaq.inlet import Inlet
from edgedaq.kept_views import LARGE_BYTES, KeptViews
from edgedaq.messages import DAQJobMessage, DAQJobMessageStorePyArrow, DAQJobMessageStoreRaw, MessageReader

from tests.common.producing import LIMIT_S, Producer, message_of

np = pytest.importorskip("numpy")
RING: dict[str, Any] = {"ring_bytes": 1 << 20, "slot_bytes": 4096}
SIZE = 100_000


class Keeping:
    """A consumer that takes frames in place."""

    def __init__(self, inlet: Inlet) -> None:
        self.inlet = inlet
        self.kept = KeptViews()
        self.reader = MessageReader(views=True)

    def messages(self) -> Iterator[DAQJobMessage]:
        self.inlet.scan()
        for run in self.inlet.receive():
            for frame in self.kept.frames(run):
                info = run.ring.open_info(frame.stream)
                assert info
                yield from self.reader.read(info, frame, in_place=len(frame.raw) >= LARGE_BYTES)
            self.kept.done(run)
        self.kept.settle()

    def take(self, count: int, use: Callable[[Any], Any] = bytes) -> list[Any]:
        """Return what ``use`` makes of what so many messages hold."""
        found: list[Any] = []
        end = time.monotonic() + LIMIT_S
        while len(found) < count:
            assert time.monotonic() < end, f"waited in vain for {count}, got {len(found)}"
            found += [use(content(message)) for message in self.messages()]
            time.sleep(0.002)
        assert len(found) == count
        return found

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.002)


def same(data: Any) -> Any:
    return data


def content(message: DAQJobMessage) -> Any:
    if isinstance(message, DAQJobMessageStorePyArrow):
        return message.table
    assert isinstance(message, DAQJobMessageStoreRaw)
    return message.data


@pytest.fixture
def consumer(runtime_dir: Path) -> Iterator[Keeping]:
    with Inlet(runtime_dir, "up", ["store"], retire=True) as inlet:
        yield Keeping(inlet)


def test_a_view_that_is_kept_is_back_pressure_and_never_changes(runtime_dir: Path, consumer: Keeping) -> None:
    with Producer(runtime_dir, **RING) as producer:
        producer.ask("raw", messages=[(0, SIZE)])
        (kept,) = consumer.take(1, same)
        assert isinstance(kept, memoryview)
        assert kept.readonly
        array = np.frombuffer(kept[10:], "u1")  # of a part of a part, too
        del kept
        producer.tell("raw", messages=[(n, SIZE) for n in range(1, 30)])
        assert consumer.take(9) == [message_of(n, SIZE) for n in range(1, 10)]
        time.sleep(0.2)
        assert not list(consumer.messages()), "the ring is full"
        assert array.tobytes() == message_of(0, SIZE)[10:]
        del array
        consumer.take(20)
        assert producer._answer()["put_blocked_s"] > 0.1


def test_regions_are_released_in_order_whatever_order_their_views_end_in(
    runtime_dir: Path, consumer: Keeping
) -> None:
    choose = random.Random(7)
    held: list[tuple[int, memoryview]] = []
    number = 0
    with Producer(runtime_dir, **RING) as producer:
        producer.tell("raw", messages=[(n, SIZE + n) for n in range(200)])
        end = time.monotonic() + LIMIT_S
        while number < 200:
            assert time.monotonic() < end
            held += enumerate(map(content, consumer.messages()), number)
            number = max([number, *(n + 1 for n, _ in held)])
            assert all(bytes(view) == message_of(n, SIZE + n) for n, view in held)
            choose.shuffle(held)
            del held[: choose.randrange(1, 6)]
        held.clear()
        consumer.until(lambda: not list(consumer.messages()) and not consumer.kept.is_any_kept)
        assert producer._answer()["out_count"] == 200
        consumer.until(
            lambda: producer.ask("rows", first=0, count=0)["consumers"]["up"]["waiting_bytes"] == 0
        )


def test_without_that_care_a_kept_view_would_change(runtime_dir: Path) -> None:
    with (
        Inlet(runtime_dir, "up", ["store"], retire=True) as inlet,
        Producer(runtime_dir, **RING) as producer,
    ):
        producer.tell("raw", messages=[(n, SIZE) for n in range(40)])
        first: list[memoryview] = []
        end = time.monotonic() + LIMIT_S
        while not first or bytes(first[0]) == message_of(0, SIZE):
            assert time.monotonic() < end
            inlet.scan()
            for run in inlet.receive():
                first += [frame.body[4:] for frame in split(run.frames) if frame.kind is Kind.RAW]
                run.ring.release(run.end)


def test_a_record_batch_is_seen_where_it_was_written(runtime_dir: Path, consumer: Keeping) -> None:
    pytest.importorskip("pyarrow")
    with Producer(runtime_dir, **RING) as producer:
        producer.tell("arrow", firsts=[0, 7], count=10_000)
        first, second = consumer.take(2, same)
        ring = next(iter(consumer.inlet.rings.values()))
        begin = np.frombuffer(ring._data, "u1").ctypes.data
        for batch in (first, second):
            assert begin <= batch.column(0).buffers()[1].address < begin + ring.layout.ring_bytes
        producer.tell("arrow", firsts=[100] * 10, count=10_000)
        time.sleep(0.2)
        assert first.column(0).to_pylist() == list(range(10_000))
        assert second.column(1).to_pylist() == ["t7"] * 10_000
        del first, second, batch
        assert consumer.take(10, len) == [10_000] * 10


def test_a_view_outlives_its_ring_and_its_inlet(runtime_dir: Path) -> None:
    with Producer(runtime_dir, **RING) as producer:
        with Inlet(runtime_dir, "up", ["store"], retire=True) as inlet:
            consumer = Keeping(inlet)
            producer.ask("raw", messages=[(0, SIZE)])
            (kept,) = consumer.take(1, same)
            producer.kill()
            consumer.until(lambda: list(consumer.messages()) or all(r.is_dead for r in inlet.rings.values()))
            assert inlet.rings, "it waits for the view"
        for path in runtime_dir.iterdir():
            path.unlink()
        assert bytes(kept) == message_of(0, SIZE)


def test_small_frames_hold_nothing(runtime_dir: Path, consumer: Keeping) -> None:
    with Producer(runtime_dir, **RING) as producer:
        producer.ask("raw", messages=[(n, 2000) for n in range(10)])
        found = consumer.take(10)
    assert [type(data) for data in found] == [bytes] * 10
    assert not consumer.kept.is_any_kept
