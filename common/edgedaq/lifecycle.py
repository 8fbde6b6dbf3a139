"""The life of a supervised process, a pure function: ``step(child, event, now, policy) -> (child, actions)``.

::

              Start                Started               Report(blocked)
    STOPPED ─────────► STARTING ─────────────► RUNNING ◄────────────────► BLOCKED
       ▲     Spawn        │  ▲                   │                           │
       │                  │  │ due: Spawn        │ Exited(failure)           │
       │                  ▼  │                   ▼                           │
       │ Exited(0)      BACKOFF ◄────────────────┴───────────────────────────┘
       │                  │ too often, or a configuration that cannot work
       │                  ▼
       │                FAILED ◄─── unkillable ───┐
       │                                          │ due twice: Kill, then this
       └────────────── STOPPING ──────────────────┘
            Exited        ▲ Stop (asked for), or the process hangs, takes too much or lost its link

A hang climbs a ladder: Reset (where the job can reset its device), STOPPING and a restart, FAILED. A failure
before the job has worked for the first time (put, taken, slept) is a startup error, with a policy of its own.

There is at most one process: ``has_process`` is true from ``Spawned`` to ``Exited``; no Spawn is asked
for while it is. A process that outlives SIGKILL is FAILED(``unkillable``); nothing is started in its place.
Only ``step`` makes a ``Child`` with another state. All times are monotonic nanoseconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from edgedaq.config import EXIT_CONFIG
from edgedaq.policy import CPU_OVER_S, Policy, backoff_s
from edgedaq.units import format_bytes

__all__ = [
    "Action",
    "Child",
    "Event",
    "Exited",
    "Hold",
    "LinkLost",
    "Report",
    "SpawnFailed",
    "Spawned",
    "Start",
    "Started",
    "State",
    "Stop",
    "Tick",
    "Usage",
    "failed",
    "step",
]

_S = 1_000_000_000


class State(enum.StrEnum):
    """What a supervised process is doing."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BLOCKED = "BLOCKED"
    STOPPING = "STOPPING"
    BACKOFF = "BACKOFF"
    FAILED = "FAILED"


class Action(enum.Enum):
    """What the supervisor is to do now; what comes of it, it tells by an event."""

    SPAWN = "spawn"
    ASK_STOP = "ask_stop"
    RESET = "reset"
    KILL = "kill"
    ALARM = "alarm"


@dataclass(frozen=True, slots=True)
class Start:
    """It is wanted: at the supervisor's start, or a person asks for it again."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """There is a process now."""


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The operating system would not start one. ``jitter`` is random, from 0 up to 1."""

    reason: str
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The process says that the job is made and begins."""


@dataclass(frozen=True, slots=True)
class Report:
    """The process told how it does: whether the job advanced since the last time, and is blocked in a put.

    ``blocked_by``: the consumer that it waits for, if known.
    """

    has_advanced: bool
    is_blocked: bool
    blocked_by: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process and its children take: memory of their own, and percent of one core."""

    memory_bytes: int
    cpu_percent: float


@dataclass(frozen=True, slots=True)
class Exited:
    """The kernel says that the process has ended; ``code`` is negative for a signal.

    ``was_stopped``: it ended in order, because somebody, not necessarily its supervisor, had told it to.
    """

    code: int
    reason: str = ""
    jitter: float = 0.0
    was_stopped: bool = False


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The process lives but closed its link, so that nobody could stop it in order."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Do not start it yet; ask again after ``wait_s``."""

    reason: str
    wait_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Stop:
    """It is not wanted any more. ``limit_s`` replaces the policy's stop limit where that is longer."""

    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Start | Spawned | SpawnFailed | Started | Report | Usage | Exited | LinkLost | Hold | Stop | Tick


@dataclass(frozen=True, slots=True)
class Child:
    """One supervised process.

    Args:
        since_ns: When ``state`` was entered.
        due_ns: When a ``Tick`` will do something; None if never.
        attempts: Restarts in a row without a healthy while between.
        restart_count: Restarts at all.
        reason: Why it is in this state, for a person.
        is_wanted: False once ``Stop`` was asked for.
        is_killed: SIGKILL was sent to this process.
        running_ns: When this process said that it has started; 0 before.
        advanced_ns: When it last advanced.
        has_worked: It has advanced in this life or an earlier one.
        is_reset: Its device was asked to reset, and it has not advanced since.
        over_cpu_ns: Since when it uses more than its ``cpu_limit``; 0 if it does not.
    """

    state: State = State.STOPPED
    since_ns: int = 0
    due_ns: int | None = None
    attempts: int = 0
    restart_count: int = 0
    reason: str = ""
    has_process: bool = False
    is_wanted: bool = False
    is_killed: bool = False
    running_ns: int = 0
    advanced_ns: int = 0
    has_worked: bool = False
    is_reset: bool = False
    over_cpu_ns: int = 0


Result = tuple[Child, tuple[Action, ...]]


