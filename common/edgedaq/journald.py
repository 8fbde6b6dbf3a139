r"""Log entries for systemd's journal, with fields that ``journalctl`` can select by. No library is needed.

One datagram to ``/run/systemd/journal/socket`` is one entry::

    NAME=value\n                                     a value of one line
    NAME\n | u64 length, little-endian | value | \n    any other

Fields are ``MESSAGE``, ``PRIORITY``, ``SYSLOG_IDENTIFIER``, and each fact of an event as ``EDGEDAQ_<KEY>``:
``journalctl EDGEDAQ_JOB=hv EDGEDAQ_STATE_TO=FAILED`` finds something.

Source: systemd.journal-fields(7); "Native Journal Protocol" of systemd's documentation.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Journald", "find_journald"]

_SOCKET = Path("/run/systemd/journal/socket")
_NAME_MAX = 64
_NOT_IN_A_NAME = re.compile(r"[^A-Z0-9_]")
_LENGTH = struct.Struct("<Q")
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class Journald:
    """Sends entries to one socket; never blocks, never raises.

    Args:
        identifier: What ``journalctl -t`` selects by.
    """

    def __init__(self, path: Path = _SOCKET, *, identifier: str) -> None:
        self._path = str(path)
        self._identifier = identifier
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)  # noqa: FBT003

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, level: str, message: str, facts: Mapping[str, Any]) -> bool:
        """Send one entry; False if the journal did not take it, and it must be written elsewhere."""
        fields: dict[str, Any] = {
            "MESSAGE": message,
            "PRIORITY": _PRIORITIES.get(level, 6),
            "SYSLOG_IDENTIFIER": self._identifier,
        }
        fields |= {_name(key): value for key, value in facts.items()}
        try:
            self._socket.sendto(b"".join(_field(name, value) for name, value in fields.items()), self._path)
        except OSError:
            return False
        return True


def find_journald(stderr_fd: int, *, identifier: str) -> Journald | None:
    """Return the journal if this process's stderr goes there, as systemd says in ``JOURNAL_STREAM``."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        held = os.fstat(stderr_fd)
    except OSError:
        return None
    if (device, inode) != (str(held.st_dev), str(held.st_ino)):
        return None
    return Journald(identifier=identifier)


def _name(key: str) -> str:
    return ("EDGEDAQ_" + _NOT_IN_A_NAME.sub("_", key.upper()))[:_NAME_MAX]


def _field(name: str, value: Any) -> bytes:
    raw = str(value).encode("utf-8", "backslashreplace")
    if b"\n" in raw:
        return name.encode() + b"\n" + _LENGTH.pack(len(raw)) + raw + b"\n"
    return name.encode() + b"=" + raw + b"\n"
