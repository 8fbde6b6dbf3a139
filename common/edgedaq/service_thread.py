"""The service thread of a worker: ring, link, signals and reports, beside the job's main thread.

It polls; nothing in it waits for the job. What a driver that holds the GIL delays: publishing of rows that
are in shared memory already, answers to consumers, reports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

from edgedaq.clock import mono_ns
from edgedaq.job import DAQJob
from edgedaq.job_context import JobContext, JobStopped
from edgedaq.link import Link, LinkClosed
from edgedaq.logsetup import get_logger

__all__ = ["ServiceThread"]

_REPORT_NS = 1_000_000_000
_POKE_NS = 50_000_000
_POLL_MAX_MS = 1000
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ServiceThread:
    """Made, started and stopped by the main thread, whose signals it handles."""

    job: DAQJob | None = None

    def __init__(self, context: JobContext, link: Link, *, orphan_limit_s: float) -> None:
        self._context = context
        self._link = link
        self._orphan_limit_ns = int(orphan_limit_s * 1e9)
        self._orphaned_ns = 0
        self._main = threading.get_ident()
        self._signal_fd, self._signal_write_fd = os.pipe()
        self._end_fd, self._end_write_fd = os.pipe()
        for fd in (self._signal_fd, self._signal_write_fd, context.wake_fd):
            os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._top, name="service", daemon=True)
        self._log = get_logger()

    def start(self) -> None:
        """Take over the signals, and begin."""
        signal.set_wakeup_fd(self._signal_write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _leave_to_service_thread)
        signal.signal(signal.SIGUSR1, self._context.on_poke)
        threading.excepthook = _on_thread_exception
        sys.unraisablehook = self._on_unraisable
        os.register_at_fork(after_in_child=self._in_child)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; signals are ignored from here on."""
        os.write(self._end_write_fd, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for fd in (self._signal_fd, self._signal_write_fd, self._end_fd, self._end_write_fd):
            os.close(fd)

    def _in_child(self) -> None:
        """Let a process that the job forked off have its own signals, and nothing of this one's."""
        signal.set_wakeup_fd(-1)
        for number in (*_SIGNALS, signal.SIGUSR1):
            if signal.getsignal(number) in (_leave_to_service_thread, self._context.on_poke):
                signal.signal(number, signal.SIG_DFL)
        self._context.after_fork()

    def _on_unraisable(self, arguments: Any) -> None:
        if arguments.exc_type is JobStopped:
            self._context.raise_again()
        else:
            sys.__unraisablehook__(arguments)

    def _top(self) -> None:
        try:
            self._loop()
        except Exception as e:  # noqa: BLE001  # code of users, and the top of a thread
            # Without this thread nothing leaves the ring. What was put is safe in it: begin anew.
            self._log.exception("service.failed", reason=str(e))
            os._exit(1)

    def _loop(self) -> None:
        report_ns = poke_ns = mono_ns()
        poller = _Poller([self._end_fd, self._signal_fd, self._context.wake_fd])
        while True:
            now = mono_ns()
            outlet = self._context.outlet_or_none
            wanted = None
            if outlet is not None:
                wanted = outlet.service(now)
                poller.watch(outlet.pollables())
            if now >= report_ns:
                report_ns = now + _REPORT_NS
                self._report()
            due = report_ns if wanted is None else min(report_ns, wanted)
            if self._context.stop_requested.is_set() and not self._context.stops_itself:
                if now >= poke_ns:
                    poke_ns = now + _POKE_NS
                    signal.pthread_kill(self._main, signal.SIGUSR1)
                due = min(due, poke_ns)
            if self._orphaned_ns and now - self._orphaned_ns > self._orphan_limit_ns:
                self._log.error("job.killed", reason="the supervisor is gone, and the job does not end")
                self.end_helpers()
                os._exit(1)
            link_fd = -1 if self._orphaned_ns else self._link.fileno()
            ready = poller.poll(link_fd, min(max(due - mono_ns() + 999_999, 0) // 1_000_000, _POLL_MAX_MS))
            if self._end_fd in ready:
                return
            self._drain(self._context.wake_fd)
            numbers = self._drain(self._signal_fd)
            if signal.SIGTERM in numbers:
                self._context.request_stop()
            if link_fd in ready:
                self._receive()

    def end_helpers(self) -> None:
        """End what the job has started, if nobody is left who would; its supervisor does it otherwise."""
        if not self._orphaned_ns or os.getpgrp() != os.getpid():
            return
        import psutil  # noqa: PLC0415  # rarely needed

        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid != os.getpid() and os.getpgid(pid) == os.getpid():
                    os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _drain(fd: int) -> bytes:
        try:
            return os.read(fd, 4096)
        except BlockingIOError:
            return b""

    def _receive(self) -> None:
        try:
            if self._link.has_pending:
                self._link.flush()
            messages = self._link.receive()
        except LinkClosed:
            self._log.warning("supervisor.lost")
            self._orphaned_ns = mono_ns()
            self._context.request_stop()
            return
        for message in messages:
            if message.get("type") == "stop":
                self._context.request_stop()
            elif message.get("type") == "reset":
                threading.Thread(target=self._reset, name="reset", daemon=True).start()
            elif self.job is not None:
                try:
                    self.job.on_link_message(message)
                except Exception as e:  # noqa: BLE001  # code of users, and the top of a thread
                    self._log.exception("message.failed", kind=message.get("type"), reason=str(e))

    def _reset(self) -> None:
        """Be the thread in which a job that hangs resets its device."""
        try:
            if self.job is not None:
                self.job.reset_device()
        except Exception as e:  # noqa: BLE001  # code of users, and the top of a thread
            self._log.exception("device.reset_failed", reason=str(e))

    def _report(self) -> None:
        extra: dict[str, Any] = {}
        if self.job is not None:
            try:
                extra = dict(self.job.report())
            except Exception as e:  # noqa: BLE001  # code of users, and the top of a thread
                self._log.exception("report.failed", reason=str(e))
        snapshot = self._context.snapshot(extra).to_map()
        outlet = self._context.outlet_or_none
        with contextlib.suppress(ValueError):
            self._context.send(
                {
                    "type": "report",
                    "beats": self._context.beats,
                    "snapshot": snapshot,
                    "topics": [] if outlet is None else outlet.live_topics(),
                }
            )


class _Poller:
    """Polls descriptors, and the socket of an outlet once there is one."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._watched: list[Any] = []
        self._link_fd = -1
        self._poller: Any = None

    def watch(self, pollables: list[Any]) -> None:
        if pollables != self._watched:
            self._watched = list(pollables)
            self._poller = None

    def poll(self, link_fd: int, timeout_ms: float) -> set[Any]:
        if self._poller is None or link_fd != self._link_fd:
            self._link_fd = link_fd
            self._poller = self._make([*self._fds, *([link_fd] if link_fd >= 0 else []), *self._watched])
        return {ready for ready, _ in self._poller.poll(timeout_ms)}

    def _make(self, sources: list[Any]) -> Any:
        if not self._watched:
            import select  # noqa: PLC0415  # the two pollers stand side by side

            poller = select.poll()
            for source in sources:
                poller.register(source, select.POLLIN)
            return poller
        import zmq  # noqa: PLC0415  # only once there is an outlet

        sockets = zmq.Poller()
        for source in sources:
            sockets.register(source, zmq.POLLIN)
        return sockets


def _leave_to_service_thread(*_: Any) -> None:
    """Handle a signal that the service thread reads from its descriptor, or that others act on."""


def _on_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is JobStopped:
        return
    get_logger().error(
        "thread.failed",
        thread=arguments.thread.name if arguments.thread else "",
        exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
    )