def failed(reason: str) -> Child:
    """Return a child that never ran and is not going to, e.g. because its file is broken."""
    return Child(state=State.FAILED, reason=reason)


def step(child: Child, event: Event, now_ns: int, policy: Policy) -> Result:
    """Return the child after an event, and what is to be done. An event that does not fit changes nothing."""
    match event:
        case Start():
            return _start(child, now_ns)
        case Spawned():
            due_ns = now_ns + int(policy.start_limit_s * _S)
            if child.state is State.STARTING and not child.has_process:
                return replace(child, has_process=True, due_ns=due_ns), ()
        case SpawnFailed():
            if child.state is State.STARTING and not child.has_process:
                no_fault_of_it = replace(child, has_worked=True)
                return _after_failure(no_fault_of_it, event.reason, event.jitter, now_ns, policy)
        case Started():
            if child.state is State.STARTING and child.has_process:
                child = replace(child, running_ns=now_ns, advanced_ns=now_ns, is_reset=False, over_cpu_ns=0)
                return _enter(child, State.RUNNING, now_ns, due_ns=_hang_due(child, policy)), ()
        case Report():
            return _report(child, event, now_ns, policy), ()
        case Usage():
            if child.state in (State.RUNNING, State.BLOCKED):
                return _usage(child, event, now_ns, policy)
        case Exited():
            if child.has_process:
                return _exited(child, event, now_ns, policy)
        case LinkLost():
            if child.state in (State.STARTING, State.RUNNING, State.BLOCKED) and child.has_process:
                return _stop_process(child, "closed its link", policy.stop_limit_s, now_ns)
        case Hold():
            if child.state is State.BACKOFF:
                return replace(child, reason=event.reason, due_ns=now_ns + int(event.wait_s * _S)), ()
        case Stop():
            return _stop(child, event, now_ns, policy)
        case Tick():
            if child.due_ns is not None and now_ns >= child.due_ns:
                return _due(child, now_ns, policy)
    return child, ()


def _enter(child: Child, state: State, now_ns: int, *, reason: str = "", due_ns: int | None = None) -> Child:
    since_ns = child.since_ns if state is child.state else now_ns
    return replace(child, state=state, since_ns=since_ns, reason=reason, due_ns=due_ns)


def _hang_due(child: Child, policy: Policy) -> int | None:
    return None if policy.hang_limit_s is None else child.advanced_ns + int(policy.hang_limit_s * _S)


def _start(child: Child, now_ns: int) -> Result:
    if child.state is State.STOPPING or child.has_process:
        return child, ()
    if child.state in (State.STOPPED, State.FAILED):
        child = replace(child, is_wanted=True, is_killed=False, attempts=0, running_ns=0, has_worked=False)
        return _enter(child, State.STARTING, now_ns), (Action.SPAWN,)
    return child, ()


def _report(child: Child, event: Report, now_ns: int, policy: Policy) -> Child:
    if child.state not in (State.RUNNING, State.BLOCKED):
        return child
    # Who waits for room in its ring does what it was told to; it can only begin to hang when it could go on.
    if event.has_advanced or event.is_blocked or child.state is State.BLOCKED:
        child = replace(child, advanced_ns=now_ns, has_worked=True, is_reset=False)
    if event.is_blocked:
        return _enter(child, State.BLOCKED, now_ns, reason=_blocked(event.blocked_by))
    if child.is_reset:
        return child
    return _enter(child, State.RUNNING, now_ns, due_ns=_hang_due(child, policy))


def _usage(child: Child, event: Usage, now_ns: int, policy: Policy) -> Result:
    limit_bytes, limit_percent = policy.memory_limit_bytes, policy.cpu_limit_percent
    if limit_bytes is not None and event.memory_bytes > limit_bytes:
        held = format_bytes(event.memory_bytes)
        reason = f"took {held} of memory, more than {format_bytes(limit_bytes)} (memory_limit)"
        return _stop_process(child, reason, policy.stop_limit_s, now_ns)
    if limit_percent is None or event.cpu_percent <= limit_percent:
        return (replace(child, over_cpu_ns=0) if child.over_cpu_ns else child), ()
    if not child.over_cpu_ns:
        return replace(child, over_cpu_ns=now_ns), ()
    if now_ns - child.over_cpu_ns < CPU_OVER_S * _S:
        return child, ()
    reason = f"used {event.cpu_percent:.0f} % of a core, more than {limit_percent:g} % (cpu_limit)"
    return _stop_process(child, reason, policy.stop_limit_s, now_ns)


def _blocked(consumer: str) -> str:
    return f"its ring is full, held by {consumer}" if consumer else "its ring is full"


def _stop(child: Child, event: Stop, now_ns: int, policy: Policy) -> Result:
    child = replace(child, is_wanted=False)
    limit_s = policy.stop_limit_s if event.limit_s is None else min(event.limit_s, policy.stop_limit_s)
    if child.state is State.STOPPING:
        due_ns = now_ns + int(limit_s * _S)
        if not child.is_killed and (child.due_ns is None or due_ns < child.due_ns):
            child = replace(child, due_ns=due_ns)
        return child, ()
    if child.has_process and child.state is not State.FAILED:
        return _stop_process(child, "asked to stop", limit_s, now_ns)
    if child.state is State.FAILED:
        return child, ()
    return _enter(child, State.STOPPED, now_ns, reason=child.reason), ()


