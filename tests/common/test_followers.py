from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgedaq.claim_files import read_wants, withdraw_claim, withdraw_strangers
from edgedaq.inlet import Inlet

from tests.common.consuming import Consumer, spans
from tests.common.producing import LIMIT_S, Producer, Taken, pump

RING: dict[str, Any] = {"ring_bytes": 1 << 20, "slot_bytes": 16 << 10}
DROPPING = [{"policy": "drop_oldest", "limit": 128 << 10}, {"policy": "drop_newest", "limit": 128 << 10}]
MANY = 200_000  # rows of 18 bytes: several times the ring


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def connected(producer: Producer, name: str) -> None:
    """Wait until the producer knows a consumer: what was put before is not for it."""
    until(lambda: facts_of(producer, name).get("is_connected"))


def facts_of(producer: Producer, name: str) -> dict[str, Any]:
    answer = producer.ask("rows", first=0, count=0)
    found: dict[str, Any] = answer["consumers"].get(name, {})
    return found


def put_all(producer: Producer, inlet: Inlet, taken: Taken, first: int, count: int) -> dict[str, Any]:
    """Put rows while the first consumer takes them; return what the producer says then."""
    goal = taken.rows() + count
    producer.tell("rows", first=first, count=count)
    pump(inlet, taken, lambda: taken.rows() == goal)
    return producer._answer()


@pytest.fixture
def rings_dir(runtime_dir: Path) -> Path:
    (runtime_dir / "rings").mkdir()
    return runtime_dir / "rings"


@pytest.mark.parametrize("options", DROPPING, ids=lambda options: options["policy"])
def test_a_slow_consumer_misses_exactly_what_its_gaps_say_and_nobody_waits(
    runtime_dir: Path, rings_dir: Path, options: dict[str, Any]
) -> None:
    taken = Taken()
    with (
        Producer(rings_dir, **RING) as producer,
        Inlet(rings_dir, "up", ["store"], retire=True) as inlet,
        Consumer(runtime_dir, "slow", pause_s=0.01, **options) as slow,
    ):
        connected(producer, "slow")
        put_all(producer, inlet, taken, 0, 1)
        until(lambda: slow.rows == 1)
        answer = put_all(producer, inlet, taken, 1, MANY)
        facts = answer["consumers"]["slow"]
        assert facts["dropped_count"] > 0
        assert facts["waiting_bytes"] <= options["limit"] + (1 << 20) + (256 << 10)
        producer.tell("close")
        producer.process.wait()
        pump(inlet, taken, lambda: not inlet.rings)
        until(lambda: slow.rows + slow.missed == MANY + 1)
        slow.end()
        end, missed = spans(slow.said)
    assert end == MANY + 1
    assert missed


@pytest.mark.parametrize("options", DROPPING, ids=lambda options: options["policy"])
def test_a_stopped_consumer_costs_nobody_anything_and_learns_what_it_missed(
    runtime_dir: Path, rings_dir: Path, options: dict[str, Any]
) -> None:
    taken = Taken()
    with (
        Producer(rings_dir, **RING) as producer,
        Inlet(rings_dir, "up", ["store"], retire=True) as inlet,
        Consumer(runtime_dir, "stuck", **options) as stuck,
    ):
        connected(producer, "stuck")
        put_all(producer, inlet, taken, 0, 10)
        until(lambda: stuck.rows == 10)
        stuck.send(signal.SIGSTOP)
        answer = put_all(producer, inlet, taken, 10, MANY)
        dropped = answer["consumers"]["stuck"]["dropped_count"]
        assert dropped > MANY // 4
        stuck.send(signal.SIGCONT)
        put_all(producer, inlet, taken, MANY + 10, 5)
        until(lambda: stuck.rows + stuck.missed == MANY + 15)
        stuck.end()
        end, missed = spans(stuck.said)
        assert end == MANY + 15
        assert sum(last - first for first, last in missed) == dropped
        if options["policy"] == "drop_newest":
            assert missed[0][0] > 1000, "what came first was kept"
        else:
            assert missed[-1][1] < MANY, "what came last was kept"


@pytest.mark.parametrize("options", DROPPING, ids=lambda options: options["policy"])
def test_a_killed_consumer_that_comes_back_gets_what_is_left_and_a_gap(
    runtime_dir: Path, rings_dir: Path, options: dict[str, Any]
) -> None:
    taken = Taken()
    with Producer(rings_dir, **RING) as producer, Inlet(rings_dir, "up", ["store"], retire=True) as inlet:
        with Consumer(runtime_dir, "again", **options) as first:
            connected(producer, "again")
            put_all(producer, inlet, taken, 0, 10)
            until(lambda: first.rows == 10)
            first.end(signal.SIGKILL)
            put_all(producer, inlet, taken, 10, MANY)
        with Consumer(runtime_dir, "again", **options) as second:
            connected(producer, "again")
            put_all(producer, inlet, taken, MANY + 10, 1000)
            until(lambda: not facts_of(producer, "again")["waiting_bytes"])
            put_all(producer, inlet, taken, MANY + 1010, 1)
            until(lambda: begin(second.said) >= 0)
            until(lambda: spans(second.said, begin(second.said))[0] == MANY + 1011)
            dropped = facts_of(producer, "again")["dropped_count"]
            second.end()
        producer.kill()
        pump(inlet, taken, lambda: not inlet.rings)
        assert begin(second.said) in range(11), "it goes on where the first one was, or a little before"
        assert spans(first.said)[0] == 10
        assert second.missed == dropped > 0


