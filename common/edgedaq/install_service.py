"""Makes a systemd service of an agent or an aggregator: what files are written and what is run.

``service_files`` renders the files, purely; ``install`` and ``uninstall`` do the rest, or print it::

    /etc/sysusers.d/edgedaq.conf          the user, in those groups for devices that the host has
    /etc/tmpfiles.d/<place>.conf          directories
    /etc/systemd/system/<unit>            hardened; several agents on one host by a template
    <config_dir>/…                        a first main file and a sample of udev rules, if missing

Everything may be run again: a file that is right already is left alone. ``uninstall`` leaves configuration,
data and the user, whose data it is. A service of ``/etc/X`` keeps its state in ``/var/lib/X`` and its sockets
in ``/run/X``, that of ``/etc/X/Y`` in ``X-Y``: ``main_config`` finds them by the same rule.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from edgedaq.errors import ConfigError
from edgedaq.main_config import place_of

__all__ = ["DEVICE_GROUPS", "USER", "Service", "install", "service_files", "uninstall"]

USER = "edgedaq"
DEVICE_GROUPS = ("dialout", "i2c", "gpio", "spi", "video", "plugdev")
_UNITS = Path("/etc/systemd/system")
_AGENT_DEVICES = """\
PrivateDevices=no
DevicePolicy=closed
DeviceAllow=char-ttyS rw
DeviceAllow=char-ttyAMA rw
DeviceAllow=char-ttyUSB rw
DeviceAllow=char-ttyACM rw
DeviceAllow=char-i2c rw
DeviceAllow=char-spi rw
DeviceAllow=char-gpiochip rw
DeviceAllow=char-usb_device rw
DeviceAllow=char-usbtmc rw
DeviceAllow=char-hidraw rw
DeviceAllow=char-video4linux rw"""
_NO_DEVICES = "PrivateDevices=yes\nDevicePolicy=closed\nPrivateUsers=yes"


@dataclass(frozen=True)
class Service:
    """One service.

    Args:
        role: ``agent`` or ``aggregator``.
        prefix: Of the Python environment that it runs from.
        config_dir: Directory of its TOMLs, below ``/etc``.
        writable: Directories besides its own that it writes to.
        main_file: Name and content of the main file, for where there is none.
    """

    role: str
    prefix: Path
    config_dir: Path
    writable: tuple[Path, ...] = ()
    main_file: tuple[str, str] = ("", "")

    @property
    def command(self) -> str:
        """What users type."""
        return f"edgedaq-{self.role}"

    @property
    def instance(self) -> str:
        """The name of one of several agents of a host; empty where there is one."""
        parts = self.config_dir.parts
        return parts[-1] if len(parts) > 3 else ""

    @property
    def unit_file(self) -> str:
        """Name of the unit's file."""
        return f"{self.command}@.service" if self.instance else f"{self.command}.service"

    @property
    def unit(self) -> str:
        """What ``systemctl`` is told."""
        return f"{self.command}@{self.instance}.service" if self.instance else self.unit_file


def service_files(service: Service, groups: Sequence[str]) -> dict[Path, str]:
    """Return every file that the service needs, without those in its directory.

    Args:
        groups: Those of ``DEVICE_GROUPS`` that the host has.
    """
    place = _place(service)
    users = [f'u {USER} - "EdgeDAQ" / -', *(f"m {USER} {group}" for group in groups)]
    # The service's, so that the key which `join` leaves there is; it sees all of /etc read-only.
    directories = [f"d {service.config_dir} 0750 {USER} {USER} -"]
    if service.instance:
        directories.insert(0, f"d {service.config_dir.parent} 0750 {USER} {USER} -")
    directories += [f"d {path} 0750 {USER} {USER} -" for path in service.writable]
    return {
        Path("/etc/sysusers.d/edgedaq.conf"): "".join(f"{line}\n" for line in users),
        Path(f"/etc/tmpfiles.d/{place}.conf"): "".join(f"{line}\n" for line in directories),
        _UNITS / service.unit_file: _unit(service),
    }


def install(service: Service, *, root: Path, dry_run: bool, start: bool, say: Callable[[str], None]) -> None:
    """Make the service, or print what would be done.

    Args:
        root: ``/``, or a tree in which nothing runs.
        start: Start it now, or restart it where it runs already.

    Raises:
        ConfigError: It cannot work from where it is.
    """
    _check(service, root, dry_run=dry_run)
    groups = _present_groups(root)
    changed = False
    for path, text in service_files(service, groups).items():
        changed |= _write(root, path, text, dry_run=dry_run, say=say)
    prefix = [] if root == Path("/") else [f"--root={root}"]
    _run(["systemd-sysusers", *prefix, "/etc/sysusers.d/edgedaq.conf"], dry_run=dry_run, say=say)
    place = _place(service)
    _run(["systemd-tmpfiles", *prefix, "--create", f"/etc/tmpfiles.d/{place}.conf"], dry_run=dry_run, say=say)
    samples = {service.main_file[0]: service.main_file[1]}
    if service.role == "agent":
        samples["udev.rules.sample"] = _resource("edgedaq.rules")
    for name, text in samples.items():
        if not _within(root, service.config_dir / name).exists():
            _write(root, service.config_dir / name, text, dry_run=dry_run, say=say, mode=0o640)
    if root == Path("/") and changed:
        _run(["systemctl", "daemon-reload"], dry_run=dry_run, say=say)
    _run(["systemctl", *prefix, "enable", service.unit], dry_run=dry_run, say=say)
    if start and root == Path("/"):
        _run(["systemctl", "restart", service.unit], dry_run=dry_run, say=say)
    say(f"configure: {service.config_dir / service.main_file[0]}, then: systemctl start {service.unit}")


