"""The supervisor: starts, watches, restarts and stops the workers of one agent or aggregator.

One loop, one thread. It sleeps in ``poll`` on the workers' links, the command socket and the signals, and
decides nothing itself: ``lifecycle`` decides what happens to a worker, ``stats`` counts what it did. Beside
it a thread of libzmq passes live topics on (``broker``).

Workers begin in the order of their ``start_order``; nobody waits for one that fails. A reload (the command,
or SIGHUP under a service) asks for the plans as they are now, and touches only what changed.

A stop (SIGTERM, SIGINT, SIGHUP of a terminal, or the command) ends the workers group by group, each group
when the earlier one has ended: ``DEVICES``, ``UPLINK``, ``INTAKE``, ``STORES``; so what a device put is in
the spool, what the uplink sent is in the journal, and what the journal has can be stored. It takes at most
``STOP_TOTAL_S``, unless a job's own ``stop_limit`` is longer than usual. If the supervisor itself is killed,
its workers see the end of their links and end in order by themselves.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from edgedaq import lifecycle
from edgedaq.broker import Broker
from edgedaq.claim_files import sweep_rings, withdraw_strangers
from edgedaq.clock import boot_id, mono_ns, utc_ns
from edgedaq.control import ControlError, ControlServer
from edgedaq.errors import ConfigError
from edgedaq.lifecycle import State
from edgedaq.logsetup import get_logger
from edgedaq.notify import Notifier
from edgedaq.reload import changes_between
from edgedaq.service_status import JobRates, one_line
from edgedaq.signal_wakeup import arrived, signal_wakeup
from edgedaq.stats import NodeReport
from edgedaq.worker_plan import WorkerPlan
from edgedaq.worker_process import WorkerProcess, worker_environment

__all__ = ["DEVICES", "INTAKE", "STORES", "UPLINK", "Supervisor", "SupervisorSetup"]

DEVICES, UPLINK, INTAKE, STORES = range(4)
"""Groups of workers, in the order in which they are stopped."""

STOP_TOTAL_S = 9.0
_STOP_RESERVE_S = 1.0
_STOP_USUAL_S = 3.0
_REPORT_NS = 1_000_000_000
_POLL_MAX_MS = 250
_LEAVE_S = 9.0
_EXTEND_S = 15.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _ignore(*_: object) -> None:
    """Do nothing where a setup has nothing to be called."""


@dataclass(frozen=True)
class SupervisorSetup:
    """What one supervisor runs.

    Args:
        node: The supervisor's id.
        role: ``agent``, ``aggregator`` or ``standalone``; for logs and ``status``.
        runtime_dir: Prepared, and locked by this process.
        plans: The workers, in the order of ``status``.
        on_report: Called once a second with the supervisor and the account of all workers. Must not block.
        on_message: Called with (unique id, message) for each message of a worker that is not about its life.
        on_end: Called once, after the last report.
        facts: Added to ``status``: plain data, asked for at each request.
        lifeline_fd: Its end is a stop: the other end is held by a process that this one must not outlive.
        reload: Returns the plans of all jobs, without the parts, from the files as they are now; may raise.
        reloads_on_hangup: SIGHUP is a reload, not a stop.
    """

    node: str
    role: str
    version: str
    runtime_dir: Path
    plans: Sequence[WorkerPlan]
    on_report: Callable[[Supervisor, NodeReport], None] = _ignore
    on_message: Callable[[str, dict[str, Any]], None] = _ignore
    on_end: Callable[[], None] = _ignore
    facts: Callable[[], Mapping[str, Any]] = field(default=dict)
    lifeline_fd: int | None = None
    reload: Callable[[], Sequence[WorkerPlan]] | None = None
    reloads_on_hangup: bool = False


class Supervisor:
    """Runs the workers of a setup until it is told to stop."""

    def __init__(self, setup: SupervisorSetup) -> None:
        self._setup = setup
        self._log = get_logger(node=setup.node)
        self._boot = boot_id()
        self._life = f"{secrets.randbits(64) or 1:016x}"
        self._begun_ns = mono_ns()
        self._stop_ns = 0
        self._stopping: list[int] = []
        self._report_due_ns = 0
        self._is_ready = False
        self._lifeline_fd = setup.lifeline_fd
        self._notifier = Notifier()
        self._environment = worker_environment()
        self._workers: dict[str, WorkerProcess] = {}
        self._rates: dict[str, JobRates] = {}
        self._unstarted: list[WorkerProcess] = []
        for plan in setup.plans:
            self._add(plan)
        claims = {claim for plan in setup.plans for claim in plan.spec.get("claims", {})}
        withdraw_strangers(setup.runtime_dir / "rings", claims | set(self._workers))

    def _add(self, plan: WorkerPlan) -> None:
        setup, worker = self._setup, self._workers.get(plan.unique_id)
        if worker is not None:
            worker.change(plan)
            return
        worker = WorkerProcess(
            plan,
            rings_dir=setup.runtime_dir / "rings",
            environment=self._environment,
            on_message=setup.on_message,
            logger=self._log,
        )
        self._workers[plan.unique_id] = worker
        self._rates[plan.unique_id] = JobRates()
        if not plan.problem:
            self._unstarted.append(worker)

    def send(self, unique_id: str, message: dict[str, Any]) -> bool:
        """Send a message to a worker that runs; False if it does not, or did not take it. Never blocks."""
        worker = self._workers.get(unique_id)
        if worker is None or worker.child.state not in (State.RUNNING, State.BLOCKED):
            return False
        return worker.send(message)

    def stop(self, reason: str) -> None:
        """Begin to stop everything in order; ``run`` returns when that is done. May be called again."""
        if self._stop_ns:
            self._log.info("supervisor.stopping", reason=f"{reason}, is stopping already")
            return
        self._stop_ns = mono_ns()
        self._stopping = sorted({worker.plan.group for worker in self._workers.values()})
        self._unstarted.clear()
        for worker in self._workers.values():
            worker.forget_change()
        self._notifier.stopping()
        self._log.info("supervisor.stopping", reason=reason)
        self._stop_groups()

    def reload(self, reason: str) -> dict[str, Any]:
        """Take the files as they are now; return what changed. Of a broken file only the problem is told.

        Raises:
            ConfigError, ControlError: Nothing could be read, or everything is stopping.
        """
        if self._setup.reload is None or self._stop_ns:
            raise ControlError("is stopping, nothing is reloaded" if self._stop_ns else "cannot be reloaded")
        self._notifier.reloading()
        try:
            wanted = self._setup.reload()
            held = {name: worker.plan for name, worker in self._workers.items() if not worker.is_removed}
            changes = changes_between(held, wanted)
        except ConfigError as e:
            self._log.error("config.refused", reason=str(e))
            raise
        finally:
            if self._is_ready:
                self._notifier.ready()
        for worker in self._workers.values():
            if not worker.is_removed:
                worker.note = ""
        for name in changes.removed:
            self._workers[name].remove()
        for plan in (*changes.changed, *changes.added):
            self._add(plan)
        for name, problem in changes.refused.items():
            self._workers[name].note = f"runs on as it was, its file is broken: {problem}"
            self._log.error("config.refused", job=name, reason=problem)
        self._start_due()
        told = changes.to_map()
        self._log.info("config.reloaded", **{**told, "refused": list(changes.refused), "reason": reason})
        return told

    def run(self) -> int:
        """Run until stopped, in the main thread, which has the signals. Returns the exit status."""
        setup = self._setup
        self._log.info("supervisor.started", role=setup.role, pid=os.getpid(), version=setup.version)
        handlers = {
            "status": lambda _: self.status(),
            "stop": self._stop_command,
            "reload": lambda _: self.reload("command"),
        }
        with (
            signal_wakeup(STOP_SIGNALS) as wakeup,
            zmq.Context() as context,
            Broker(setup.runtime_dir),
        ):
            control = ControlServer(setup.runtime_dir, handlers, context)
            try:
                self._start_due()
                while not (self._stop_ns and not self._stopping):
                    self._turn(wakeup, control)
                self._report()
            finally:
                control.close()
                self._leave()
                setup.on_end()
        killed = [worker.plan.unique_id for worker in self._workers.values() if worker.child.has_process]
        if killed:
            self._log.error("supervisor.ended", reason=f"unkillable: {', '.join(killed)}")
            return 1
        self._log.info("supervisor.ended")
        return 0

    def _turn(self, wakeup: socket.socket, control: ControlServer) -> None:
        poller = zmq.Poller()
        poller.register(wakeup.fileno(), zmq.POLLIN)
        poller.register(control.socket, zmq.POLLIN)
        if self._lifeline_fd is not None:
            poller.register(self._lifeline_fd, zmq.POLLIN)
        for worker in self._workers.values():
            if worker.link is not None:
                flags = zmq.POLLIN | (zmq.POLLOUT if worker.link.has_pending else 0)
                poller.register(worker.link.fileno(), flags)
        ready = dict(poller.poll(self._wait_ms()))
        for number in arrived(wakeup):
            if number == signal.SIGHUP and self._setup.reloads_on_hangup:
                with contextlib.suppress(ConfigError, ControlError):  # told in the log
                    self.reload("SIGHUP")
            elif number in STOP_SIGNALS:
                self.stop(signal.Signals(number).name)
        if self._lifeline_fd in ready:
            self._lifeline_fd = None
            self.stop("the process that it belongs to has ended")
        control.service()
        now_ns = mono_ns()
        for worker in self._workers.values():
            worker.service()
            worker.reap()
            worker.tick(now_ns)
        if self._stop_ns:
            self._stop_groups()
        self._start_due()
        if now_ns >= self._report_due_ns:
            self._report_due_ns = max(self._report_due_ns + _REPORT_NS, now_ns + _REPORT_NS // 2)
            self._report()
            if self._stop_ns or not self._is_ready:
                self._notifier.extend(_EXTEND_S)
        self._tell_service_manager()
        self._notifier.ping()

    def _start_due(self) -> None:
        """Start whoever has nobody to wait for: everybody with a lower order has begun, or failed to."""
        while self._unstarted:
            order = min(worker.plan.start_order for worker in self._unstarted)
            workers = self._workers.values()
            if any(w.child.state is State.STARTING and w.plan.start_order < order for w in workers):
                return
            due = [worker for worker in self._unstarted if worker.plan.start_order == order]
            self._unstarted = [worker for worker in self._unstarted if worker.plan.start_order != order]
            for worker in due:
                worker.handle(lifecycle.Start())

    def _wait_ms(self) -> int:
        now_ns = mono_ns()
        due = [self._report_due_ns]
        due += [worker.child.due_ns for worker in self._workers.values() if worker.child.due_ns is not None]
        return max(0, min((min(due) - now_ns) // 1_000_000 + 1, _POLL_MAX_MS))

    def _stop_groups(self) -> None:
        """Ask the current group to stop; go on to the next once nobody in it is left."""
        while self._stopping:
            group = self._stopping[0]
            members = [worker for worker in self._workers.values() if worker.plan.group == group]
            limit_s = self._stop_limit_s(members)
            for worker in members:
                if worker.child.is_wanted:
                    worker.handle(lifecycle.Stop(limit_s))
            if any(worker.is_alive for worker in members):
                return
            self._stopping.pop(0)
            if self._stopping:
                self._report()  # the last counts of what has ended leave with the uplink

    def _stop_limit_s(self, members: Iterable[WorkerProcess]) -> float:
        """Return how long a group may take: what is left of the whole, less a second for each later group."""
        left_s = STOP_TOTAL_S - (mono_ns() - self._stop_ns) / 1e9
        share_s = max(left_s - _STOP_RESERVE_S * (len(self._stopping) - 1), _STOP_RESERVE_S)
        if self._stopping[0] == DEVICES:
            longest_s = max((worker.plan.policy.stop_limit_s for worker in members), default=0.0)
            if longest_s > _STOP_USUAL_S:
                return longest_s
        return share_s

    def _stop_command(self, _: Mapping[str, Any]) -> dict[str, Any]:
        self.stop("command")
        return {"pid": os.getpid()}

    def _report(self) -> None:
        setup = self._setup
        now_ns = mono_ns()
        report = NodeReport(
            node=setup.node,
            version=setup.version,
            boot=self._boot,
            t_utc_ns=utc_ns(),
            t_mono_ns=now_ns,
            jobs=[worker.report() for worker in self._workers.values()],
            life=self._life,
        )
        for job in report.jobs:
            self._rates[job.job].take(job.total(), now_ns)
        setup.on_report(self, report)
        if self._stop_ns:
            self._notifier.status("stopping; what is held is made durable")
        elif self._is_ready:
            jobs = [self._job_status(worker, now_ns) for worker in self._workers.values()]
            self._notifier.status(one_line(jobs))
        workers = self._workers.values()
        for worker in workers:
            worker.settle()
            worker.watch()
        if not any(worker.plan.group == UPLINK for worker in workers):
            sweep_rings(setup.runtime_dir / "rings")

    def _tell_service_manager(self) -> None:
        if not (self._is_ready or self._unstarted or self._stop_ns):
            waited_for = [worker for worker in self._workers.values() if not worker.has_begun]
            self._is_ready = not waited_for
            if not waited_for:
                self._notifier.ready()
                self._log.info("supervisor.ready", jobs_count=len(self._workers))
            else:
                names = ", ".join(worker.plan.unique_id for worker in waited_for)
                self._notifier.status(f"starting; waits for {names}")

    def status(self) -> dict[str, Any]:
        """Return all that is known, as plain data."""
        setup = self._setup
        now_ns = mono_ns()
        return {
            "role": setup.role,
            "node": setup.node,
            "version": setup.version,
            "pid": os.getpid(),
            "life": self._life,
            "t_utc_ns": utc_ns(),
            "uptime_s": (now_ns - self._begun_ns) / 1e9,
            "is_stopping": bool(self._stop_ns),
            "runtime_dir": str(setup.runtime_dir),
            "jobs": [self._job_status(worker, now_ns) for worker in self._workers.values()],
            **setup.facts(),
        }

    def _job_status(self, worker: WorkerProcess, now_ns: int) -> dict[str, Any]:
        child, report = worker.child, worker.report()
        total = report.total()
        return {
            "unique_id": worker.plan.unique_id,
            "job_type": worker.plan.job_type,
            "group": ("device", "uplink", "intake", "store")[worker.plan.group],
            "state": str(child.state),
            "state_for_s": (now_ns - child.since_ns) / 1e9 if child.since_ns else None,
            "reason": "; ".join(text for text in (child.reason, worker.note) if text),
            "pid": worker.pid if child.has_process else None,
            "topics": worker.topics,
            "restart_count": report.restart_count,
            "last_restart_ns": report.last_restart_ns,
            "total": total.to_map() if total is not None else None,
            "rates": self._rates[worker.plan.unique_id].per_s(),
        }

    def _leave(self) -> None:
        """End what still runs: only after an error in this process, for a stop has ended all before."""
        alive = [worker for worker in self._workers.values() if worker.is_alive]
        for worker in alive:
            worker.close()
        deadline_ns = mono_ns() + int(_LEAVE_S * 1e9)
        while alive and mono_ns() < deadline_ns:
            alive = [worker for worker in alive if not worker.reap()]
            with contextlib.suppress(InterruptedError):
                zmq.select([], [], [], 0.02)
        for worker in self._workers.values():
            worker.close()
