"""Sizes and times as people write them: ``"64 MiB"``, ``"10 GB"``, ``"50 ms"``, ``"2 h"``, or numbers.

``Bytes`` is an ``int`` and ``Seconds`` a ``float`` for all who use them; only ``typed_toml`` sees the unit
that they are annotated with, and turns text into the number. Ranges are set in the usual way::

    spool_after: Annotated[Seconds, msgspec.Meta(le=60)] = 0.2
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from edgedaq.errors import ConfigError, nearest

__all__ = ["BYTES", "SECONDS", "Bytes", "Seconds", "Unit", "format_bytes", "format_seconds"]

_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-zµμ]*)\s*\Z")


@dataclass(frozen=True)
class Unit:
    """A kind of quantity: its unit names with their factors, and what to call it in a message."""

    called: str
    example: str
    factors: tuple[tuple[str, float], ...]
    is_whole: bool

    def parse(self, value: object) -> int | float:
        """Return the number that ``value`` stands for.

        Args:
            value: A number in the base unit (bytes, seconds), or a text with one of the unit names.

        Raises:
            ConfigError: It is neither, negative, not finite, or not whole where it must be. The message
                reads on from the name of a key: ``must be ...``.
        """
        if isinstance(value, str):
            number = self._parse_text(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            number = value
        else:
            message = f"must be {self.called} such as {self.example}, got {value!r}"
            raise ConfigError(message)
        if not math.isfinite(number) or number < 0:
            message = f"must be {self.called} of 0 or more, got {value!r}"
            raise ConfigError(message)
        if not self.is_whole:
            return float(number)
        if number != int(number):
            message = f"must be a whole number of bytes, got {value!r}"
            raise ConfigError(message)
        return int(number)

    def _parse_text(self, text: str) -> float:
        match = _QUANTITY.match(text)
        if not match:
            message = f"must be {self.called} such as {self.example}, got {text!r}"
            raise ConfigError(message)
        digits, name = match.groups()
        factors = dict(self.factors)
        if name not in factors:
            hint = nearest(name, factors) if name else ""
            allowed = ", ".join(known for known in factors if known)
            seen = f"unit {name!r}" if name else f"no unit in {text!r}"
            message = f"must be {self.called} such as {self.example}, got {seen}{hint} (known: {allowed})"
            raise ConfigError(message)
        factor = factors[name]
        digits = digits.replace("_", "")
        return int(digits) * factor if digits.isdigit() else float(digits) * factor


BYTES = Unit(
    called="a size",
    example='"64 MiB"',
    factors=(
        ("B", 1),
        ("kB", 10**3),
        ("MB", 10**6),
        ("GB", 10**9),
        ("TB", 10**12),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
    ),
    is_whole=True,
)
SECONDS = Unit(
    called="a time",
    example='"50 ms"',
    factors=(
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1),
        ("min", 60),
        ("h", 3600),
        ("d", 86400),
    ),
    is_whole=False,
)

Bytes = Annotated[int, BYTES]
"""A size in bytes; TOML may say ``"64 MiB"``, ``"10 GB"`` or a whole number."""

Seconds = Annotated[float, SECONDS]
"""A time in seconds; TOML may say ``"50 ms"``, ``"2 h"`` or a number."""


def format_bytes(count: int) -> str:
    """Return a size for people, e.g. ``64 MiB`` or ``1.5 GiB``."""
    for name, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.4g} {name}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """Return a time for people, e.g. ``50 ms``, ``12 s``, ``3.5 h``."""
    for name, factor in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {name}"
    return f"{seconds * 1000:.3g} ms"
