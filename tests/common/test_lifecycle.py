from __future__ import annotations

import dataclasses
from typing import Literal

from edgedaq.lifecycle import (
    Action,
    Child,
    Event,
    Exited,
    Hold,
    LinkLost,
    Report,
    Spawned,
    SpawnFailed,
    Start,
    Started,
    State,
    Stop,
    Tick,
    Usage,
    failed,
    step,
)
from edgedaq.policy import Policy, backoff_s
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

S = 1_000_000_000
POLICY = Policy(backoff_initial_s=1.0, backoff_max_s=8.0, healthy_after_s=10.0, stop_limit_s=3.0)


class Story:
    """A child to which things happen, one after the other."""

    def __init__(self, policy=POLICY):
        self.policy = policy
        self.child = Child()
        self.now_ns = 0

    def at(self, now_s, *events):
        actions: tuple[Action, ...] = ()
        self.now_ns = int(now_s * S)
        for event in events:
            self.child, actions = step(self.child, event, self.now_ns, self.policy)
        return list(actions)

    @property
    def state(self) -> State:
        return self.child.state

    @property
    def wait_s(self):
        assert self.child.due_ns is not None
        return (self.child.due_ns - self.now_ns) / S


def running(policy=POLICY, now_s=0.0):
    story = Story(policy)
    assert story.at(now_s, Start()) == [Action.SPAWN]
    story.at(now_s, Spawned(), Started())
    assert story.state is State.RUNNING
    return story


def test_a_job_that_returns_has_finished_and_is_not_started_again():
    story = running()
    assert story.at(5, Exited(0)) == []
    assert (story.state, story.child.reason, story.child.due_ns) == (State.STOPPED, "finished", None)


def test_a_job_that_is_always_wanted_is_started_again_even_when_it_returns():
    story = running(dataclasses.replace(POLICY, restart="always"))
    story.at(5, Exited(0))
    assert story.state is State.BACKOFF


def test_a_job_that_somebody_else_stopped_is_started_again_at_no_cost():
    story = running(dataclasses.replace(POLICY, restart_limit=0))
    for now_s in range(10, 60, 10):
        assert story.at(now_s, Exited(-15, "stopped", was_stopped=True)) == []
        assert (story.state, story.child.attempts) == (State.BACKOFF, 0)
        assert story.at(now_s + 2, Tick()) == [Action.SPAWN]
        story.at(now_s + 3, Spawned())


def test_a_job_that_is_never_started_again_stays_stopped_when_somebody_stopped_it():
    story = running(dataclasses.replace(POLICY, restart="never"))
    assert story.at(5, Exited(0, "stopped", was_stopped=True)) == []
    assert (story.state, story.child.reason) == (State.STOPPED, "was stopped, not by its supervisor")


def test_a_failed_job_waits_twice_as_long_each_time_up_to_the_limit():
    story = running()
    waits = []
    for _ in range(6):
        story.at(story.now_ns / S, Exited(1, "boom", jitter=1.0))
        assert (story.state, story.child.reason) == (State.BACKOFF, "boom")
        waits.append(story.wait_s)
        assert story.at(story.child.due_ns / S, Tick()) == [Action.SPAWN]
        story.at(story.now_ns / S, Spawned(), Started())
    assert waits == [1, 2, 4, 8, 8, 8]
    assert story.child.restart_count == 6


def test_a_healthy_while_makes_the_next_wait_the_first_again():
    story = running()
    story.at(1, Exited(1, jitter=1.0))
    story.at(2, Tick(), Spawned(), Started())
    story.at(12, Exited(1, jitter=1.0))
    assert story.wait_s == 1.0
    assert story.child.restart_count == 1


def test_nothing_happens_before_it_is_due():
    story = running()
    story.at(0, Exited(1))
    before = story.child
    assert story.at(0.1, Tick()) == []
    assert story.child == before


def test_exhausted_restarts_fail_with_an_alarm_that_says_why():
    story = running(dataclasses.replace(POLICY, restart_limit=1))
    story.at(0, Exited(1, "boom"))
    story.at(5, Tick(), Spawned(), Started())
    assert story.at(6, Exited(1, "boom")) == [Action.ALARM]
    assert (story.state, story.child.reason) == (State.FAILED, "gave up after 1 restarts: boom")
    assert story.at(1000, Tick()) == []