def _stop_process(child: Child, reason: str, limit_s: float, now_ns: int) -> Result:
    due_ns = now_ns + int(limit_s * _S)
    return _enter(child, State.STOPPING, now_ns, reason=reason, due_ns=due_ns), (Action.ASK_STOP,)


def _due(child: Child, now_ns: int, policy: Policy) -> Result:
    match child.state:
        case State.BACKOFF:
            child = replace(child, restart_count=child.restart_count + 1, is_killed=False, running_ns=0)
            return _enter(child, State.STARTING, now_ns, reason=child.reason), (Action.SPAWN,)
        case State.STARTING:
            reason = f"did not start within {policy.start_limit_s:g} s"
            return _stop_process(child, reason, policy.stop_limit_s, now_ns)
        case State.RUNNING if policy.has_reset and not child.is_reset:
            reason = f"did nothing for {policy.hang_limit_s:g} s (hang_limit), its device is being reset"
            child = replace(child, is_reset=True, due_ns=now_ns + int((policy.hang_limit_s or 0) * _S))
            return replace(child, reason=reason), (Action.RESET,)
        case State.RUNNING:
            reason = f"did nothing for {policy.hang_limit_s:g} s (hang_limit)"
            return _stop_process(child, reason, policy.stop_limit_s, now_ns)
        case State.STOPPING if not child.is_killed:
            due_ns = now_ns + int(policy.kill_limit_s * _S)
            return replace(child, is_killed=True, due_ns=due_ns), (Action.KILL,)
        case State.STOPPING:
            return _enter(child, State.FAILED, now_ns, reason="unkillable"), (Action.ALARM,)
    return replace(child, due_ns=None), ()


def _exited(child: Child, event: Exited, now_ns: int, policy: Policy) -> Result:
    state, why = child.state, child.reason
    child = replace(child, has_process=False)
    if state is State.FAILED:
        return replace(child, reason="was unkillable, has ended since"), ()
    if not child.is_wanted:
        return _enter(child, State.STOPPED, now_ns, reason="stopped"), ()
    if state is State.STOPPING:
        return _after_failure(child, why, event.jitter, now_ns, policy)
    if event.was_stopped:
        return _after_stop(child, event, now_ns, policy)
    if event.code == 0 and policy.restart != "always":
        return _enter(child, State.STOPPED, now_ns, reason="finished"), ()
    if event.code == EXIT_CONFIG:
        return _enter(child, State.FAILED, now_ns, reason=event.reason), (Action.ALARM,)
    reason = event.reason or ("finished" if event.code == 0 else f"ended with status {event.code}")
    return _after_failure(child, reason, event.jitter, now_ns, policy)


def _after_stop(child: Child, event: Exited, now_ns: int, policy: Policy) -> Result:
    """Start again what somebody else has stopped; it has not failed, so that costs it no attempt."""
    reason = "was stopped, not by its supervisor"
    if policy.restart == "never":
        return _enter(child, State.STOPPED, now_ns, reason=reason), ()
    due_ns = now_ns + int(backoff_s(policy, child.attempts, event.jitter) * _S)
    return _enter(child, State.BACKOFF, now_ns, reason=reason, due_ns=due_ns), ()


def _after_failure(child: Child, reason: str, jitter: float, now_ns: int, policy: Policy) -> Result:
    # While it hangs it is not well, however long that takes to be seen.
    healthy_until_ns = now_ns if policy.hang_limit_s is None else child.advanced_ns
    if child.running_ns and healthy_until_ns - child.running_ns >= policy.healthy_after_s * _S:
        child = replace(child, attempts=0)
    is_startup = not child.has_worked
    if is_startup and policy.startup_error == "ignore":
        return _enter(child, State.STOPPED, now_ns, reason=f"left out: {reason}"), ()
    if is_startup and policy.startup_error == "retry":
        return _back_off(child, reason, jitter, now_ns, policy)
    if policy.restart == "never" or (is_startup and policy.startup_error == "fail"):
        return _enter(child, State.FAILED, now_ns, reason=reason), (Action.ALARM,)
    if policy.restart_limit is not None and child.attempts >= policy.restart_limit:
        reason = f"gave up after {child.attempts} restarts: {reason}"
        return _enter(child, State.FAILED, now_ns, reason=reason), (Action.ALARM,)
    return _back_off(child, reason, jitter, now_ns, policy)


def _back_off(child: Child, reason: str, jitter: float, now_ns: int, policy: Policy) -> Result:
    due_ns = now_ns + int(backoff_s(policy, child.attempts, jitter) * _S)
    child = replace(child, attempts=child.attempts + 1)
    return _enter(child, State.BACKOFF, now_ns, reason=reason, due_ns=due_ns), ()
