"""Commands to a running supervisor from another terminal: each request has an id, a deadline and one reply.

ROUTER at ``<runtime>/control.sock``, DEALER at the other end; msgpack maps::

    request   {"id": int, "command": "status" | "stop" | ..., "arguments": {...}}
    reply     {"id": int, "ok": true, "result": {...}}
              {"id": int, "ok": false, "error": "text for a person"}

Who may open the socket may command: the directory is the user's alone. What comes is checked all the same.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import zmq

from edgedaq.errors import EdgeDAQError, nearest
from edgedaq.runtime_dir import holder

__all__ = ["ControlError", "ControlServer", "request"]

SOCKET_NAME = "control.sock"
REQUEST_BYTES_MAX = 1 << 20
_PER_TURN_MAX = 32

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


class ControlError(EdgeDAQError):
    """A command could not be given, or was refused."""


class ControlServer:
    """The supervisor's end; its loop calls ``service`` when ``socket`` is readable. Never blocks."""

    def __init__(
        self, runtime_dir: Path, handlers: Mapping[str, Handler], context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        path = runtime_dir / SOCKET_NAME
        path.unlink(missing_ok=True)
        self._handlers = dict(handlers)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self.socket.bind(f"ipc://{path}")

    def service(self) -> None:
        """Answer what has arrived."""
        for _ in range(_PER_TURN_MAX):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 2:
                continue
            reply = self._answer(parts[1])
            with contextlib.suppress(zmq.Again):
                self.socket.send_multipart([parts[0], msgpack.packb(reply, default=str)], zmq.NOBLOCK)

    def _answer(self, packed: bytes) -> dict[str, Any]:
        try:
            message = msgpack.unpackb(packed, strict_map_key=True)
        except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
            message = None
        if not isinstance(message, dict) or type(message.get("id")) is not int:
            return {"id": 0, "ok": False, "error": "a request must be a map with an id"}
        command, arguments = message.get("command"), message.get("arguments", {})
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None or not isinstance(arguments, dict):
            hint = nearest(str(command), self._handlers)
            known = ", ".join(sorted(self._handlers))
            return {
                "id": message["id"],
                "ok": False,
                "error": f"unknown command {command!r}{hint} (known: {known})",
            }
        try:
            return {"id": message["id"], "ok": True, "result": handler(arguments)}
        except EdgeDAQError as e:
            return {"id": message["id"], "ok": False, "error": str(e)}

    def close(self) -> None:
        """Stop answering."""
        self.socket.close(0)


def request(
    runtime_dir: Path, command: str, arguments: Mapping[str, Any] | None = None, *, limit_s: float = 5.0
) -> dict[str, Any]:
    """Command the supervisor of a runtime directory; return the result. Blocks up to ``limit_s``.

    Raises:
        ControlError: Nothing runs there, it does not answer, or it refused.
    """
    pid = holder(runtime_dir)
    if pid is None:
        message = f"nothing runs with runtime_dir {runtime_dir}"
        raise ControlError(message)
    number = secrets.randbits(31)
    deadline = time.monotonic() + limit_s
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{runtime_dir / SOCKET_NAME}")
        socket.send(msgpack.packb({"id": number, "command": command, "arguments": dict(arguments or {})}))
        while True:
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0 or not socket.poll(left_ms):
                message = f"process {pid or '?'} does not answer within {limit_s:g} s"
                raise ControlError(message)
            reply = msgpack.unpackb(socket.recv(), strict_map_key=False)
            if isinstance(reply, dict) and reply.get("id") == number:
                break
    if not reply.get("ok"):
        raise ControlError(str(reply.get("error", "refused")))
    return dict(reply["result"])