def test_a_configuration_error_is_not_tried_again():
    story = running()
    assert story.at(0, Exited(78, "hv.toml: port must be ...")) == [Action.ALARM]
    assert story.state is State.FAILED


def test_a_person_can_start_a_failed_job_again():
    story = running(dataclasses.replace(POLICY, restart="never"))
    assert story.at(0, Exited(1, "x")) == [Action.ALARM]
    assert story.at(1, Start()) == [Action.SPAWN]


def test_what_cannot_be_spawned_is_tried_again_later():
    story = Story()
    story.at(0, Start(), SpawnFailed("no memory", jitter=1.0))
    assert (story.state, story.wait_s, story.child.reason) == (State.BACKOFF, 1.0, "no memory")


def test_a_stop_asks_then_kills_then_gives_up_and_nothing_is_started_in_its_place():
    story = running()
    assert story.at(1, Stop()) == [Action.ASK_STOP]
    assert story.at(3.9, Tick()) == []
    assert story.at(4, Tick()) == [Action.KILL]
    assert story.at(5.9, Tick()) == []
    assert story.at(6, Tick()) == [Action.ALARM]
    assert (story.state, story.child.reason) == (State.FAILED, "unkillable")
    assert story.at(7, Start()) == []
    assert story.at(8, Exited(-9)) == []
    assert (story.state, story.child.has_process) == (State.FAILED, False)
    assert story.at(9, Start()) == [Action.SPAWN]


def test_a_stopped_job_stays_stopped_however_it_ends():
    for code in (0, 1, 78, -9):
        story = running(dataclasses.replace(POLICY, restart="always"))
        story.at(1, Stop(), Exited(code))
        assert story.state is State.STOPPED


def test_a_group_can_shorten_the_stop_limit_but_not_lengthen_it():
    story = running()
    story.at(0, Stop(1.0))
    assert story.wait_s == 1.0
    story = running()
    story.at(0, Stop(100.0))
    assert story.wait_s == 3.0


def test_a_stop_during_back_off_ends_the_waiting():
    story = running()
    story.at(0, Exited(1))
    assert story.at(0.1, Stop()) == []
    assert (story.state, story.child.due_ns) == (State.STOPPED, None)


def test_a_stop_that_comes_while_a_hung_job_is_being_ended_keeps_it_down():
    story = running(dataclasses.replace(POLICY, hang_limit_s=2.0))
    assert story.at(2, Tick()) == [Action.ASK_STOP]
    story.at(2.5, Stop(), Exited(0))
    assert story.state is State.STOPPED


def test_a_job_that_does_nothing_is_restarted_only_where_a_hang_limit_is_set():
    quiet = running()
    quiet.at(10_000, Report(has_advanced=False, is_blocked=False), Tick())
    assert quiet.state is State.RUNNING
    story = running(dataclasses.replace(POLICY, hang_limit_s=5.0))
    story.at(4, Report(has_advanced=True, is_blocked=False))
    assert story.at(8.9, Report(has_advanced=False, is_blocked=False), Tick()) == []
    assert story.at(9, Tick()) == [Action.ASK_STOP]
    story.at(9.5, Exited(0, "asked", jitter=1.0))
    assert (story.state, story.child.reason) == (State.BACKOFF, "did nothing for 5 s (hang_limit)")


def test_a_job_that_is_blocked_in_put_never_hangs():
    story = running(dataclasses.replace(POLICY, hang_limit_s=5.0))
    story.at(1, Report(has_advanced=False, is_blocked=True))
    assert story.child.reason == "its ring is full"
    assert story.at(10_000, Tick()) == []
    assert story.state is State.BLOCKED
    story.at(10_001, Report(has_advanced=False, is_blocked=False))
    assert (story.state, story.wait_s) == (State.RUNNING, 5.0)


def test_a_process_that_never_says_it_has_started_is_ended_and_tried_again():
    story = Story()
    story.at(0, Start(), Spawned())
    assert story.at(60, Tick()) == [Action.ASK_STOP]
    story.at(61, Exited(-15, jitter=1.0))
    assert (story.state, story.child.reason) == (State.BACKOFF, "did not start within 60 s")


def test_a_process_without_a_link_is_ended_and_started_again():
    story = running()
    assert story.at(1, LinkLost()) == [Action.ASK_STOP]
    story.at(2, Exited(0, jitter=1.0))
    assert (story.state, story.child.reason) == (State.BACKOFF, "closed its link")


