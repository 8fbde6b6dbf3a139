"""The uplink's end of a session: a fresh socket for each, its liveness, and when to try again.

::

            connect                    handshake, HELLO              WELCOME
    WAITING ─────────► CONNECTING ─────────────────────► GREETING ─────────────► UP
       ▲                    │                                │                    │
       └────────────────────┴── refused, REJECT, BYE, nothing heard for 3 s ──────┘   back-off, full jitter

The owner polls ``pollables``, calls ``service`` when one of them is readable or ``due_ns`` has come, and
acts on the messages it returns. All of it is used by one thread.
"""

from __future__ import annotations

import contextlib
import enum
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import zmq
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import ConfigError, WireError
from edgedaq.logsetup import get_logger
from edgedaq.monitor_events import read_event
from edgedaq.session_messages import (
    Ack,
    Ahead,
    Bye,
    FromIntake,
    Hello,
    Live,
    Lives,
    Ping,
    Pong,
    Refused,
    Reject,
    Report,
    Resend,
    Subscribe,
    Unknown,
    Welcome,
    decode_from_intake,
    encode_message,
)
from edgedaq.transport import PING_INTERVAL_S, SILENCE_LIMIT_S, backoff_s

from edgedaq_agent.clock_offset import ClockOffset, Offset
from edgedaq_agent.dialling import FAILED_EVENTS, Dialling, open_dealer, why_failed

__all__ = ["LaneMessage", "Session", "SessionState"]

LaneMessage = Ack | Resend | Refused | Unknown | Ahead
"""What the lane has to act on."""

_SILENCE_NS = int(SILENCE_LIMIT_S * 1e9)
_PING_NS = int(PING_INTERVAL_S * 1e9)
_HEALTHY_NS = 5_000_000_000
_NOT_JOINED_S = 1.0
_RECEIVE_MAX = 200
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILED_EVENTS
_jitter = random.random


class SessionState(enum.Enum):
    """Where a session is; see the drawing."""

    WAITING = "waiting"
    CONNECTING = "connecting"
    GREETING = "greeting"
    UP = "up"


