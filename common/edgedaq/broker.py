"""The broker: live topics from the jobs of a supervisor to each other, and to anyone who may look.

It is a thread of the supervisor in which libzmq passes messages on (``zmq.proxy``), without Python, without
the supervisor's loop, and without waking up while there is nothing to pass on. Queues are short
(``LIVE_QUEUE``) and drop what does not fit, per listener: one that is stuck costs nobody anything else.

What somebody subscribes to is told to the jobs, and only that is produced (``live_tap``). The messages are
drawn in ``live_messages``. The live plane is a convenience: if it cannot be had, everything else runs.

Jobs publish on a socket of their own, which only this user may open. Whoever may enter the runtime
directory (its user, and its group where it was given to one) may look.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from edgedaq.live_messages import LIVE_BYTES_MAX, LIVE_QUEUE, looking_address, publishing_address
from edgedaq.logsetup import get_logger

__all__ = ["Broker", "Subscriptions"]

_SUBSCRIPTION_BYTES_MAX = 4096
_SUBSCRIPTIONS_MAX = 4096


class Broker:
    """Runs until it is closed. A context manager."""

    def __init__(self, runtime_dir: Path) -> None:
        self._log = get_logger()
        self._context: zmq.Context[Any] = zmq.Context()
        self._thread: threading.Thread | None = None
        try:
            publishers = self._bind(zmq.XSUB, publishing_address(runtime_dir), LIVE_BYTES_MAX, 0o600)
            listeners = self._bind(zmq.XPUB, looking_address(runtime_dir), _SUBSCRIPTION_BYTES_MAX, 0o660)
        except (zmq.ZMQError, OSError) as e:
            self._log.error("broker.failed", reason=str(e))
            self._context.destroy(linger=0)
            return
        self._thread = threading.Thread(
            target=self._pass_on, args=(publishers, listeners), name="broker", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it; what waits in its queues is dropped."""
        self._context.term()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _bind(self, kind: int, address: str, message_bytes_max: int, mode: int) -> zmq.Socket[bytes]:
        path = Path(address.removeprefix("ipc://"))
        path.unlink(missing_ok=True)
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = LIVE_QUEUE
        socket.maxmsgsize = message_bytes_max
        socket.bind(address)
        path.chmod(mode)
        return socket

    def _pass_on(self, publishers: zmq.Socket[bytes], listeners: zmq.Socket[bytes]) -> None:
        try:
            with contextlib.suppress(zmq.ContextTerminated):
                zmq.proxy(publishers, listeners)
        except zmq.ZMQError as e:  # the top of a thread; the data plane does not need it
            self._log.error("broker.failed", reason=str(e))
        finally:
            publishers.close()
            listeners.close()


class Subscriptions:
    """What listeners want, as a publisher's XPUB socket is told it. Reads nothing else from the socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.held: set[bytes] = set()
        self._socket = socket

    def take(self) -> bool:
        """Take in what has changed, without waiting; tell whether anything has."""
        before = self.held
        for _ in range(_SUBSCRIPTIONS_MAX):
            try:
                told = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            # 1: from now on; 0: no more; anything else some listener has made up.
            if told[:1] == b"\1" and len(self.held) < _SUBSCRIPTIONS_MAX:
                self.held = self.held | {told[1:]}
            elif told[:1] == b"\0":
                self.held = self.held - {told[1:]}
        return self.held is not before
