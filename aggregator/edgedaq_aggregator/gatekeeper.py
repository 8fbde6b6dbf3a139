"""Who gets through the handshake: the ZAP handler of the intake, in its poll loop, without a thread.

libzmq asks at ``inproc://zeromq.zap.01`` (ZeroMQ RFC 27) about the key of each connection, before anything of
it reaches the intake, and refuses everybody while nobody answers. The answers::

    200  the key is that of an authorised node; or unknown, while an invitation is open: then all that is
         listened to is JOIN
    400  unknown, revoked or expired
    500  not now: barred, or too many strangers while an invitation is open

The User-Id that every message bears from then on is the key itself.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import zmq
from edgedaq.clock import mono_ns, utc_ns
from edgedaq.errors import ConfigError
from edgedaq.keys import KeyPair
from edgedaq.logsetup import get_logger
from zmq.utils import z85

from edgedaq_aggregator.authority import Authority, NodesFile, Standing
from edgedaq_aggregator.refusals import Refusals

__all__ = ["Gatekeeper"]

_ENDPOINT = "inproc://zeromq.zap.01"
_PER_STEP_MAX = 256
_GUESTS_MAX = 20
_GUESTS_WITHIN_NS = 10_000_000_000
_LOOK_NS = 250_000_000


class Gatekeeper:
    """The handler, and the authority behind it. Used by one thread; must be closed, after the router.

    Args:
        keys: The aggregator's own.
        own: Name and key of the node that the aggregator itself is, if it runs jobs.
    """

    def __init__(
        self,
        nodes_file: NodesFile,
        keys: KeyPair,
        own: tuple[str, str] | None,
        refusals: Refusals,
        context: zmq.Context[Any],
    ) -> None:
        self.keys = keys
        self.problem = ""
        self._file = nodes_file
        self._own = own
        self._refusals = refusals
        self._authority = Authority({}, own)
        self._stamp: tuple[int, int, int] | None = None
        self._look_ns = 0
        self._guests: deque[int] = deque(maxlen=_GUESTS_MAX)
        self._log = get_logger()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ENDPOINT)
        self.look(mono_ns())

    def close(self) -> None:
        """Answer no more; safe to call again."""
        self.socket.close()

    def service(self) -> None:
        """Answer what libzmq asks."""
        for _ in range(_PER_STEP_MAX):
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            status, text, user = self._answer(request)
            number = request[1] if len(request) > 1 else b""
            self.socket.send_multipart([b"1.0", number, status, text.encode(), user, b""])

    def look(self, now_ns: int) -> bool:
        """Read the file again if it has changed; True if it was read."""
        if now_ns < self._look_ns:
            return False
        self._look_ns = now_ns + _LOOK_NS
        stamp = self._file.stamp()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            nodes = self._file.read()
        except ConfigError as e:
            if self.problem != str(e):
                self._log.error("nodes.unreadable", reason=str(e))
            self.problem = str(e)
            return False
        self.problem = ""
        self._authority = Authority(nodes, self._own)
        self._log.info("nodes.read", path=str(self._file.path), count=len(nodes))
        return True

    def standing(self, key: str) -> Standing:
        """Return what a key is here, now."""
        return self._authority.standing(key, utc_ns())

    def enrol(self, node: str, secret: bytes, key: str) -> str:
        """Take a node in; return why not, empty when it was.

        Who asks again with the key that is in already is told yes: the first answer may have got lost.
        """
        standing = self.standing(key)
        if standing.is_allowed and standing.node == node:
            return ""
        invited = self._authority.invited(secret, utc_ns())
        if invited != node:
            return "the token is not valid (any more): it is used up, an hour old, or replaced by a newer one"
        try:
            name = self._file.join(secret, key, utc_ns())
        except ConfigError as e:
            self._log.error("nodes.unreadable", reason=str(e))
            return f"the aggregator cannot note it: {e}"
        self._look_ns = 0
        self.look(mono_ns())
        return "" if name == node else "the token was used just now"

    def _answer(self, request: list[bytes]) -> tuple[bytes, str, bytes]:
        if len(request) != 7 or request[0] != b"1.0" or request[5] != b"CURVE" or len(request[6]) != 32:
            return b"500", "not understood", b""
        now_ns, address = mono_ns(), request[3].decode("ascii", "replace")
        user = z85.encode(request[6])
        key = user.decode("ascii")
        standing = self.standing(key)
        if not standing.is_allowed:
            self._look_ns = 0  # who was let in a moment ago need not try again
            self.look(now_ns)
            standing = self.standing(key)
        if self._refusals.is_barred(key, now_ns):
            self._refusals.note("barred key", now_ns, node=standing.node, address=address)
            return b"500", "barred", b""
        if standing.is_allowed:
            return b"200", "", user
        if not standing.node and self._authority.is_inviting(utc_ns()):
            if len(self._guests) < _GUESTS_MAX or now_ns - self._guests[0] > _GUESTS_WITHIN_NS:
                self._guests.append(now_ns)
                return b"200", "", user
            self._refusals.note("too many strangers", now_ns, address=address)
            return b"500", "too many strangers", b""
        self._refusals.note(standing.reason, now_ns, node=standing.node, address=address)
        return b"400", standing.reason, b""