def test_a_restart_can_be_held_back_without_counting():
    story = running()
    story.at(0, Exited(1))
    story.at(5, Hold("2 rings wait", 1.0))
    assert (story.state, story.wait_s, story.child.reason) == (State.BACKOFF, 1.0, "2 rings wait")
    assert story.child.restart_count == 0
    assert story.at(6, Tick()) == [Action.SPAWN]


def test_a_broken_file_is_failed_and_never_started_by_time_alone():
    child, actions = step(failed("hv.toml: x"), Tick(), S, POLICY)
    assert (child.state, actions) == (State.FAILED, ())
    child, actions = step(child, Stop(), S, POLICY)
    assert (child.state, actions) == (State.FAILED, ())


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_wait_is_never_longer_than_the_limit_nor_shorter_than_half_of_the_first(attempt, jitter):
    assert 0.5 * POLICY.backoff_initial_s <= backoff_s(POLICY, attempt, jitter) <= POLICY.backoff_max_s


class Lifecycle(RuleBasedStateMachine):
    """Against what the operating system really has: the process, and whether it was ever asked to end."""

    @initialize(
        restart=st.sampled_from(["always", "on_failure", "never"]),
        limit=st.sampled_from([None, 0, 2]),
        hang_s=st.sampled_from([None, 4.0]),
        startup=st.sampled_from(["restart", "retry", "fail", "ignore"]),
        has_reset=st.booleans(),
    )
    def begin(self, restart, limit, hang_s, startup, has_reset):
        self.policy = dataclasses.replace(
            POLICY,
            restart=restart,
            restart_limit=limit,
            hang_limit_s=hang_s,
            startup_error=startup,
            has_reset=has_reset,
            memory_limit_bytes=100,
            cpu_limit_percent=50.0,
        )
        self.child = Child()
        self.now_ns = 0
        self.processes = 0
        self.is_asked = False
        self.is_killed = False
        self.is_stopped = True
        self.spawns = 0

    def happen(self, event):
        self.child, actions = step(self.child, event, self.now_ns, self.policy)
        for action in actions:
            if action is Action.SPAWN:
                assert self.processes == 0, "two processes of one job"
                assert not self.is_stopped or isinstance(event, Start), "started though it was stopped"
                self.spawns += 1
                self.is_asked = self.is_killed = False
            if action is Action.ASK_STOP:
                assert self.processes == 1
                self.is_asked = True
            if action is Action.RESET:
                assert self.processes == 1
                assert self.policy.has_reset
            if action is Action.KILL:
                assert self.processes == 1
                assert self.is_asked, "killed without having been asked"
                self.is_killed = True
            if action is Action.ALARM:
                assert self.child.state is State.FAILED
                assert self.child.reason
        if isinstance(event, Start) and actions:
            self.is_stopped = False
        if isinstance(event, Stop):
            self.is_stopped = True
        return actions

    @rule()
    def start(self):
        if Action.SPAWN in self.happen(Start()):
            self.spawned()

    def spawned(self):
        self.processes = 1
        self.happen(Spawned())

    @rule(seconds=st.floats(0.01, 20))
    def time_passes(self, seconds):
        self.now_ns += int(seconds * S)
        if Action.SPAWN in self.happen(Tick()):
            self.spawned()

    @rule(reason=st.just("none left"))
    def a_spawn_fails(self, reason):
        if self.child.state is State.BACKOFF and self.child.due_ns is not None:
            self.now_ns = max(self.now_ns, self.child.due_ns)
            assert self.happen(Tick()) == (Action.SPAWN,)
            self.happen(SpawnFailed(reason))

    @precondition(lambda self: self.processes)
    @rule()
    def it_starts(self):
        self.happen(Started())

    @precondition(lambda self: self.processes)
    @rule(advanced=st.booleans(), blocked=st.booleans())
    def it_reports(self, advanced, blocked):
        self.happen(Report(advanced, blocked))

    @precondition(lambda self: self.processes)
    @rule(code=st.sampled_from([0, 1, 78, -9, -15]))
    def it_ends(self, code):
        self.processes = 0
        self.happen(Exited(code, "x", 0.5))

    @precondition(lambda self: self.processes)
    @rule(memory=st.sampled_from([10, 101]), cpu=st.sampled_from([10.0, 90.0]))
    def it_takes(self, memory, cpu):
        self.happen(Usage(memory, cpu))

    @rule()
    def its_link_ends(self):
        self.happen(LinkLost())

    @rule(limit_s=st.sampled_from([None, 0.5]))
    def stop(self, limit_s):
        self.happen(Stop(limit_s))

    @rule()
    def hold(self):
        self.happen(Hold("rings"))

    @invariant()
    def it_knows_whether_there_is_a_process(self):
        assert self.child.has_process == bool(self.processes)

    @invariant()
    def a_state_with_a_process_has_one_and_a_state_without_has_none(self):
        if self.child.state in (State.RUNNING, State.BLOCKED, State.STOPPING):
            assert self.processes
        if self.child.state in (State.STOPPED, State.BACKOFF):
            assert not self.processes

    @invariant()
    def it_never_waits_for_nothing(self):
        if self.child.state in (State.BACKOFF, State.STOPPING):
            assert self.child.due_ns is not None
        if self.child.state in (State.STOPPED, State.FAILED):
            assert self.child.due_ns is None

    @invariant()
    def whoever_was_stopped_is_down_or_on_the_way(self):
        if self.is_stopped:
            assert self.child.state in (State.STOPPED, State.STOPPING, State.FAILED)

    @invariant()
    def restarts_are_counted(self):
        assert self.child.restart_count <= self.spawns


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_startup_error_has_a_policy_of_its_own_until_the_job_has_worked_once():
    behaviors: dict[Literal["fail", "ignore", "retry"], State] = {
        "fail": State.FAILED,
        "ignore": State.STOPPED,
        "retry": State.BACKOFF,
    }
    for behavior, state in behaviors.items():
        policy = dataclasses.replace(POLICY, startup_error=behavior, restart_limit=0)
        story = running(policy)
        actions = story.at(1, Exited(1, "no such device", jitter=1.0))
        assert (story.state, actions) == (state, [Action.ALARM] if behavior == "fail" else [])
        assert "no such device" in story.child.reason
        story = running(policy)
        story.at(1, Report(has_advanced=True, is_blocked=False))
        assert story.at(2, Exited(1, "unplugged")) == [Action.ALARM]
        assert story.child.reason == "gave up after 0 restarts: unplugged"


