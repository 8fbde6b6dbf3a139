"""Files beside the rings by which consumers hold them.

``<life>.<consumer>.claim``::

    offset  size
         0     8  position up to which the consumer has released, as of its end (0 before)
         8     8  1 when the consumer is through with the ring

While a file says 0 the ring is kept, also when its producer and its consumer are gone, until the consumer
comes back or ``withdraw_claim`` says that it will not. Consumers named in the ring's header need no file.

``<consumer>.wants``: msgpack list of the consumer's topics. A producer that is born while it is there claims
its ring for that consumer at once, before the first put. Where the consumer would rather miss something than
hold a ring (see ``followers``) it is a map {topics, policy, limit_bytes}, and nothing is claimed.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Collection
from pathlib import Path

import msgspec

from edgedaq.errors import ConfigError, WireError
from edgedaq.logsetup import get_logger
from edgedaq.names import check_name
from edgedaq.ring import is_alive, is_own, map_ring
from edgedaq.ring_control import InputPolicy

__all__ = [
    "ClaimFile",
    "Wants",
    "claim_path",
    "is_claimed",
    "read_wants",
    "sweep_rings",
    "unlink_ring",
    "withdraw_claim",
    "withdraw_strangers",
    "write_wants",
]

_CLAIM = struct.Struct("<QQ")


class Wants(msgspec.Struct, frozen=True):
    """What a consumer wants; ``limit_bytes`` is that of a follower."""

    topics: list[str]
    policy: InputPolicy = "wait"
    limit_bytes: int = 0


_WantsFile = msgspec.msgpack.Decoder(list[str] | Wants)


class ClaimFile:
    """One consumer's claim on one ring, made if it is not there."""

    def __init__(self, rings_dir: Path, life: str, consumer: str) -> None:
        self._path = claim_path(rings_dir, life, consumer)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        held = os.pread(self._fd, _CLAIM.size, 0)
        if len(held) < _CLAIM.size:
            held = _CLAIM.pack(0, 0)
            os.pwrite(self._fd, held, 0)
        self.released, through = _CLAIM.unpack(held)
        self.is_through = bool(through)

    def note(self, released: int, *, through: bool = False) -> None:
        """Write how far the consumer is."""
        os.pwrite(self._fd, _CLAIM.pack(released, through), 0)

    def close(self, *, unlink: bool = False) -> None:
        """Let the file go; the claim stays, unless it is to be unlinked."""
        os.close(self._fd)
        if unlink:
            self._path.unlink(missing_ok=True)


def claim_path(rings_dir: Path, life: str, consumer: str) -> Path:
    """Return the file by which a consumer holds a ring."""
    return rings_dir / f"{life}.{consumer}.claim"


def write_wants(rings_dir: Path, consumer: str, wants: Wants) -> None:
    """Let producers that are born from now on know this consumer from their birth."""
    path = _wants_path(rings_dir, consumer)
    temporary = path.with_suffix(".wants.new")
    temporary.write_bytes(msgspec.msgpack.encode(wants.topics if wants.policy == "wait" else wants))
    temporary.rename(path)


def read_wants(rings_dir: Path) -> dict[str, Wants]:
    """Return what all consumers have said that they want; what is not valid is left out."""
    found = {}
    for path in rings_dir.glob("*.wants"):
        with contextlib.suppress(OSError, ConfigError, msgspec.DecodeError):
            wants = _WantsFile.decode(path.read_bytes())
            found[check_name("consumer", path.stem)] = wants if isinstance(wants, Wants) else Wants(wants)
    return found


def _wants_path(rings_dir: Path, consumer: str) -> Path:
    return rings_dir / f"{consumer}.wants"


def withdraw_claim(rings_dir: Path, consumer: str) -> None:
    """End all claims of a consumer that has failed or was removed; producers notice within a second."""
    for path in (_wants_path(rings_dir, consumer), *rings_dir.glob(f"*.{consumer}.claim")):
        path.unlink(missing_ok=True)


def withdraw_strangers(rings_dir: Path, known: Collection[str]) -> None:
    """End the claims of consumers that are not there any more."""
    for path in rings_dir.glob("*.wants"):
        if path.stem not in known:
            withdraw_claim(rings_dir, path.stem)
            reason = "there is no such job any more"
            get_logger().warning("claim.withdrawn", consumer=path.stem, reason=reason)


def sweep_rings(rings_dir: Path) -> None:
    """Remove rings of the dead that no consumer has a claim on, by header or by file."""
    for path in rings_dir.glob("*.ring"):
        life = path.stem
        if is_own(life):
            continue
        try:
            fd, mapped, layout = map_ring(path)
        except (OSError, WireError):
            continue
        mapped.close()
        is_needed = is_alive(fd) or bool(layout.identity.claims) or is_claimed(rings_dir, life)
        os.close(fd)
        if not is_needed:
            unlink_ring(rings_dir, life)
    for path in rings_dir.glob(".*.new"):
        _sweep_unfinished(path)


def _sweep_unfinished(path: Path) -> None:
    """Remove a ring whose producer died while it made it: a file that has bytes was locked before."""
    if is_own(path.name[1:-4]):
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        is_abandoned = os.fstat(fd).st_size > 0 and not is_alive(fd)
        os.close(fd)
        if is_abandoned:
            path.unlink()


def is_claimed(rings_dir: Path, life: str, *, apart_from: str = "") -> bool:
    """Tell whether a consumer (another than ``apart_from``) that is not through holds the ring by a file."""
    for path in rings_dir.glob(f"{life}.*.claim"):
        if path == claim_path(rings_dir, life, apart_from):
            continue
        try:
            held = path.read_bytes()
        except FileNotFoundError:
            continue
        if len(held) < _CLAIM.size or not _CLAIM.unpack_from(held)[1]:
            return True
    return False


def unlink_ring(rings_dir: Path, life: str) -> None:
    """Remove a ring with its socket and claims."""
    for path in (*rings_dir.glob(f"{life}.*.claim"), rings_dir / f"{life}.sock", rings_dir / f"{life}.ring"):
        path.unlink(missing_ok=True)
