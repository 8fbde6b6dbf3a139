"""One supervised worker: its process, its link and its account; a thin shell around ``lifecycle``.

All that changes its state goes through ``handle``, which asks ``lifecycle.step`` what to do and does it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from edgedaq import lifecycle
from edgedaq.child_process import has_ended, reason_of, volunteer
from edgedaq.claim_files import withdraw_claim
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import WireError
from edgedaq.lifecycle import Action, Event, State
from edgedaq.link import Link, LinkClosed
from edgedaq.process_usage import UsageMeter
from edgedaq.stats import JobReport, Snapshot, fold, snapshot_from_map
from edgedaq.worker_plan import WorkerPlan

__all__ = ["WorkerProcess", "worker_environment"]

UNDRAINED_RINGS_MAX = 2
"""Rings of ended lives that may wait to be read before another life of the job begins."""

REASON_MAX = 500
_TOPICS_MAX = 256

LINK_GRACE_NS = 1_000_000_000
"""How long a process may live on after its link has ended; an orderly end takes a moment between the two."""

_NO_PROGRESS: tuple[Any, ...] = (0, 0, 0)

_jitter = random.random


class WorkerProcess:
    """One worker as its supervisor holds it. Not thread-safe."""

    def __init__(
        self,
        plan: WorkerPlan,
        *,
        rings_dir: Path,
        environment: Mapping[str, str],
        on_message: Callable[[str, dict[str, Any]], None],
        logger: Any,
    ) -> None:
        self.plan = plan
        self.child = lifecycle.failed(plan.problem) if plan.problem else lifecycle.Child()
        self.link: Link | None = None
        self.pid = 0
        self.snapshot: Snapshot | None = None
        self.topics: list[str] = []
        self.note = ""
        self.is_removed = False
        self._meter: UsageMeter | None = None
        self._next_plan: WorkerPlan | None = None
        self._rings_dir = rings_dir
        self._environment = dict(environment)
        self._on_message = on_message
        self._log = logger.bind(job=plan.unique_id)
        self._process: subprocess.Popen[bytes] | None = None
        self._folded: Snapshot | None = None
        self._last_restart_ns = 0
        self._ended_reason = ""
        self._progress: tuple[Any, ...] = _NO_PROGRESS
        self._lost_ns = 0
        self._ended_lives: list[str] = []
        if plan.problem:
            self._log.error("job.failed", reason=plan.problem)

    @property
    def is_alive(self) -> bool:
        """True while there is a process that a stop has to wait for."""
        return self.child.has_process and self.child.state is not State.FAILED

    @property
    def has_begun(self) -> bool:
        """True unless a start is under way; a part of EdgeDAQ itself has to say that it works, or to fail."""
        child = self.child
        if not self.plan.is_part:
            return child.state is not State.STARTING
        return child.has_worked or child.attempts > 0 or child.state in (State.FAILED, State.STOPPED)

    def report(self) -> JobReport:
        """Return the account of all its lives."""
        return JobReport(
            job=self.plan.unique_id,
            job_type=self.plan.job_type,
            state=str(self.child.state),
            restart_count=self.child.restart_count,
            last_restart_ns=self._last_restart_ns,
            folded=self._folded,
            current=self.snapshot,
        )

    def handle(self, event: Event) -> None:
        """Let something happen to it."""
        before = self.child
        self.child, actions = lifecycle.step(before, event, mono_ns(), self.plan.policy)
        self._tell(before, self.child)
        self._act(actions)
        if self._next_plan is not None and not self.child.has_process:
            self._begin_next()

    def change(self, plan: WorkerPlan) -> None:
        """Run by another plan: end what runs by the old one in order, then begin."""
        self._next_plan = plan
        self.note, self.is_removed = "", False
        self.handle(lifecycle.Stop())

    def remove(self) -> None:
        """End it for good, because its file is gone; its account stays."""
        self.is_removed, self._next_plan = True, None
        self.note = "its file was removed"
        self.handle(lifecycle.Stop())

    def forget_change(self) -> None:
        """Do not begin by another plan: everything is to end."""
        self._next_plan = None

    def watch(self) -> None:
        """Measure what its process takes, where its policy limits that. Once a second."""
        policy = self.plan.policy
        if not self.child.has_process or not (policy.memory_limit_bytes or policy.cpu_limit_percent):
            self._meter = None
            return
        if self._meter is None or self._meter.pid != self.pid:
            self._meter = UsageMeter(self.pid)
        usage = self._meter.read()
        if usage is not None:
            self.handle(lifecycle.Usage(*usage))

    def _begin_next(self) -> None:
        plan, self._next_plan = self._next_plan, None
        if plan is None:
            return
        self.plan = plan
        restart_count = self.child.restart_count
        child = lifecycle.failed(plan.problem) if plan.problem else lifecycle.Child()
        self.child = replace(child, restart_count=restart_count)
        if plan.problem:
            self._log.error("job.failed", reason=plan.problem)
        else:
            self.handle(lifecycle.Start())

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Action.SPAWN:
                    self._spawn()
                case Action.ASK_STOP:
                    self._ask_stop()
                case Action.RESET:
                    self._log.warning("device.reset", reason=self.child.reason)
                    self.send({"type": "reset"})
                case Action.KILL:
                    self._log.warning("job.killed", pid=self.pid, reason="did not stop in time")
                    self._signal_group(signal.SIGKILL)
                case Action.ALARM:
                    self._log.error("job.failed", reason=self.child.reason)
                    withdraw_claim(self._rings_dir, self.plan.unique_id)

    def tick(self, now_ns: int) -> None:
        """Do what is due by time alone."""
        if self._lost_ns and now_ns - self._lost_ns > LINK_GRACE_NS:
            self._lost_ns = 0
            self.handle(lifecycle.LinkLost())
        if self.child.due_ns is None or now_ns < self.child.due_ns:
            return
        waiting = self._undrained() if self.child.state is State.BACKOFF else 0
        if waiting >= UNDRAINED_RINGS_MAX:
            self.handle(lifecycle.Hold(f"{waiting} rings of earlier lives wait to be read"))
        else:
            self.handle(lifecycle.Tick())

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message to the worker; False if it did not take it. Never blocks."""
        if self.link is None:
            return False
        try:
            return self.link.send(message)
        except LinkClosed:
            return False

    def service(self) -> None:
        """Take what the worker has sent."""
        if self.link is None:
            return
        try:
            if self.link.has_pending:
                self.link.flush()
            messages = self.link.receive()
        except LinkClosed:
            self._drop_link()
            self._lost_ns = mono_ns()
            return
        for message in messages:
            self._take(message)

    def reap(self) -> bool:
        """Notice the end of its process, if it has ended; True if so."""
        process = self._process
        if process is None or not has_ended(process.pid):
            return False
        self._signal_group(signal.SIGKILL)  # what a driver started must not outlive it
        code = process.wait()
        if self.link is not None:
            with contextlib.suppress(LinkClosed):
                for message in self.link.receive():
                    self._take(message)
            self._drop_link()
        self._process = None
        self._lost_ns = 0
        if self.snapshot is not None:
            self.snapshot = msgspec.structs.replace(
                self.snapshot,
                in_queue=None,
                out_queue=None,
                is_blocked=False,
                blocked_by="",
                cpu_percent=None,
                rss_bytes=None,
            )
        # A process that SIGTERM ends has not begun yet, or it would have taken it.
        was_stopped = self._ended_reason == "stopped" or code == -signal.SIGTERM
        reason = "stopped" if was_stopped else self._ended_reason or reason_of(code)
        self._log.info("job.ended", pid=self.pid, status=code, reason=reason)
        self.handle(lifecycle.Exited(code, reason, _jitter(), was_stopped))
        return True

    def settle(self) -> None:
        """Add the account of a life that has ended to the sum; after a report, so that one shows its end."""
        if self._process is None and self.snapshot is not None:
            self._folded = fold(self._folded, self.snapshot)
            self.snapshot = None

    def close(self) -> None:
        """Let go of the worker: it ends by itself when its link does."""
        self._drop_link()

    def _spawn(self) -> None:
        self.settle()
        if self.child.restart_count:
            self._last_restart_ns = utc_ns()
        self._ended_reason = ""
        self._progress = _NO_PROGRESS
        self._lost_ns = 0
        link, theirs = Link.pair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "edgedaq.worker", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the supervisor alone, which stops them in order
                )
        except OSError as e:
            link.close()
            self.handle(lifecycle.SpawnFailed(f"cannot be started: {e.strerror}", _jitter()))
            return
        self.link = link
        self.pid = self._process.pid
        if not self.plan.is_part:
            volunteer(self.pid)
        self.handle(lifecycle.Spawned())
        needs_reset = self.plan.policy.has_reset and self.child.attempts > 0
        self.send({"type": "spec", **self.plan.spec, "needs_reset": needs_reset})

    def _ask_stop(self) -> None:
        self.send({"type": "stop"})
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def _signal_group(self, number: int) -> None:
        if self.pid <= 0:  # killpg(0) would be this process's own group
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _drop_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "started":
                life = message.get("life")
                if isinstance(life, str) and life:
                    self._ended_lives.append(life)
                self.handle(lifecycle.Started())
            case "report":
                self._take_snapshot(message)
                self._take_topics(message.get("topics"))
                held = self.snapshot
                if held is not None:
                    advanced = self._has_advanced(message)
                    self.handle(lifecycle.Report(advanced, held.is_blocked, held.blocked_by))
            case "working":
                self.handle(lifecycle.Report(has_advanced=True, is_blocked=False))
            case "ended":
                self._take_snapshot(message)
                is_blocked = self.child.state is State.BLOCKED
                self.handle(lifecycle.Report(self._has_advanced(message), is_blocked))
                self._ended_reason = " ".join(str(message.get("reason", "")).split())[:REASON_MAX]
            case _:
                self._on_message(self.plan.unique_id, message)

    def _take_snapshot(self, message: dict[str, Any]) -> None:
        if message.get("snapshot") is None:
            return
        try:
            self.snapshot = snapshot_from_map(message["snapshot"])
        except WireError as e:
            self._log.warning("report.rejected", reason=str(e))

    def _take_topics(self, topics: Any) -> None:
        """Note the live topics of what it has put; those of earlier lives stay known."""
        if isinstance(topics, list) and all(isinstance(topic, str) for topic in topics):
            self.topics = sorted({*self.topics, *topics})[:_TOPICS_MAX]

    def _has_advanced(self, message: dict[str, Any]) -> bool:
        held = self.snapshot
        beats = message.get("beats", self._progress[0])
        progress = (beats, held.in_count, held.out_count) if held is not None else self._progress
        has_advanced = progress != self._progress
        self._progress = progress
        return has_advanced

    def _undrained(self) -> int:
        self._ended_lives = [
            life for life in self._ended_lives if (self._rings_dir / f"{life}.ring").exists()
        ]
        return len(self._ended_lives)

    def _tell(self, before: lifecycle.Child, after: lifecycle.Child) -> None:
        if before.state is after.state:
            return
        facts: dict[str, Any] = {"state_from": str(before.state), "state_to": str(after.state)}
        if after.reason:
            facts["reason"] = after.reason
        if after.state is State.BACKOFF and after.due_ns is not None:
            facts["wait_s"] = round((after.due_ns - mono_ns()) / 1e9, 2)
            self._log.warning("job.changed", **facts)
        else:
            self._log.info("job.changed", **facts)


def worker_environment() -> dict[str, str]:
    """Return the environment for workers: they find EdgeDAQ where this process found it, installed or not."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    places: list[str] = []
    for package in ("edgedaq", "edgedaq_agent", "edgedaq_aggregator"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            place = str(Path(spec.origin).resolve().parent.parent)
            if place not in installed and place not in places:
                places.append(place)
    held = os.environ.get("PYTHONPATH", "")
    places += [place for place in held.split(os.pathsep) if place and place not in places]
    environment = dict(os.environ)
    if places:
        environment["PYTHONPATH"] = os.pathsep.join(places)
    return environment