def test_an_absent_device_is_retried_for_ever_with_back_off():
    story = running(dataclasses.replace(POLICY, startup_error="retry", restart="never", restart_limit=1))
    for _ in range(50):
        story.at(story.now_ns / S, Exited(1, "absent", jitter=1.0))
        assert story.state is State.BACKOFF
        story.at(story.child.due_ns / S, Tick(), Spawned(), Started())
    assert story.child.restart_count == 50


def test_a_person_who_starts_a_job_again_gives_its_device_a_new_chance():
    story = running(dataclasses.replace(POLICY, startup_error="fail"))
    story.at(1, Report(has_advanced=True, is_blocked=False), Stop(), Exited(0))
    story.at(2, Start(), Spawned(), Started())
    assert story.at(3, Exited(1, "absent")) == [Action.ALARM]


def test_a_hang_climbs_a_ladder_reset_restart_failed():
    story = running(dataclasses.replace(POLICY, hang_limit_s=5.0, has_reset=True, restart_limit=1))
    story.at(0, Report(has_advanced=True, is_blocked=False))
    assert story.at(5, Tick()) == [Action.RESET]
    assert story.child.reason == "did nothing for 5 s (hang_limit), its device is being reset"
    assert story.at(6, Report(has_advanced=False, is_blocked=False), Tick()) == []
    assert story.at(10, Tick()) == [Action.ASK_STOP]
    story.at(11, Exited(0, jitter=1.0))
    assert (story.state, story.wait_s) == (State.BACKOFF, 1.0)
    story.at(12, Tick(), Spawned(), Started())
    assert story.at(17, Tick()) == [Action.RESET]
    assert story.at(22, Tick()) == [Action.ASK_STOP]
    assert story.at(23, Exited(0)) == [Action.ALARM]
    assert story.state is State.FAILED


def test_a_reset_that_helps_ends_the_ladder():
    story = running(dataclasses.replace(POLICY, hang_limit_s=5.0, has_reset=True))
    assert story.at(5, Tick()) == [Action.RESET]
    story.at(7, Report(has_advanced=True, is_blocked=False))
    assert (story.state, story.wait_s, story.child.reason) == (State.RUNNING, 5.0, "")
    assert story.at(12, Tick()) == [Action.RESET]


