from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from edgedaq.logsetup import configure, get_logger, is_service


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    held, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = held
    root.setLevel(level)


def lines(capfd):
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_json_has_time_level_event_and_the_facts_of_the_process_and_of_the_logger(capfd):
    configure("INFO", json=True, facts={"node": "n1"})
    get_logger(job="hv").info("job.started", pid=7, path=Path("/x"))
    (line,) = lines(capfd)
    assert line["timestamp"].endswith("Z")
    assert {key: line[key] for key in ("level", "event", "node", "job", "pid", "path")} == {
        "level": "info", "event": "job.started", "node": "n1", "job": "hv", "pid": 7, "path": "/x",
    }  # fmt: skip


def test_less_severe_events_than_asked_for_are_not_written(capfd):
    configure("WARNING", json=True)
    get_logger().info("a.b")
    logging.getLogger("lib").info("quiet")
    get_logger().warning("c.d")
    assert [line["event"] for line in lines(capfd)] == ["c.d"]


def test_an_exception_is_one_line_of_json_with_its_traceback(capfd):
    configure(json=True)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        get_logger().exception("job.crashed")
    (line,) = lines(capfd)
    assert "ZeroDivisionError" in line["exception"]


def test_what_libraries_log_and_warn_comes_out_the_same_way(capfd):
    configure(json=True, facts={"node": "n1"})
    logging.getLogger("some.library").warning("value %d", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old thing", stacklevel=1)
    found = lines(capfd)
    assert (found[0]["event"], found[0]["logger"], found[0]["node"]) == ("value 3", "some.library", "n1")
    assert "old thing" in found[1]["event"]


def test_the_readable_form_is_one_line_that_names_event_and_facts(capfd):
    configure(json=False)
    get_logger(job="hv").warning("job.changed", state_to="BACKOFF")
    (line,) = capfd.readouterr().err.splitlines()
    assert "job.changed" in line
    assert "state_to=BACKOFF" in line


def test_configuring_again_does_not_write_lines_twice(capfd):
    configure(json=True)
    configure(json=True)
    logging.getLogger("x").error("once")
    assert len(lines(capfd)) == 1


def test_a_service_is_told_from_a_shell_by_its_environment(monkeypatch):
    for name in ("NOTIFY_SOCKET", "INVOCATION_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not is_service()
    monkeypatch.setenv("INVOCATION_ID", "abc")
    assert is_service() == (not os.isatty(2))


def test_a_closed_stderr_does_not_end_the_process():
    code = (
        "import os; os.close(2)\n"
        "from edgedaq.logsetup import configure, get_logger\n"
        "configure(json=True); get_logger().info('a.b'); print('alive')"
    )
    common = Path(__file__).parents[2] / "common"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(common)},
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    assert done.stdout == "alive\n"
