from __future__ import annotations

import resource
import threading

import msgpack
import pytest
import zmq
from edgedaq.control import ControlError, ControlServer, request
from edgedaq.errors import ConfigError
from edgedaq.runtime_dir import InstanceLock, check_runtime_dir, default_runtime_dir, holder, prepare, remove


def refuse(_arguments):
    message = "no"
    raise ControlError(message)


@pytest.fixture
def server(runtime_dir):
    """Return a runtime directory in which commands are answered."""
    prepare(runtime_dir)
    is_over = threading.Event()
    with InstanceLock(runtime_dir), zmq.Context() as context:
        handlers = {"status": lambda arguments: {"echo": arguments}, "refuse": refuse}
        control = ControlServer(runtime_dir, handlers, context)

        def serve():
            while not is_over.is_set():
                if control.socket.poll(20):
                    control.service()

        thread = threading.Thread(target=serve)
        thread.start()
        yield runtime_dir
        is_over.set()
        thread.join()
        control.close()


def test_a_command_is_answered(server):
    assert request(server, "status", {"a": 1}) == {"echo": {"a": 1}}


def test_an_unknown_command_is_refused_with_the_nearest_one(server):
    with pytest.raises(ControlError, match=r"unknown command 'statsu', did you mean 'status'\?"):
        request(server, "statsu")


def test_a_refusal_reaches_the_person_who_asked(server):
    with pytest.raises(ControlError, match=r"\Ano\Z"):
        request(server, "refuse")


@pytest.mark.parametrize(
    "noise",
    [b"", b"\xc1", msgpack.packb(1), msgpack.packb({"command": "status"}), msgpack.packb({"id": True}),
     msgpack.packb({"id": 1, "command": ["status"]}),
     msgpack.packb({"id": 1, "command": "status", "arguments": 3})],
)  # fmt: skip
def test_noise_is_refused_and_the_next_command_is_answered(server, noise):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{server / 'control.sock'}")
        socket.send(noise)
        assert socket.poll(5000)
        assert msgpack.unpackb(socket.recv())["ok"] is False
        socket.send_multipart([b"a", b"b", b"c"])
    assert request(server, "status") == {"echo": {}}


def test_where_nothing_runs_that_is_said_at_once(runtime_dir):
    with pytest.raises(ControlError, match="nothing runs"):
        request(runtime_dir / "none", "status")


def test_a_supervisor_that_does_not_answer_is_named(runtime_dir):
    prepare(runtime_dir)
    with (
        InstanceLock(runtime_dir),
        pytest.raises(ControlError, match=r"process \d+ does not answer within 0\.1 s"),
    ):
        request(runtime_dir, "status", limit_s=0.1)


def test_a_second_supervisor_is_refused_with_the_pid_of_the_first(runtime_dir):
    import os

    prepare(runtime_dir)
    with InstanceLock(runtime_dir):
        assert holder(runtime_dir) == os.getpid()
        with pytest.raises(ConfigError, match=f"already running as process {os.getpid()}"):
            InstanceLock(runtime_dir)
    assert holder(runtime_dir) is None
    with InstanceLock(runtime_dir):
        pass


def test_a_supervisor_starts_where_there_is_no_room_for_its_pid(runtime_dir):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with InstanceLock(runtime_dir):
            assert holder(runtime_dir) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert holder(runtime_dir) is None


def test_a_runtime_directory_is_for_this_user_alone(runtime_dir):
    inside = runtime_dir / "a"
    prepare(inside)
    assert inside.stat().st_mode & 0o077 == 0
    inside.chmod(0o777)
    prepare(inside)
    assert inside.stat().st_mode & 0o077 == 0
    elsewhere = runtime_dir / "b"
    elsewhere.symlink_to(inside)
    with pytest.raises(ConfigError, match="must be a directory of user"):
        prepare(elsewhere)


def test_a_runtime_directory_goes_away_unless_a_ring_waits_in_it(runtime_dir):
    inside = runtime_dir / "a"
    prepare(inside)
    ring = inside / "rings" / "0123456789abcdef.ring"
    ring.touch()
    remove(inside)
    assert ring.exists()
    ring.unlink()
    remove(inside)
    assert not inside.exists()


def test_a_runtime_directory_whose_sockets_would_have_no_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="runtime_dir must be at most 79 bytes"):
        check_runtime_dir(tmp_path / ("x" * 100))


def test_each_directory_and_role_has_its_own_runtime_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    first = default_runtime_dir(tmp_path, "agent")
    assert default_runtime_dir(tmp_path / ".." / tmp_path.name, "agent") == first
    assert default_runtime_dir(tmp_path, "aggregator") != first
    check_runtime_dir(first)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/edgedaq")
    assert str(default_runtime_dir(tmp_path, "agent")) == "/run/edgedaq"
