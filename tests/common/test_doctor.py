from __future__ import annotations

import os
import pwd
import socket
import threading
from pathlib import Path

import pytest
from edgedaq.doctor import (
    Finding,
    check_clock,
    check_devices,
    check_disk,
    check_key_file,
    check_listen,
    check_memory,
    check_reachable,
    check_wear,
    device_paths,
    format_findings,
)

ME = pwd.getpwuid(os.getuid()).pw_name
MISSING = Finding("problem", "keys", "this node is not enrolled", "join")


def levels(findings):
    return [found.level for found in findings]


def every_fix_is_there(findings):
    return all(found.fix for found in findings if found.level != "ok")


def test_the_kernel_is_asked_whether_the_clock_is_kept_right():
    (found,) = check_clock()
    assert found.level in ("ok", "warning", "problem")
    assert every_fix_is_there([found])


def test_a_disk_is_measured_and_compared_with_what_may_be_taken_of_it(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    room, speed = check_disk("spool", tmp_path / "not/yet/there", 1 << 20, 1 << 20)
    assert room.level == "ok"
    assert "MB/s" in speed.text
    assert levels(check_disk("spool", tmp_path, 2 * free, 1 << 20))[0] == "warning"
    full = check_disk("spool", tmp_path, 0, 2 * free)
    assert full[0].level == "problem"
    assert every_fix_is_there(full)
    assert not list(tmp_path.iterdir())


def test_wear_is_never_guessed(tmp_path):
    (found,) = check_wear("spool", tmp_path)
    assert found.text


def test_rings_that_do_not_fit_and_rings_on_a_disk_are_problems(tmp_path, runtime_dir):
    assert levels(check_memory(runtime_dir, 1 << 20)) == ["ok"]
    (found,) = check_memory(runtime_dir, 1 << 60)
    assert found.level == "problem"
    assert "remount" in found.fix
    if Path("/proc/mounts").exists() and tmp_path.stat().st_dev != runtime_dir.stat().st_dev:
        (found,) = check_memory(tmp_path, 1)
        assert (found.level, every_fix_is_there([found])) == ("problem", True)


def test_devices_are_found_wherever_a_file_names_them():
    config = {"port": "/dev/ttyUSB0", "i2c": {"bus": "/dev/i2c-1"}, "path": "/dev/shm/x", "n": 3}
    assert device_paths(config) == [Path("/dev/ttyUSB0"), Path("/dev/i2c-1")]


def test_a_device_that_is_absent_or_not_for_this_user_is_a_problem_with_its_remedy(tmp_path):
    device = tmp_path / "ttyUSB0"
    (found,) = check_devices("hv.toml", [device], ME)
    assert "No such file" in found.text
    assert "plug it in" in found.fix
    device.touch(mode=0o600)
    assert levels(check_devices("hv.toml", [device], ME)) == ["ok"]
    (found,) = check_devices("hv.toml", [device], "nobody")
    assert found.level == "problem"
    assert "usermod -aG" in found.fix
    device.chmod(0o666)
    assert levels(check_devices("hv.toml", [device], "nobody")) == ["ok"]


@pytest.mark.parametrize(
    ("answer", "level"), [(b"\xff" + bytes(8) + b"\x7f\x03", "ok"), (b"SSH-2.0-OpenSSH\r\n", "problem")]
)
def test_only_what_greets_like_an_intake_is_one(answer, level):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.settimeout(5)

        def greet():
            held, _ = server.accept()
            with held:
                held.sendall(answer)
                held.recv(1)

        thread = threading.Thread(target=greet)
        thread.start()
        found = check_reachable(address)
        thread.join()
    assert levels(found) == [level]
    assert every_fix_is_there(found)


def test_nobody_there_is_told_apart_from_a_name_that_is_not_known():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        (found,) = check_reachable(f"tcp://127.0.0.1:{held.getsockname()[1]}")
        assert "refused" in found.text
        held.listen()
        (found,) = check_listen(f"tcp://127.0.0.1:{held.getsockname()[1]}", is_running=False)
        assert "ss -ltnp" in found.fix
    assert levels(check_listen("tcp://127.0.0.1:0", is_running=False)) == ["ok"]
    (found,) = check_reachable("tcp://no-such-host.invalid:7770")
    assert "is not known" in found.text


def test_a_secret_key_is_its_users_alone(tmp_path):
    key = tmp_path / "enrolment.key"
    assert check_key_file(key, ME, missing=MISSING) == [MISSING]
    key.touch(mode=0o640)
    (found,) = check_key_file(key, ME, missing=MISSING)
    assert "chmod 600" in found.fix
    key.chmod(0o600)
    assert levels(check_key_file(key, ME, missing=MISSING)) == ["ok"]
    (found,) = check_key_file(key, "nobody", missing=MISSING)
    assert "chown nobody" in found.fix


def test_what_is_to_be_done_stands_below_what_is_wrong():
    text = format_findings([Finding("ok", "a", "fine"), Finding("problem", "b", "broken", "mend it")])
    assert text.splitlines() == ["ok       a: fine", "problem  b: broken", "           -> mend it"]
