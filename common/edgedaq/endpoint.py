"""Network addresses in configuration: ``tcp://host:port``."""

from __future__ import annotations

import ipaddress
import re

from edgedaq.errors import ConfigError

__all__ = ["check_endpoint", "is_loopback"]

_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._*-]+):([0-9]{1,9})\Z")


def is_loopback(host: str) -> bool:
    """Tell whether a host, as written in an endpoint, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_endpoint(key: str, endpoint: str, *, has_keys: bool = False) -> str:
    """Return the endpoint if it can be used.

    Args:
        key: The key of the file that it stands under.
        has_keys: Whether what goes there is encrypted and authenticated; if not, it stays on this machine.

    Raises:
        ConfigError: It is not ``tcp://host:port``, or plain text would leave this machine.
    """
    match = _TCP.match(endpoint)
    if not match:
        message = f"{key} must be tcp://host:port, e.g. tcp://127.0.0.1:7770, got {endpoint!r}"
        raise ConfigError(message)
    host, port = match[1], int(match[2])
    if not 1 <= port <= 65535:
        message = f"{key} must have a port from 1 to 65535, got {port} in {endpoint!r}"
        raise ConfigError(message)
    if not has_keys and not is_loopback(host):
        message = (
            f"{key} must be an address of this machine alone, such as 127.0.0.1, because there are no keys "
            f"to encrypt with, got {endpoint!r}"
        )
        raise ConfigError(message)
    return endpoint
