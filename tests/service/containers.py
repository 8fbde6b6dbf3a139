"""Machines for tests: Debian with systemd as PID 1, in which EdgeDAQ is installed as users install it.

Layers of overlayfs, the lowest first; the first two are built once and kept in ``CACHE``, outside the tree::

    base      debootstrap: Debian with systemd and Python, from the mirror that apt is configured for
    libraries /opt/edgedaq, a plain virtual environment with what EdgeDAQ needs, by wheels
    product   EdgeDAQ itself, a wheel of this tree; built by each test run
    machine   what one machine writes; survives its reboots and power cuts, ends with the test

Needs root, ``debootstrap`` and ``systemd-nspawn``; ``why_not`` says what is missing. Machines of one
``Network`` share its loopback, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path("/var/tmp/edgedaq-nspawn")
PREFIX = "/opt/edgedaq"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv")
_PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter", "ip", "mount", "apt-get")
_LIBRARIES = (
    *("pyzmq", "msgpack", "msgspec", "xxhash", "psutil", "pyserial", "smbus2"),
    *("pyarrow", "numpy", "uproot", "h5py", "pymysql", "redis", "async-timeout"),
)
_ENVIRONMENT = {"PATH": f"{PREFIX}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_CGROUPS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified")


def why_not() -> str:
    """Return why this machine can hold no others; empty if it can."""
    if os.geteuid() != 0:
        return "containers need root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"containers need {', '.join(missing)}" if missing else ""


def run(*command: str, limit_s: float = 600, **options: Any) -> str:
    """Run a command; return what it says.

    Raises:
        AssertionError: It failed.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@contextlib.contextmanager
def overlay(lower: list[Path], upper: Path) -> Iterator[Path]:
    """Mount ``upper`` over the layers below, the highest first; yield where."""
    upper.mkdir(parents=True, exist_ok=True)
    work, merged = upper.with_name(f"{upper.name}.work"), upper.with_name(f"{upper.name}.merged")
    for path in (work, merged):
        path.mkdir(exist_ok=True)
    layers = ":".join(map(str, lower))
    run(
        "mount",
        "-t",
        "overlay",
        "overlay",
        "-o",
        f"lowerdir={layers},upperdir={upper},workdir={work}",
        str(merged),
    )
    try:
        yield merged
    finally:
        run("umount", "-l", str(merged))
        shutil.rmtree(work, ignore_errors=True)
        merged.rmdir()


def layers() -> list[Path]:
    """Return the layers below the product, the highest first; build what is not there."""
    CACHE.mkdir(mode=0o700, exist_ok=True)
    base = _built("base", " ".join(PACKAGES), _debootstrap)
    constraints = (ROOT / "constraints.txt").read_text()
    return [
        _built("libraries", constraints + " ".join(_LIBRARIES), lambda path: _install_libraries(base, path)),
        base,
    ]


def product_layer(lower: list[Path], place: Path, version: str | None = None) -> Path:
    """Build the layer with this tree's EdgeDAQ, or the same as another version of it."""
    upper = place / f"product-{version or 'this'}"
    wheel = build_wheel(place / f"wheel-{version or 'this'}", version)
    with overlay(lower, upper) as merged:
        install_wheel(merged, wheel)
    return upper


def build_wheel(place: Path, version: str | None = None) -> Path:
    """Return a wheel of this tree, made from a copy of it."""
    copy = place / "tree"
    kept = ("common", "agent", "aggregator", "pyproject.toml", "README.md", "LICENSE")
    copy.mkdir(parents=True)
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    if version is not None:
        project = copy / "pyproject.toml"
        text = project.read_text().splitlines()
        project.write_text(
            "\n".join(f'version = "{version}"' if x.startswith("version = ") else x for x in text)
        )
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(copy))
    (wheel,) = place.glob("edgedaq-*.whl")
    return wheel


def install_wheel(tree: Path, wheel: Path) -> None:
    """Install EdgeDAQ into the virtual environment of a tree, over another version if there is one."""
    shutil.copy(wheel, tree / "tmp" / wheel.name)
    run("chroot", str(tree), f"{PREFIX}/bin/pip", "install", "--quiet", "--no-deps", "--no-index",
        "--force-reinstall", f"/tmp/{wheel.name}", env=_ENVIRONMENT)  # fmt: skip


def _built(name: str, contents: str, build: Callable[[Path], None]) -> Path:
    path = CACHE / f"{name}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"
    if not path.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
        try:
            new.chmod(0o755)
            build(new)
            new.rename(path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if not path.exists():  # another run has built the same meanwhile
                raise
    return path


def _debootstrap(path: Path) -> None:
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    codename = release["VERSION_CODENAME"].strip('"')
    targets = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {codename}"
    )
    mirror = targets.split()[0]
    run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", codename, str(path), mirror)


