"""Live topics of the nodes in the control room: asked for over the sessions, shown by the local broker.

A topic ``store.X`` of node ``n1`` is ``node.n1.store.X`` here, and all that its job ``hv`` puts is
``node.n1.job.hv``. Only what somebody subscribes to by such a name is asked for, of that node alone;
``node`` asks all nodes for everything, and a subscription to everything does not ask any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
from edgedaq.broker import Subscriptions
from edgedaq.clock import mono_ns
from edgedaq.errors import ConfigError, WireError
from edgedaq.live_messages import (
    LIVE_QUEUE,
    NODE_TOPIC,
    decode_live,
    node_topic,
    publishing_address,
    subscription,
)
from edgedaq.log_limit import LogLimit
from edgedaq.logsetup import get_logger
from edgedaq.names import check_topic, matches_any
from edgedaq.open_info import OpenInfo
from edgedaq.session_messages import LIVE_TOPICS_MAX, Live

__all__ = ["LiveRelay"]

_OPENS_MAX = 1024


class LiveRelay:
    """The broker's one publisher of what comes from nodes. Used by one thread; must be closed."""

    def __init__(self, runtime_dir: Path, context: zmq.Context[Any]) -> None:
        self._known: dict[bytes, OpenInfo] = {}
        self._refused = LogLimit()
        self._log = get_logger()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        self._socket.linger = 0
        self._socket.sndhwm = LIVE_QUEUE
        self._socket.reconnect_ivl_max = 2000
        self._socket.connect(publishing_address(runtime_dir))
        self._subscriptions = Subscriptions(self._socket)

    def close(self) -> None:
        """Stop publishing; safe to call again."""
        self._socket.close()

    def wanted(self, node: str) -> tuple[str, ...]:
        """Return the topics of a node that somebody looks at now; ``""`` is everything."""
        self._subscriptions.take()
        found: set[str] = set()
        for wanted in self._subscriptions.held:
            topic = wanted.decode("ascii", "replace").removesuffix(".")
            if topic in (NODE_TOPIC, node_topic(node, "")):
                return ("",)
            if wanted.startswith(subscription(node_topic(node, ""))):
                with contextlib.suppress(ConfigError):
                    found.add(check_topic(topic[len(node_topic(node, "")) + 1 :]))
        return tuple(sorted(found)[:LIVE_TOPICS_MAX])

    def show(self, node: str, message: Live, allowed: Sequence[str] | None) -> None:
        """Show what a node has sent, checked: it may only speak for itself.

        Args:
            allowed: What its streams may be under; None: everything.
        """
        topic = node_topic(node, message.topic)
        parts = [subscription(topic), message.opened, message.frames]
        try:
            check_topic(message.topic)
            _check_stream(decode_live(parts, self._known).info, node, allowed)
        except (ConfigError, WireError) as e:
            count = self._refused.note(mono_ns())
            if count:
                self._log.warning("live.refused", node=node, count=count, reason=str(e))
            return
        finally:
            while len(self._known) > _OPENS_MAX:
                del self._known[next(iter(self._known))]
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(parts, zmq.NOBLOCK)


def _check_stream(info: OpenInfo, node: str, allowed: Sequence[str] | None) -> None:
    if info.node != node:
        message = f"a stream of node {info.node!r} in a session of {node!r}"
        raise WireError(message)
    if allowed is not None and not all(matches_any(allowed, (topic,)) for topic in info.topics):
        message = f"topics {', '.join(info.topics)}; node {node} may send {', '.join(allowed) or 'nothing'}"
        raise WireError(message)
