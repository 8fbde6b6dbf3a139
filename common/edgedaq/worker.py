"""A worker: the process of one job. Run by a supervisor as ``python -m edgedaq.worker FD``.

::

    main thread                          service thread                       supervisor
       │◄─────────────────────────── {"type": "spec", ...} ─────────────────────────│
       │  lock, import, configure            │                                      │
       │──── starts ────────────────────────►│── {"type": "started", pid, life} ───►│
       │  job.start()                        │── {"type": "report", snapshot,       │
       │                                     │    beats} every second ─────────────►│
       │◄── poke: JobStopped ────────────────│◄── {"type": "stop"}, SIGTERM, or EOF ─│
       │  ◄── ends ──────────────────────────│                                      │
       │  outlet.close()                                                            │
       │─── {"type": "ended", reason, snapshot} ───────────────────────────────────►│

FD is one end of a socket pair (``link``). When it ends, the supervisor is dead: the job is stopped in order,
and ``ORPHAN_LIMIT_S`` later the process ends in any case. Exit status: 0 when ``start`` has returned or the
job was stopped, 78 for a configuration that must be edited, 1 otherwise.

No two processes of one job run at once: the later one waits a moment for the earlier one to end, then kills
it. The lock on ``<runtime>/<unique_id>.pid`` is the kernel's, so it is never stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from edgedaq.claim_files import withdraw_claim
from edgedaq.config import EXIT_CONFIG, build_job_config
from edgedaq.errors import ConfigError, EdgeDAQError
from edgedaq.job import DAQJob
from edgedaq.job_context import JobContext, JobStopped, WorkerSpec
from edgedaq.link import Link, LinkClosed
from edgedaq.logsetup import configure, get_logger
from edgedaq.registry import load_class
from edgedaq.runtime_dir import write_pid
from edgedaq.service_thread import ServiceThread

__all__ = ["WorkerSpec", "main"]

ORPHAN_LIMIT_S = 8.0
_SPEC_WAIT_S = 10.0
_FORMER_WAIT_S = 3.0
_KILL_WAIT_S = 5.0
_FLUSH_S = 1.0
_EXIT_LIMIT_S = 2.0
_PUT_SWITCH_S = 0.001
_REASON_MAX = 500
_FINISHED = "finished"


def main(arguments: list[str]) -> int:
    """Run the job that comes over the link; return the exit status."""
    with Link.from_fd(int(arguments[0])) as link:
        spec = _receive_spec(link)
        if spec is None:
            return 1
        configure(spec.verbosity, facts={"node": spec.node, "job": spec.unique_id})
        log = get_logger()
        try:
            lock = _take_lock(Path(spec.runtime_dir), spec.unique_id)
        except OSError as e:
            return _end(link, f"cannot be the only process of this job: {e}", 1)
        try:
            return _run(spec, link)
        except ConfigError as e:
            return _end(link, _refused(e), EXIT_CONFIG)
        except Exception as e:
            log.exception("job.failed", reason=_line(e))
            return _end(link, _line(e), 1)
        finally:
            os.close(lock)


def _run(spec: WorkerSpec, link: Link) -> int:
    """Run one life of the job."""
    job_class = load_class(spec.target, Path(spec.config_file).parent if spec.config_file else None)
    file = spec.config_file or spec.unique_id
    config = build_job_config(job_class.config_type, spec.config, file=file, stem=spec.unique_id)
    context = JobContext(spec, send=lambda message: _send(link, message))
    context.boundary = _start.__code__
    log = get_logger()
    sys.setswitchinterval(_PUT_SWITCH_S)
    reason, status = "", 0
    service: ServiceThread | None = None
    pid = os.getpid()
    try:
        service = ServiceThread(context, link, orphan_limit_s=ORPHAN_LIMIT_S)
        service.start()
        _start(job_class, config, context, service)
        reason = "stopped"
        if not context.stop_requested.is_set():
            reason = _FINISHED
    except JobStopped:
        reason = "stopped"
    except ConfigError as e:
        reason, status = _refused(e), EXIT_CONFIG
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        reason = f"called sys.exit({e.code!r})"
    except BaseException as e:  # the top of the job's main thread
        log.exception("job.failed", reason=_line(e))
        reason, status = _line(e), 1
    if os.getpid() != pid:
        _leave_forked(status)
    if reason == _FINISHED:
        withdraw_claim(context.rings_dir, spec.unique_id)
    if service is not None:
        service.stop()
    snapshot = context.snapshot(_report_of(service.job if service is not None else None))
    try:
        context.close()
    except Exception as e:
        log.exception("outlet.failed", reason=_line(e))
        reason, status = reason or _line(e), status or 1
    if service is not None:
        service.end_helpers()
    return _end(link, reason, status, {"snapshot": snapshot.to_map(), "beats": context.beats})


def _start(job_class: type[DAQJob], config: Any, context: JobContext, service: ServiceThread) -> None:
    """Be the frame below which all is the job's own code."""
    job = job_class(config, context)
    service.job = job
    context.send({"type": "started", "pid": os.getpid(), "life": context.life})
    get_logger().info("job.started", pid=os.getpid(), life=context.life)
    if context.spec.needs_reset:
        get_logger().warning("device.reset", reason="its last life failed")
        job.reset_device()
    job.start()