def uninstall(service: Service, *, root: Path, dry_run: bool, say: Callable[[str], None]) -> None:
    """Take the service away, or print what would be done; configuration, data and user stay."""
    if not dry_run and root == Path("/") and os.geteuid() != 0:
        message = f"{service.command} uninstall-service must be run by root (sudo)"
        raise ConfigError(message)
    prefix = [] if root == Path("/") else [f"--root={root}"]
    now = ["--now"] if root == Path("/") else []
    if _within(root, _UNITS / service.unit_file).exists():
        _run(["systemctl", *prefix, "disable", *now, service.unit], dry_run=dry_run, say=say)
    paths = [Path(f"/etc/tmpfiles.d/{_place(service)}.conf")]
    wanted = _within(root, _UNITS / "multi-user.target.wants")
    others = [
        entry.name for entry in wanted.glob(f"{service.command}@*.service") if entry.name != service.unit
    ]
    if not service.instance or not others:
        paths.append(_UNITS / service.unit_file)
    for path in paths:
        if _within(root, path).exists():
            say(f"remove {path}")
            if not dry_run:
                _within(root, path).unlink()
    if root == Path("/"):
        _run(["systemctl", "daemon-reload"], dry_run=dry_run, say=say)
    say(f"left as they are: {service.config_dir}, /var/lib/{_place(service)}, user {USER}")


def _place(service: Service) -> str:
    place = place_of(service.config_dir)
    if place is None or not place.startswith(service.command):
        message = (
            f"--config-dir of a service must be /etc/{service.command}, or /etc/{service.command}/NAME for "
            f"one of several, got {str(service.config_dir)!r}"
        )
        raise ConfigError(message)
    return place


def _unit(service: Service) -> str:
    place, is_agent = _place(service), service.role == "agent"
    config_dir = service.config_dir
    description = f"EdgeDAQ {service.role}"
    if service.instance:
        place = place.removesuffix(service.instance) + "%i"
        config_dir = config_dir.parent / "%i"
        description += " %i"
    credential = "edgedaq-enrolment" if is_agent else "edgedaq-aggregator-key"
    values = {
        "credential": f"{credential}:{credential}-%i" if service.instance else credential,
        "description": description,
        "command": service.command,
        "unit": service.unit_file,
        "exec": str(service.prefix / "bin" / service.command),
        "config_dir": str(config_dir),
        "user": USER,
        "log": "spool" if is_agent else "journal",
        "place": place,
        "state_mode": "0750",
        "devices": _AGENT_DEVICES if is_agent else _NO_DEVICES,
        "devices_why": "Devices: those kinds alone that jobs read." if is_agent else "It needs no devices.",
        "writable": "".join(f"ReadWritePaths={path}\n" for path in service.writable).rstrip("\n"),
    }
    text = _resource("unit.service")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _resource(name: str) -> str:
    return (files("edgedaq") / "service_files" / name).read_text(encoding="utf-8")


def _check(service: Service, root: Path, *, dry_run: bool) -> None:
    _place(service)
    if dry_run:
        return
    if root == Path("/") and os.geteuid() != 0:
        message = (
            f"{service.command} install-service must be run by root (sudo); --dry-run shows what it does"
        )
        raise ConfigError(message)
    for path in (service.prefix, Path(sys.executable).resolve()):
        if path.parts[1:2] in (("home",), ("root",)):
            message = (
                f"{path} is in a home directory, which the service cannot see; make a virtual environment of "
                f"the system's Python, e.g. /usr/bin/python3 -m venv /opt/edgedaq, and install EdgeDAQ there"
            )
            raise ConfigError(message)
    program = _within(root, service.prefix / "bin" / service.command)
    if not program.exists():
        message = f"{program} does not exist; install EdgeDAQ into {service.prefix}"
        raise ConfigError(message)


def _present_groups(root: Path) -> list[str]:
    try:
        text = _within(root, Path("/etc/group")).read_text(encoding="utf-8")
    except OSError:
        return []
    present = {line.partition(":")[0] for line in text.splitlines()}
    return [group for group in DEVICE_GROUPS if group in present]


def _within(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _write(
    root: Path, path: Path, text: str, *, dry_run: bool, say: Callable[[str], None], mode: int = 0o644
) -> bool:
    """Write a file unless it is right already; True if it was not."""
    target = _within(root, path)
    if target.exists() and target.read_text(encoding="utf-8") == text:
        say(f"keep {path}")
        return False
    say(f"write {path}")
    if dry_run:
        say("".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(mode)
    if mode & 0o007 == 0:  # for who owns the directory
        owner = target.parent.stat()
        os.chown(new, owner.st_uid, owner.st_gid)
    new.replace(target)
    return True


def _run(command: list[str], *, dry_run: bool, say: Callable[[str], None]) -> None:
    say("run " + " ".join(command))
    if dry_run:
        return
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as e:
        message = f"{' '.join(command)} failed: {e}"
        raise ConfigError(message) from e
