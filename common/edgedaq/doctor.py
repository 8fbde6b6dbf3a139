"""What may be wrong with a host before it is wrong with the data: looks, measures, and says what to do.

Each check returns findings and changes nothing, but for a scratch file in the state directory while its speed
is measured. What only the real thing can tell is asked of it: the kernel's clock, the disk, the devices.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import socket
import stat
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from edgedaq.units import format_bytes, format_seconds

__all__ = [
    "Finding",
    "check_clock",
    "check_devices",
    "check_disk",
    "check_key_file",
    "check_listen",
    "check_memory",
    "check_reachable",
    "check_wear",
    "device_paths",
    "format_findings",
]

_ADJTIMEX_BYTES = 208
_STA_UNSYNC = 0x40
_CLOCK_ERROR_S = 0.1
_SPEED_BYTES = 32 << 20
_SPEED_MIN = 5e6
_COMMITS = 20
_COMMIT_S = 0.05
_REACH_LIMIT_S = 3.0
_GREETING_BYTES = 10
_SHARED = "/dev/shm"  # noqa: S108  # is compared with, never written to


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``fix`` says what to do where it is not well."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str
    fix: str = ""


def format_findings(findings: Iterable[Finding]) -> str:
    """Return findings for a terminal, one below the other."""
    lines = []
    for found in findings:
        lines.append(f"{found.level:8} {found.subject}: {found.text}")
        if found.fix:
            lines.append(f"{'':8}   -> {found.fix}")
    return "\n".join(lines)


def check_clock() -> list[Finding]:
    """Tell whether something keeps the clock right, by the kernel's own word."""
    fix = "apt install chrony, or timedatectl set-ntp true; a Pi has no clock of its own"
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(_ADJTIMEX_BYTES)
        libc.adjtimex(buffer)
    except (OSError, AttributeError):
        return [Finding("warning", "clock", "this system does not say whether it is synchronised")]
    # struct timex: modes, offset, freq, maxerror, esterror, status; longs are aligned.
    word = ctypes.sizeof(ctypes.c_long)
    error_us = int.from_bytes(buffer.raw[3 * word : 4 * word], "little", signed=True)
    status = int.from_bytes(buffer.raw[5 * word : 5 * word + 4], "little", signed=True)
    if status & _STA_UNSYNC:
        return [Finding("problem", "clock", "nothing keeps it right", fix)]
    if error_us / 1e6 > _CLOCK_ERROR_S:
        text = f"may be wrong by {format_seconds(error_us / 1e6)}"
        return [Finding("warning", "clock", text, "wait, or use a nearer time server")]
    return [Finding("ok", "clock", f"is kept right, to within {format_seconds(error_us / 1e6)}")]


def check_disk(subject: str, directory: Path, limit: int, reserve: int) -> list[Finding]:
    """Tell whether files in a directory have the room they may take, and how fast they become durable."""
    present = _present(directory)
    room = os.statvfs(present)
    free = room.f_bavail * room.f_frsize
    found = []
    if free < reserve:
        fix = f"free some, or set a smaller reserve; below {format_bytes(reserve)} nothing more is written"
        found.append(Finding("problem", subject, f"{present} has {format_bytes(free)} left", fix))
    elif free < limit + reserve:
        fix = "free some, or set a smaller limit: data waits before the limit is reached"
        text = (
            f"{present} has {format_bytes(free)} left, of {format_bytes(limit + reserve)} that may be taken"
        )
        found.append(Finding("warning", subject, text, fix))
    else:
        found.append(Finding("ok", subject, f"{present} has {format_bytes(free)} left"))
    try:
        speed, commit_s = _measure(present)
    except OSError as e:
        fix = "run this as root or as the service's user: sudo -u edgedaq"
        return [*found, Finding("warning", subject, f"its speed cannot be measured: {e.strerror}", fix)]
    text = f"writes {speed / 1e6:.0f} MB/s, a commit takes {format_seconds(commit_s)}"
    if speed < _SPEED_MIN or commit_s > _COMMIT_S:
        fix = 'use a faster card or an SSD; with spool_after = "5 s" a card is hardly written'
        return [*found, Finding("warning", subject, text, fix)]
    return [*found, Finding("ok", subject, text)]


def check_wear(subject: str, directory: Path) -> list[Finding]:
    """Tell how worn the disk of a directory is, where it says so itself."""
    number = _present(directory).stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for device in (block, block.parent):
        try:
            name = (device / "device/name").read_text().strip() if (device / "device/name").exists() else ""
            life = (device / "device/life_time").read_text().split()
        except OSError:
            continue
        used = max(int(part, 16) for part in life) * 10
        text = f"{device.name} {name} has used up to {used} % of its life"
        if used >= 80:
            return [Finding("problem" if used > 100 else "warning", subject, text, "replace it in time")]
        return [Finding("ok", subject, text)]
    text = f"{block.name} does not say how worn it is"
    return [Finding("ok", subject, f"{text}; an SSD tells smartctl -a, an SD card nobody")]


def check_memory(runtime_dir: Path, rings_bytes: int) -> list[Finding]:
    """Tell whether shared memory is memory, and has room for the rings."""
    present = _present(runtime_dir)
    kind = _file_system(present)
    if kind not in ("tmpfs", "ramfs", "unknown"):
        fix = "set runtime_dir to a directory on tmpfs, e.g. below /dev/shm or /run"
        return [Finding("problem", "shared memory", f"{present} is on {kind}", fix)]
    room = os.statvfs(present)
    size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"rings may take {format_bytes(rings_bytes)} of the {format_bytes(size)} of {present}"
    if rings_bytes > free:
        fix = (
            f"smaller rings ([ring] ring_bytes), or mount -o remount,size={2 * rings_bytes >> 20}M {present}"
        )
        return [Finding("problem", "shared memory", f"{text}; {format_bytes(free)} are free", fix)]
    return [Finding("ok", "shared memory", text)]


