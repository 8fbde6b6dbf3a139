from __future__ import annotations

import dataclasses

from edgedaq.lifecycle import (
    Action,
    Child,
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
    )
    def begin(self, restart, limit, hang_s):
        self.policy = dataclasses.replace(POLICY, restart=restart, restart_limit=limit, hang_limit_s=hang_s)
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
