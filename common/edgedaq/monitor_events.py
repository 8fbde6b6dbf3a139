"""What a socket's monitor tells: read here, because ``zmq.utils.monitor`` brings asyncio and ssl, some 8 MB.

::

    part 1    u16 event, u32 value, of this machine's byte order
    part 2    endpoint

Source: zmq_socket_monitor(3).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

__all__ = ["MonitorEvent", "read_event"]

_HEAD = struct.Struct("=HI")


class MonitorEvent(NamedTuple):
    """One of ``zmq.EVENT_…``, its value, and the endpoint that it is about."""

    event: int
    value: int
    endpoint: bytes


def read_event(monitor: Any, flags: int = 0) -> MonitorEvent:
    """Return the next event of a monitor socket.

    Raises:
        zmq.Again: There is none now.
    """
    head, endpoint = monitor.recv_multipart(flags)
    event, value = _HEAD.unpack(head)
    return MonitorEvent(event, value, endpoint)