def _install_libraries(base: Path, upper: Path) -> None:
    with overlay([base], upper) as merged, tempfile.TemporaryDirectory() as wheels:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = run("chroot", str(merged), "python3", "-c", code, env=_ENVIRONMENT).strip()
        _pip("download", "--only-binary=:all:", "--python-version", version, "--dest", wheels,
             "-c", str(ROOT / "constraints.txt"), *_LIBRARIES)  # fmt: skip
        shutil.copytree(wheels, merged / "tmp" / "wheels")
        run("chroot", str(merged), "python3", "-m", "venv", PREFIX, env=_ENVIRONMENT)
        run("chroot", str(merged), f"{PREFIX}/bin/pip", "install", "--quiet", "--no-index",
            "--find-links", "/tmp/wheels", *_LIBRARIES, env=_ENVIRONMENT)  # fmt: skip
        shutil.rmtree(merged / "tmp" / "wheels")


def _pip(*arguments: str) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd="/")


class Network:
    """A network namespace with nothing but loopback. A context manager."""

    def __init__(self) -> None:
        self.name = f"edq-{os.getpid()}-{time.monotonic_ns() % 10**6}"

    def __enter__(self) -> Self:
        run("ip", "netns", "add", self.name)
        run("ip", "netns", "exec", self.name, "ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        run("ip", "netns", "del", self.name)


class Machine:
    """One machine. A context manager: it boots, and at the end its power is cut and it is forgotten."""

    def __init__(self, name: str, lower: list[Path], place: Path, network: Network) -> None:
        self.name = f"{name}-{network.name}"
        self._network = network
        self._stack = contextlib.ExitStack()
        self._upper = place / name
        self._lower = lower
        self._log = place / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroups = [Path(base) / self.name for base in _CGROUPS if Path(base).is_dir()]
        self._has_systemd = Path("/run/systemd/system").is_dir()

    def __enter__(self) -> Self:
        self.root = self._stack.enter_context(overlay(self._lower, self._upper))
        (self.root / "etc/machine-id").write_text("uninitialized\n")
        self.boot()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()
        self._stack.close()
        for cgroup in self._cgroups:
            for path in sorted(cgroup.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()

    def boot(self, limit_s: float = 60.0) -> None:
        """Switch it on; return when it runs."""
        command = [
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--console=pipe"),
            *(f"--directory={self.root}", f"--machine={self.name}", "--kill-signal=SIGRTMIN+3"),
            f"--network-namespace-path=/run/netns/{self._network.name}",
        ]
        script = "exec " + " ".join(command)
        if not self._has_systemd:  # nobody here manages control groups: a container needs its own
            for cgroup in self._cgroups:
                cgroup.mkdir(exist_ok=True)
            script = (
                "".join(f"echo $$ > {cgroup}/cgroup.procs; " for cgroup in self._cgroups)
                + script
                + " --keep-unit"
            )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.wait_running(limit_s)

    def wait_running(self, limit_s: float = 60.0) -> None:
        """Wait until it has booted."""
        self.wait(
            lambda: self.ask("systemctl", "is-system-running").strip() in ("running", "degraded"),
            limit_s,
            "boots",
        )

    @property
    def leader(self) -> int:
        """The pid of its PID 1; 0 while it has none."""
        assert self._process is not None
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        children = path.read_text().split() if path.exists() else []
        return int(children[0]) if children else 0

    def run(self, *command: str, limit_s: float = 120) -> str:
        """Run a command in it; return what it says."""
        return run("nsenter", "-t", str(self.leader), "-a", *command, limit_s=limit_s, env=_ENVIRONMENT)

    def ask(self, *command: str) -> str:
        """Run a command whatever comes of it; empty while the machine cannot."""
        leader = self.leader
        if not leader:
            return ""
        done = subprocess.run(
            ["nsenter", "-t", str(leader), "-a", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=_ENVIRONMENT,
        )
        return done.stdout

    def wait(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        """Wait for a condition."""
        end_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end_s, f"{self.name}: not within {limit_s:g} s: {what}\n{self.tail()}"
            time.sleep(0.1)

    def tail(self) -> str:
        """Return the end of its journal."""
        return (
            self.ask("journalctl", "--no-pager", "-n", "60") or self._log.read_text(errors="replace")[-3000:]
        )

    def cut_power(self) -> None:
        """End everything in it at once."""
        if self._process is None:
            return
        if self.leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def reboot(self) -> None:
        """Boot it again in order; return when it runs."""
        assert self._process is not None
        self.ask("systemctl", "poweroff")
        self._process.wait(90)
        self.boot()
