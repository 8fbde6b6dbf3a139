"""Two machines that share a cable and nothing else: the two commands of the enrolment, and who listens in.

The machines are network namespaces, the cable is a veth pair; root makes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import environment

MARKER = b"what-was-measured-is-nobody-elses-business"
JOB = f"""
import time
from edgedaq import DAQJob, StorableDAQJobConfig

class Config(StorableDAQJobConfig, kw_only=True):
    pass

class Marker(DAQJob):
    config_type = Config

    def start(self):
        for number in range(200):
            self.put_raw({MARKER!r} * 20 + number.to_bytes(4, "little"))
            self.sleep(0.005)
"""
CAPTURE = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as tap, open(sys.argv[2], "wb") as out:
    tap.bind((sys.argv[1], 0))
    print("ready", flush=True)
    while True:
        out.write(tap.recv(1 << 16))
        out.flush()
"""
PORT = 7770
HUB, NODE = "10.213.77.1", "10.213.77.2"


class Machine:
    """A network namespace, and what runs in it."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self.environment = {**environment(), "XDG_STATE_HOME": str(log.parent / f"{name}-state")}
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if command[0] == "-c" else log,
                stderr=log,
                env=self.environment,
            )
        self.running.append(process)
        return process

    def say(self, *command: str) -> str:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, sys.executable, *command],
            check=True,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=30,
        ).stdout

    def close(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        reason = "network namespaces need root and the `ip` command"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    names = [f"edq{os.getpid()}{side}" for side in "ab"]
    hub, node = (Machine(name, tmp_path / f"{name}.log") for name in names)
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "edq0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "edq0",
            "netns",
            names[1],
        )
        for name, address in zip(names, (HUB, NODE), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "edq0")
            _ip("-n", name, "link", "set", "edq0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hub, node
    finally:
        hub.close()
        node.close()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        for machine in (hub, node):
            if machine.log.exists():
                print(machine.log.read_text(errors="replace")[-6000:])


def test_two_commands_join_two_machines_and_the_cable_shows_no_payload(
    machines: tuple[Machine, Machine], tmp_path: Path, runtime_dir: Path
) -> None:
    hub, node = machines
    hub_dir, node_dir, out_dir = tmp_path / "hub", tmp_path / "node", tmp_path / "out"
    hub_dir.mkdir()
    (hub_dir / "aggregator.toml").write_text(
        f'listen = "tcp://0.0.0.0:{PORT}"\nout_dir = "{out_dir}"\nruntime_dir = "{runtime_dir / "hub"}"\n'
    )
    (hub_dir / "raw.toml").write_text('daq_job_type = "DAQJobStoreRaw"\n')
    captured = tmp_path / "captured"
    tap = hub.start("-c", CAPTURE, "edq0", str(captured))
    assert tap.stdout is not None
    assert tap.stdout.readline() == b"ready\n"
    aggregator = ["edgedaq_aggregator.cli", "--config-dir", str(hub_dir)]
    hub.start("-m", aggregator[0], "run", *aggregator[1:])
    _wait(lambda: _is_listening(hub), 30)

    told = hub.say("-m", aggregator[0], "invite", "pi3", *aggregator[1:])
    line = re.search(r"edgedaq-agent (join tcp://\S+ \S+) --config-dir DIR", told)
    assert line is not None, told
    assert f"tcp://{HUB}:{PORT}" in told
    joined = node.say("-m", "edgedaq_agent.cli", *line[1].split(), "--config-dir", str(node_dir))
    assert "pi3 has joined" in joined
    token = line[1].split()[2].encode()

    job = tmp_path / "marker.py"
    job.write_text(JOB)
    (node_dir / "marker.toml").write_text(
        f'daq_job_type = "{job}:Marker"\n[store_config.raw]\nfile_path = "m.bin"\n'
    )
    node.start("-m", "edgedaq_agent.cli", "run", "--config-dir", str(node_dir))
    stored = out_dir / "pi3" / "m.bin"
    size = 200 * (20 * len(MARKER) + 4)
    _wait(lambda: stored.exists() and stored.stat().st_size >= size, 60)
    content = stored.read_bytes()
    assert len(content) == size
    assert content.count(MARKER) == 200 * 20

    node.say("-c", f"import socket; socket.socket(2, 2).sendto(b'seen-in-clear', ('{HUB}', 9))")
    _wait(lambda: b"seen-in-clear" in captured.read_bytes(), 10)
    seen = captured.read_bytes()
    assert len(seen) > size  # it did come by this cable
    for secret in (MARKER, token, b"marker", b"m.bin", b"instance"):
        assert secret not in seen, secret


def _is_listening(machine: Machine) -> bool:
    script = f"import socket; socket.create_connection(('{HUB}', {PORT}), 1).close()"
    with contextlib.suppress(subprocess.CalledProcessError):
        machine.say("-c", script)
        return True
    return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _wait(condition: object, limit_s: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
