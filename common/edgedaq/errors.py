"""Every error that EdgeDAQ raises on purpose.

::

    EdgeDAQError
    ├── ConfigError      edit a file; exit status 78
    ├── DeviceError      the hardware or its driver; restarting the job may help
    ├── JobError         a job used its API wrongly; edit the job's code
    ├── WireError        bytes that are not what they should be; refuse them, count them, go on
    │   └── ChecksumError    they were damaged on the way; asking again may help
    └── StoreError       a backend does not take the data now; retry, then tell

A message says who, what was wrong, the value seen and the values allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ChecksumError",
    "ConfigError",
    "DeviceError",
    "EdgeDAQError",
    "JobError",
    "StoreError",
    "WireError",
    "nearest",
]


class EdgeDAQError(Exception):
    """Root of the tree; raised only through its children."""


class ConfigError(EdgeDAQError):
    """A configuration file must be edited before this can work."""


class DeviceError(EdgeDAQError):
    """A device or its driver failed; a restart of the job may help."""


class JobError(EdgeDAQError):
    """A job used its API in a way that cannot work; its code must be edited."""


class WireError(EdgeDAQError):
    """Bytes from a socket, a file or shared memory are not valid; they are refused and counted."""


class ChecksumError(WireError):
    """Bytes were damaged after they were written; the sender may still have them whole."""


class StoreError(EdgeDAQError):
    """A backend does not take the data now; the store retries and tells."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {match[0]!r}?" if match else ""