class Session:
    """The sessions of one uplink with one aggregator, one after the other. A context manager."""

    def __init__(self, dialling: Dialling, hello: Hello, context: zmq.Context[Any]) -> None:
        self.state = SessionState.WAITING
        self.reason = "not tried yet"
        """Why there is no session, in words."""
        self.number = 0
        """Counts the sessions that came up."""
        self.begun_ns = 0
        self.credit = 0
        """Position up to which each lane may send before the first ACK."""
        self.stores: list[str] | None = None
        """Keys in ``store_config`` that the aggregator has stores for, as far as it says."""
        self.sent: list[int] = []
        """Position up to which each lane has sent in this session, kept by the owner; told with each PING."""
        self.live_topics: Sequence[str] = ()
        """What the control room looks at."""
        self._dialling = dialling
        self._has_keys = False
        self._hello = hello
        self._context = context
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._clock = ClockOffset()
        self._attempt = 0
        self._due_ns = mono_ns()
        self._heard_ns = 0
        self._ping_ns = 0
        self._has_handshake = False
        self._log = get_logger(aggregator=dialling.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_socket()

    @property
    def address(self) -> str:
        """Where the aggregator is, as far as that is known."""
        return self._dialling.address

    @property
    def is_up(self) -> bool:
        """DATA may be sent."""
        return self.state is SessionState.UP

    @property
    def due_ns(self) -> int:
        """When ``service`` is to be called at the latest (monotonic)."""
        return self._due_ns

    def pollables(self) -> list[zmq.Socket[bytes]]:
        """Return the sockets to poll for reading; they change with each session."""
        return [socket for socket in (self._socket, self._monitor) if socket is not None]

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """The socket, to poll for writing when it took no more."""
        return self._socket

    def offset(self, now_ns: int) -> Offset | None:
        """Return how far this node's clock is off; None while not measured."""
        return self._clock.best(now_ns)

    def service(self, now_ns: int) -> list[LaneMessage]:
        """Do what is due; return what arrived for the lane. Never blocks."""
        if self.state is SessionState.WAITING:
            if now_ns >= self._due_ns:
                self._connect(now_ns)
            return []
        found = self._receive()
        self._watch_connection(now_ns)
        if self._socket is not None:
            self._keep_alive(now_ns)
        return found if self.is_up else []

    def send_data(self, header: bytes, part: bytes | memoryview) -> bool:
        """Send one part of frames; False when the socket takes no more now."""
        if self._socket is None:
            return False
        try:
            self._socket.send(header, zmq.SNDMORE | zmq.NOBLOCK)
            # There is room for a message or there is none; this fails only when the connection has just gone.
            self._socket.send(part, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def send(self, message: Hello | Ping | Report | Live | Lives | Bye) -> bool:
        """Send a control message; False when the socket takes no more now."""
        if self._socket is None:
            return False
        try:
            self._socket.send(encode_message(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def end(self, code: str, text: str, now_ns: int, *, retry_after_s: float = 0.0) -> None:
        """End the session because of what this side found, and try again later."""
        if self.is_up:
            self.send(Bye(code=code, text=text[:1000]))
        self._lose(f"{code}: {text}", now_ns, retry_after_s)

    def say_goodbye(self) -> None:
        """Tell the intake that this uplink ends, and give the words a moment to leave."""
        if self.is_up and self._socket is not None:
            self.send(Bye(code="stopped", text="the uplink ends"))
            self._socket.linger = 200
        self._close_socket()

    def _connect(self, now_ns: int) -> None:
        self.state = SessionState.CONNECTING
        try:
            destination = self._dialling.destination()
        except ConfigError as e:
            self._lose(str(e), now_ns, _NOT_JOINED_S)
            return
        self._has_keys = destination.keys is not None
        socket = open_dealer(destination, self._context)
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)
        socket.connect(destination.address)
        self._has_handshake = False
        self._heard_ns = now_ns
        self._due_ns = now_ns + _SILENCE_NS

    def _receive(self) -> list[LaneMessage]:
        found: list[LaneMessage] = []
        for _ in range(_RECEIVE_MAX):
            if self._socket is None:
                break
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            now_ns = mono_ns()
            try:
                received = decode_from_intake(parts[0] if len(parts) == 1 else b"")
            except WireError as e:
                self.end("protocol", str(e), now_ns)
                break
            self._heard_ns = now_ns
            if isinstance(received, LaneMessage):
                found.append(received)
            else:
                self._act(received, now_ns)
        return found

    def _act(self, message: FromIntake, now_ns: int) -> None:
        match message:
            case Welcome():
                if self.state is SessionState.GREETING:
                    self._begin(message, now_ns)
            case Reject():
                self._lose(f"rejected ({message.code}): {message.text}", now_ns, message.retry_after_s)
            case Bye():
                retry_after_s = 5.0 if message.code == "displaced" else 0.0
                self._lose(f"ended by the aggregator ({message.code}): {message.text}", now_ns, retry_after_s)
            case Subscribe():
                self.live_topics = tuple(message.topics)
            case Pong():
                is_first = self._clock.best(now_ns) is None
                self._clock.add(message, now_ns, utc_ns())
                if is_first:
                    self._ping(now_ns)  # which tells the intake the offset

    def _begin(self, welcome: Welcome, now_ns: int) -> None:
        self.state = SessionState.UP
        self.number += 1
        self.begun_ns = now_ns
        self.credit = welcome.credit
        self.stores = welcome.stores
        self.sent = []
        self.reason = ""
        self._log.info("session.begun", protocol=welcome.protocol, version=welcome.version)
        self._ping(now_ns)

    def _watch_connection(self, now_ns: int) -> None:
        while self._monitor is not None:
            try:
                told = read_event(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            event = told.event
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._has_handshake = True
                self.state = SessionState.GREETING
                self.send(self._hello)
            elif event != zmq.EVENT_MONITOR_STOPPED:
                has_keys, had_handshake = self._has_keys, self._has_handshake
                text = why_failed(event, told.value, has_keys=has_keys, had_handshake=had_handshake)
                self._lose(text, now_ns)

    def _keep_alive(self, now_ns: int) -> None:
        if now_ns - self._heard_ns > _SILENCE_NS:
            what = "no connection" if self.state is SessionState.CONNECTING else "nothing was heard"
            self._lose(f"{what} for {SILENCE_LIMIT_S:g} s", now_ns)
            return
        if self.is_up and now_ns - self._ping_ns >= _PING_NS:
            self._ping(now_ns)
        silent_ns = self._heard_ns + _SILENCE_NS + 1
        self._due_ns = min(silent_ns, self._ping_ns + _PING_NS) if self.is_up else silent_ns

    def _ping(self, now_ns: int) -> None:
        t_mono_ns, t_utc_ns = mono_ns(), utc_ns()
        self._clock.watch(t_mono_ns, t_utc_ns)
        best = self._clock.best(now_ns)
        offset_ns, error_ns = best if best is not None else (None, None)
        self._ping_ns = now_ns
        self.send(
            Ping(
                t_mono_ns=t_mono_ns,
                t_utc_ns=t_utc_ns,
                sent=self.sent,
                offset_ns=offset_ns,
                error_ns=error_ns,
            )
        )

    def _lose(self, reason: str, now_ns: int, retry_after_s: float = 0.0) -> None:
        if self.state is SessionState.WAITING:
            return
        if self.is_up and now_ns - self.begun_ns > _HEALTHY_NS:
            self._attempt = 0
        wait_s = max(backoff_s(self._attempt, _jitter()), retry_after_s)
        if self.is_up or reason != self.reason:
            self._log.warning("session.ended" if self.is_up else "session.refused", reason=reason)
        self._attempt += 1
        self._close_socket()
        self.state = SessionState.WAITING
        self.reason = reason
        self.credit = 0
        self.live_topics = ()
        self._due_ns = now_ns + int(wait_s * 1e9)

    def _close_socket(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(linger=0)
            self._socket.close()
        self._socket = self._monitor = None
