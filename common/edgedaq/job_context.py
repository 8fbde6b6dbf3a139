"""What a worker process has for its job: its identity, its outlet, its account, and how it is stopped.

Made by ``worker``; a job reaches it through ``DAQJob``. The outlet is made when the job first puts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.config import RingOptions
from edgedaq.errors import JobError
from edgedaq.stats import Snapshot

if TYPE_CHECKING:
    from edgedaq.outlet import Outlet

__all__ = ["JobContext", "JobStopped", "WorkerSpec"]

_OWN_CODE = str(Path(__file__).resolve().parent) + os.sep
_RAISE_AGAIN_NS = 3_000_000_000


class JobStopped(BaseException):  # like KeyboardInterrupt: no ``except Exception`` holds it up
    """The job is to end; raised in its main thread, out of ``sleep``, a blocked put, or its own code."""


class WorkerSpec(msgspec.Struct, kw_only=True):
    """What a supervisor tells a worker to be.

    ``target`` is ``module:Class`` or ``/path/file.py:Class``; ``config`` is the content of its TOML;
    ``claims``: consumers that hold every ring from its birth, and their topics: the lanes of the uplink.
    ``journal_feed`` names the feed (``feeds``) by which it is handed the data of other nodes, where there is
    a journal. ``needs_reset``: the life before this one failed, so the device is to be reset first.
    """

    unique_id: str
    job_type: str
    target: str
    config: dict[str, Any] = {}
    config_file: str = ""
    node: str
    boot: str
    runtime_dir: str
    state_dir: str = ""
    out_dir: str = ""
    verbosity: str = "INFO"
    claims: dict[str, list[str]] = {}
    ring: RingOptions = RingOptions()
    journal_feed: str = ""
    needs_reset: bool = False


def _refuse(_: dict[str, Any]) -> bool:
    """Send nothing: nobody supervises this job."""
    return False


class JobContext:
    """One life of one job. Usable without a worker, for a job that is driven by hand.

    Args:
        send: Sends a map to the supervisor; False if it did not take it.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        life: str | None = None,
        send: Callable[[dict[str, Any]], bool] = _refuse,
    ) -> None:
        self.spec = spec
        self.life = life or os.urandom(8).hex()
        self.send = send
        self.rings_dir = Path(spec.runtime_dir) / "rings"
        self.stop_requested = threading.Event()
        self.stop_fd, self._stop_write_fd = os.pipe()
        self.wake_fd, self._wake_write_fd = os.pipe()
        self.stops_itself = False
        self.boundary: object = None
        self.beats = 0
        self.in_count = self.in_bytes = self.last_in_ns = 0
        self.missed_gaps = self.missed_rows = 0
        self.outlet_or_none: Outlet | None = None
        self._main = threading.get_ident()
        self._raised_ns = 0
        self._making = threading.Lock()
        self._shut = ""
        self._cpu = (mono_ns(), time.process_time_ns())

    # Putting.

    def outlet(self) -> Outlet:
        """Return the outlet; make it now if need be.

        Raises:
            JobError: There is no room for its ring, or nothing can be put any more.
        """
        if self._shut:
            raise JobError(self._shut)
        if self.outlet_or_none is None:
            from edgedaq.outlet import Outlet  # noqa: PLC0415  # a job that puts nothing needs no sockets
            from edgedaq.ring_layout import Identity  # noqa: PLC0415,

            with self._making:
                if self.outlet_or_none is None:
                    spec = self.spec
                    identity = Identity(
                        spec.node, spec.unique_id, spec.job_type, self.life, spec.boot, spec.claims
                    )
                    options = msgspec.structs.asdict(spec.ring)
                    outlet = Outlet(
                        self.rings_dir, identity, owner=self._main, live_dir=Path(spec.runtime_dir), **options
                    )
                    outlet.gate.interrupt = self.interrupt
                    self.outlet_or_none = outlet
            os.write(self._wake_write_fd, b"\0")
        return self.outlet_or_none

    def after_fork(self) -> None:
        """Refuse all puts in a process that the job forked off: the ring is its parent's."""
        self._shut = (
            f"job {self.spec.unique_id}: a forked process cannot put; hand the data to that of the job, "
            "e.g. by a multiprocessing.Queue"
        )
        if self.outlet_or_none is not None:
            self.outlet_or_none.abandon(self._shut)

    # Stopping.

    def request_stop(self) -> None:
        """Ask the job to end; from any thread, repeatable."""
        if not self.stop_requested.is_set():
            self.stop_requested.set()
            os.write(self._stop_write_fd, b"\0")

    def interrupt(self) -> None:
        """Leave the caller by ``JobStopped`` if the job is to end; where nothing can be torn.

        Once: what a job does in its ``finally`` may put and sleep. A job that swallowed it gets it again
        after a while.
        """
        if not self.stop_requested.is_set() or self.stops_itself:
            return
        if threading.get_ident() == self._main:
            now = mono_ns()
            if self._raised_ns and now - self._raised_ns < _RAISE_AGAIN_NS:
                return
            self._raised_ns = now
        raise JobStopped

    def raise_again(self) -> None:
        """Note that a ``JobStopped`` got lost on its way: raised in a destructor, where Python drops it."""
        self._raised_ns = 0

    def on_poke(self, _: int, frame: FrameType | None) -> None:
        """Handle the signal by which the service thread pokes the main one.

        The job's own code is left at once, wherever it waits; code of EdgeDAQ below it never is.
        """
        while frame is not None:
            if frame.f_code is self.boundary:
                self.interrupt()
                return
            if frame.f_code.co_filename.startswith(_OWN_CODE):
                return
            frame = frame.f_back

    def sleep(self, seconds: float) -> None:
        """Wait; see ``DAQJob.sleep``."""
        self.beats += 1
        self.interrupt()
        if self._raised_ns:
            time.sleep(max(seconds, 0))
        elif self.stop_requested.wait(max(seconds, 0)):
            self.interrupt()
        self.beats += 1

    # Reporting.

    def took(self, count: int, size: int) -> None:
        """Count what the job consumed."""
        self.in_count += count
        self.in_bytes += size
        self.last_in_ns = utc_ns()
        self.beats += 1

    def missed(self, rows: int | None) -> None:
        """Count a gap in what the job consumes."""
        self.missed_gaps += 1
        self.missed_rows += rows or 0

    def snapshot(self, extra: dict[str, Any] | None = None) -> Snapshot:
        """Return the account of this life so far."""
        now, cpu = mono_ns(), time.process_time_ns()
        then, cpu_then = self._cpu
        self._cpu = (now, cpu)
        snapshot = Snapshot(
            self.spec.unique_id,
            self.spec.job_type,
            self.life,
            os.getpid(),
            now,
            in_count=self.in_count,
            in_bytes=self.in_bytes,
            last_in_ns=self.last_in_ns,
            cpu_percent=round(100 * (cpu - cpu_then) / max(now - then, 1), 1),
            rss_bytes=_rss_bytes(),
            extra=dict(extra or {}),
        )
        if self.missed_gaps:
            snapshot.extra |= {"missed_gaps": self.missed_gaps, "missed_rows": self.missed_rows}
        outlet = self.outlet_or_none
        if outlet is not None:
            snapshot.out_count = outlet.out_count
            snapshot.out_bytes = outlet.out_bytes
            snapshot.last_out_ns = outlet.last_out_ns
            snapshot.out_queue = outlet.queued_count
            snapshot.dropped_count = outlet.dropped_count
            snapshot.put_blocked_s = outlet.put_blocked_s
            snapshot.is_blocked = outlet.is_blocked
            snapshot.blocked_by = outlet.blocked_by
            snapshot.extra["consumers"] = outlet.consumers()
            snapshot.streams = outlet.stream_rows()
        return snapshot

    def close(self) -> None:
        """Close outlet and descriptors."""
        self._shut = f"job {self.spec.unique_id}: has ended, nothing can be put any more"
        if self.outlet_or_none is not None:
            self.outlet_or_none.close()
            self.outlet_or_none = None
        for fd in (self.stop_fd, self._stop_write_fd, self.wake_fd, self._wake_write_fd):
            os.close(fd)


def _rss_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return None