def device_paths(config: Mapping[str, Any]) -> list[Path]:
    """Return the device files that a job's TOML names, wherever in it."""
    found: list[Path] = []
    for value in config.values():
        if isinstance(value, Mapping):
            found += device_paths(value)
        elif isinstance(value, str) and value.startswith("/dev/") and not value.startswith(_SHARED):
            found.append(Path(value))
    return found


def check_devices(job: str, paths: Iterable[Path], user: str) -> list[Finding]:
    """Tell whether the devices of a job are there, and whether its user may open them."""
    found = []
    for path in paths:
        try:
            held = path.stat()
        except OSError as e:
            fix = "plug it in, load its driver, or give it a lasting name (udev.rules.sample)"
            found.append(Finding("problem", job, f"{path}: {e.strerror}", fix))
            continue
        if _may_use(held, user):
            found.append(Finding("ok", job, f"{path} may be used by {user}"))
            continue
        group = _name_of_group(held.st_gid)
        fix = f"usermod -aG {group} {user}, and start again; or a udev rule that says otherwise"
        found.append(Finding("problem", job, f"{path} may not be used by {user}", fix))
    return found


def check_reachable(address: str) -> list[Finding]:
    """Tell whether an intake answers at an address of ``tcp://host:port``."""
    parts = urlsplit(address)
    subject = "aggregator"
    try:
        with socket.create_connection((parts.hostname, parts.port or 0), _REACH_LIMIT_S) as held:
            held.settimeout(_REACH_LIMIT_S)
            greeting = b""
            while len(greeting) < _GREETING_BYTES and (more := held.recv(64)):
                greeting += more
    except socket.gaierror as e:
        fix = "correct `aggregator`, or the name service"
        return [Finding("problem", subject, f"{parts.hostname} is not known: {e.strerror}", fix)]
    except OSError as e:
        fix = "start it there; check `listen`, cable and firewall. Until then data waits here"
        return [Finding("problem", subject, f"{address} does not answer: {e.strerror or e}", fix)]
    if greeting[:1] != b"\xff" or greeting[9:10] != b"\x7f":
        return [Finding("problem", subject, f"{address} is something else", "correct the port")]
    return [Finding("ok", subject, f"{address} answers")]


def check_listen(address: str, *, is_running: bool) -> list[Finding]:
    """Tell whether an address can be listened on; where the aggregator runs, whether it does."""
    if is_running:
        return check_reachable(address)
    parts = urlsplit(address)
    try:
        family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
        with socket.socket(family) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((parts.hostname, parts.port or 0))
    except OSError as e:
        fix = "end who has it (ss -ltnp), or choose another in `listen`"
        return [Finding("problem", "listen", f"{address}: {e.strerror}", fix)]
    return [Finding("ok", "listen", f"{address} is free")]


def check_key_file(path: Path, user: str, *, missing: Finding) -> list[Finding]:
    """Tell whether a file with a secret key is there, the user's, and nobody else's."""
    try:
        held = path.stat()
    except FileNotFoundError:
        return [missing]
    except OSError as e:
        return [Finding("warning", "keys", f"{path}: {e.strerror}", "run this as root")]
    owner = _name_of_user(held.st_uid)
    if held.st_mode & 0o077:
        return [Finding("problem", "keys", f"{path} can be read by others", f"chmod 600 {path}")]
    if owner != user:
        return [
            Finding("problem", "keys", f"{path} belongs to {owner}, not to {user}", f"chown {user} {path}")
        ]
    return [Finding("ok", "keys", f"{path} is {user}'s alone")]


def _measure(directory: Path) -> tuple[float, float]:
    """Return bytes per second written durably, and how long the commit of a small record takes."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=directory) as file:
        begun_s = time.monotonic()
        for _ in range(_SPEED_BYTES // len(block)):
            os.write(file.fileno(), block)
        os.fsync(file.fileno())
        speed = _SPEED_BYTES / (time.monotonic() - begun_s)
        commits = []
        for number in range(_COMMITS):
            begun_s = time.monotonic()
            os.pwrite(file.fileno(), block[:4096], number * 4096)
            os.fsync(file.fileno())
            commits.append(time.monotonic() - begun_s)
    return speed, statistics.median(commits)


def _may_use(held: os.stat_result, user: str) -> bool:
    """Tell whether a user may read and write what has this owner, group and mode."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return False
    if entry.pw_uid == 0:
        return True
    if held.st_uid == entry.pw_uid:
        return held.st_mode & 0o600 == 0o600
    if held.st_gid in os.getgrouplist(user, entry.pw_gid):
        return held.st_mode & 0o060 == 0o060
    return held.st_mode & 0o006 == 0o006 and stat.S_IFMT(held.st_mode) != stat.S_IFDIR


def _name_of_group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _name_of_user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _present(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path is on."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return kind
    target = str(path.resolve())
    for line in mounts.splitlines():
        fields = line.split()
        place = fields[1]
        if (target == place or target.startswith(place.rstrip("/") + "/")) and len(place) >= len(best):
            best, kind = place, fields[2]
    return kind