def _leave_forked(status: int) -> NoReturn:
    """End a process that the job forked off and that came out of ``start``: the rest is its parent's."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _refused(error: ConfigError) -> str:
    reason = str(error)
    get_logger().error("job.refused", reason=reason)
    return reason


def _report_of(job: DAQJob | None) -> dict[str, Any]:
    if job is None:
        return {}
    try:
        return dict(job.report())
    except Exception as e:  # noqa: BLE001  # code of users, and the top of a thread
        get_logger().exception("report.failed", reason=_line(e))
        return {}


def _send(link: Link, message: dict[str, Any]) -> bool:
    try:
        return link.send(message)
    except LinkClosed:
        return False


def _end(link: Link, reason: str, status: int, account: dict[str, Any] | None = None) -> int:
    with contextlib.suppress(LinkClosed):
        told = " ".join(reason.split())[:_REASON_MAX]
        link.send({"type": "ended", "reason": told, **(account or {})})
        link.flush(_FLUSH_S)
    return status


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, EdgeDAQError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _receive_spec(link: Link) -> WorkerSpec | None:
    deadline = time.monotonic() + _SPEC_WAIT_S
    poller = select.poll()
    poller.register(link.fileno(), select.POLLIN)
    while time.monotonic() < deadline:
        poller.poll(100)
        try:
            messages = link.receive()
        except LinkClosed:
            return None
        if messages:
            try:
                return msgspec.convert(messages[0], WorkerSpec)
            except msgspec.ValidationError as e:
                _end(link, f"the supervisor sent what is no spec: {e}", 1)
                return None
    return None


def _take_lock(runtime_dir: Path, unique_id: str) -> int:
    """Return the descriptor whose lock says that this is the only process of the job.

    Raises:
        OSError: An earlier one survives even SIGKILL.
    """
    fd = os.open(runtime_dir / f"{unique_id}.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    killed = 0
    deadline = time.monotonic() + _FORMER_WAIT_S
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as e:
            if time.monotonic() > deadline:
                holder = _holder(fd)
                if killed:
                    os.close(fd)
                    message = f"process {holder} holds it and does not end"
                    raise OSError(message) from e
                if holder:
                    get_logger().warning("job.killed", pid=holder, reason="an earlier process of this job")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(holder, signal.SIGKILL)
                killed = holder
                deadline = time.monotonic() + _KILL_WAIT_S
            time.sleep(0.02)
    write_pid(fd)
    return fd


def _holder(fd: int) -> int:
    """Return the pid of the process that holds the lock, 0 if none: the kernel's word where it tells."""
    if sys.platform == "linux":
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else int(pid)
    try:
        return int(os.pread(fd, 32, 0))
    except ValueError:
        return 0


def _exit_after(status: int) -> None:
    """End the process even if a thread of the job does not."""

    def wait() -> None:
        time.sleep(_EXIT_LIMIT_S)
        os._exit(status)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    _exit_after(exit_status)
    sys.exit(exit_status)