def test_a_job_that_takes_too_much_memory_is_ended_and_started_again():
    story = running(dataclasses.replace(POLICY, memory_limit_bytes=100 << 20))
    assert story.at(1, Usage(100 << 20, 500.0)) == []
    assert story.at(2, Usage((100 << 20) + 1, 0.0)) == [Action.ASK_STOP]
    assert story.at(3, Usage(1 << 40, 0.0)) == []
    story.at(4, Exited(0, jitter=1.0))
    assert story.state is State.BACKOFF
    assert story.child.reason == "took 100 MiB of memory, more than 100 MiB (memory_limit)"


def test_a_job_may_use_more_than_its_share_of_a_core_for_ten_seconds():
    story = running(dataclasses.replace(POLICY, cpu_limit_percent=50.0))
    for now_s in range(1, 10):
        assert story.at(now_s, Usage(0, 90.0)) == []
    story.at(10, Usage(0, 50.0))
    for now_s in range(11, 21):
        assert story.at(now_s, Usage(0, 90.0)) == []
    assert story.at(21, Usage(0, 90.0)) == [Action.ASK_STOP]
    assert story.child.reason == "used 90 % of a core, more than 50 % (cpu_limit)"


def test_no_order_of_events_reaches_a_state_that_promises_something_else():
    """Every event in every state that can be reached at all, up to equal children; no randomness."""
    policy = Policy(
        backoff_initial_s=1.0, backoff_max_s=1.0, hang_limit_s=1.0, has_reset=True, restart_limit=2,
        stop_limit_s=1.0, start_limit_s=1.0, kill_limit_s=1.0, memory_limit_bytes=10, healthy_after_s=1000.0,
    )  # fmt: skip
    events: list[Event] = [
        Start(), Spawned(), SpawnFailed("none left"), Started(), Report(True, False), Report(False, False),
        Report(False, True), Usage(5, 0.0), Usage(11, 0.0), Exited(0), Exited(1, "x"), Exited(78, "x"),
        Exited(-15, "stopped", was_stopped=True), LinkLost(), Hold("rings"), Stop(), Stop(0.5), Tick(),
    ]  # fmt: skip
    waiting, seen, visited = [Child()], set(), set()
    while waiting:
        child = waiting.pop()
        for event in events:
            now_ns = 1 if child.due_ns is None or not isinstance(event, Tick) else child.due_ns
            after, actions = step(child, event, now_ns, policy)
            visited.add((child.state, type(event)))
            check(child, event, after, actions)
            after = normal(after)
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    assert visited == {(state, type(event)) for state in State for event in events}
    assert len(seen) < 5000


def normal(child: Child) -> Child:
    """Return the child without what only grows: times, counts, and the words of reasons."""
    return dataclasses.replace(
        child,
        since_ns=0,
        due_ns=None if child.due_ns is None else 0,
        restart_count=0,
        reason="",
        running_ns=min(child.running_ns, 1),
        advanced_ns=min(child.advanced_ns, 1),
        over_cpu_ns=min(child.over_cpu_ns, 1),
    )


def check(before: Child, event: Event, after: Child, actions: tuple[Action, ...]) -> None:
    if Action.SPAWN in actions:
        assert not before.has_process
        assert after.state is State.STARTING
        assert after.is_wanted
    if Action.ASK_STOP in actions:
        assert (before.has_process, after.state) == (True, State.STOPPING)
    if Action.RESET in actions:
        assert (before.has_process, after.state) == (True, State.RUNNING)
    if Action.KILL in actions:
        assert before.state is State.STOPPING
        assert not before.is_killed
    assert (Action.ALARM in actions) == (after.state is State.FAILED and before.state is not State.FAILED)
    if after.state in (State.RUNNING, State.BLOCKED, State.STOPPING):
        assert after.has_process
    if after.state in (State.STOPPED, State.BACKOFF):
        assert not after.has_process
    if after.state in (State.BACKOFF, State.STOPPING):
        assert after.due_ns is not None
    if after.state in (State.STOPPED, State.FAILED):
        assert after.due_ns is None
    if not after.is_wanted:
        assert after.state in (State.STOPPED, State.STOPPING, State.FAILED)
    if isinstance(event, Exited):
        assert not after.has_process