@pytest.mark.parametrize("options", DROPPING, ids=lambda options: options["policy"])
def test_what_dies_with_its_producer_is_in_the_gaps_of_who_was_behind(
    runtime_dir: Path, rings_dir: Path, options: dict[str, Any]
) -> None:
    taken = Taken()
    with (
        Producer(rings_dir, **RING) as producer,
        Inlet(rings_dir, "up", ["store"], retire=True) as inlet,
        Consumer(runtime_dir, "behind", **options) as behind,
    ):
        connected(producer, "behind")
        put_all(producer, inlet, taken, 0, 10)
        until(lambda: behind.rows == 10)
        behind.send(signal.SIGSTOP)
        put_all(producer, inlet, taken, 10, MANY)
        producer.kill()
        behind.send(signal.SIGCONT)
        pump(inlet, taken, lambda: not inlet.rings)
        until(lambda: behind.rows + behind.missed == MANY + 10)
        behind.end()
        assert spans(behind.said)[0] == MANY + 10


def begin(said: list[list[Any]]) -> int:
    """Return the number of the row with which a later process began, as its first gap tells it."""
    missed = 0
    for kind, first, _ in list(said):
        if kind == "rows":
            return int(first) - missed
        missed += first
    return -1


def test_with_the_policy_wait_a_stopped_consumer_holds_the_producer_and_is_named(
    runtime_dir: Path, rings_dir: Path
) -> None:
    with (
        Producer(rings_dir, claims={}, **RING) as producer,
        Consumer(runtime_dir, "operator") as operator,
    ):
        connected(producer, "operator")
        producer.ask("rows", first=0, count=10)
        until(lambda: operator.rows == 10)
        operator.send(signal.SIGSTOP)
        assert producer.ask("rows", first=10, count=MANY, timeout_s=0.3)["error"] == "PutTimeout"
        producer.tell("stuck", first=MANY)
        blocked = producer._answer()
        assert blocked["blocked_by"] == "operator"
        operator.send(signal.SIGCONT)
        assert producer._answer()["blocked_by"] == ""
    withdraw_claim(rings_dir, "operator")


def test_a_consumer_whose_claim_was_withdrawn_gets_a_gap_when_it_returns(
    runtime_dir: Path, rings_dir: Path
) -> None:
    taken = Taken()
    with Producer(rings_dir, **RING) as producer, Inlet(rings_dir, "up", ["store"], retire=True) as inlet:
        with Consumer(runtime_dir, "operator") as operator:
            connected(producer, "operator")
            put_all(producer, inlet, taken, 0, 10)
            until(lambda: operator.rows == 10)
            put_all(producer, inlet, taken, 10, 10)
            until(lambda: operator.rows == 20)
        withdraw_claim(rings_dir, "operator")
        until(lambda: not facts_of(producer, "operator"))
        put_all(producer, inlet, taken, 20, MANY)
        with Consumer(runtime_dir, "operator") as operator:
            connected(producer, "operator")
            put_all(producer, inlet, taken, MANY + 20, 5)
            until(lambda: operator.rows == 5)
            operator.end()
        producer.kill()
        pump(inlet, taken, lambda: inlet.all_dead_and_drained)
    (gap, *rest) = operator.said
    assert gap[0] == "gap"
    assert gap[1] in (MANY, MANY + 10), "from what it had released"
    assert spans(rest, MANY + 20) == (MANY + 25, [])
    withdraw_claim(rings_dir, "operator")


def test_a_consumer_that_may_miss_something_holds_no_ring_and_no_producer(
    runtime_dir: Path, rings_dir: Path
) -> None:
    with Consumer(runtime_dir, "away", policy="drop_oldest") as away:
        away.end()
    with Producer(rings_dir, claims={}, **RING) as producer:
        assert "error" not in producer.ask("rows", first=0, count=MANY, timeout_s=LIMIT_S)
        with Consumer(runtime_dir, "away", policy="drop_oldest") as away:
            producer.ask("rows", first=MANY, count=10)
            until(lambda: away.rows + away.missed == MANY + 10)
            assert spans(away.said)[0] == MANY + 10, "the ring has known it from its birth"
        producer.tell("close")
        producer.process.wait()
    assert [path.name for path in rings_dir.iterdir()] == ["away.wants"]


def test_a_change_of_policy_takes_effect_with_the_next_life_of_the_consumer(
    runtime_dir: Path, rings_dir: Path
) -> None:
    with Producer(rings_dir, claims={}, **RING) as producer:
        with Consumer(runtime_dir, "operator") as operator:
            connected(producer, "operator")
            producer.ask("rows", first=0, count=10)
            until(lambda: operator.rows == 10)
        assert producer.ask("rows", first=10, count=MANY, timeout_s=0.2)["error"] == "PutTimeout"
        with Consumer(runtime_dir, "operator", policy="drop_oldest", limit=1 << 20) as operator:
            assert "error" not in producer.ask("rows", first=0, count=MANY, timeout_s=LIMIT_S)
        with Consumer(runtime_dir, "operator") as operator:
            until(lambda: facts_of(producer, "operator")["policy"] == "wait")
            producer.ask("rows", first=0, count=1)
            until(lambda: operator.rows == 1)
            assert operator.missed > 0
        producer.kill()
    withdraw_claim(rings_dir, "operator")


def test_claims_of_consumers_that_are_no_more_are_withdrawn(rings_dir: Path) -> None:
    for name in ("stays", "gone"):
        Inlet(rings_dir, name, ["store"]).close()
    (rings_dir / "0123456789abcdef.gone.claim").write_bytes(bytes(16))
    withdraw_strangers(rings_dir, {"stays", "other"})
    assert list(read_wants(rings_dir)) == ["stays"]
    assert [path.name for path in rings_dir.iterdir()] == ["stays.wants"]
