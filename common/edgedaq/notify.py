"""Tell systemd how the service does (``sd_notify``), without a library. Does nothing elsewhere.

Source: sd_notify(3) and sd_watchdog_enabled(3), section "Environment".
"""

from __future__ import annotations

import os
import socket

from edgedaq.clock import mono_ns

__all__ = ["Notifier"]


class Notifier:
    """Speaks to the service manager that ``NOTIFY_SOCKET`` names, if any.

    ``ping`` is to be called by the supervisor's own loop, so that a hung loop is what the watchdog sees.
    """

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""
        self._ping_ns = 0
        watchdog_us = os.environ.get("WATCHDOG_USEC", "")
        pid = os.environ.get("WATCHDOG_PID", "")
        is_for_us = not pid or pid == str(os.getpid())
        self._interval_ns = int(watchdog_us) * 1000 // 3 if watchdog_us.isdigit() and is_for_us else 0

    def ready(self) -> None:
        """Say that the service works."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the files are being read again; ``ready`` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={mono_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the service is ending."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Say how it does, in human words; only if that changed."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + " ".join(text.split()))

    def extend(self, seconds: float) -> None:
        """Ask for so much more time to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def ping(self) -> None:
        """Feed the watchdog, if there is one and it is time."""
        now_ns = mono_ns()
        if self._interval_ns and now_ns - self._ping_ns >= self._interval_ns:
            self._ping_ns = now_ns
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)  # noqa: FBT003
                sock.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError:
            # A service manager that does not listen must not end what it manages; the watchdog will tell.
            return
