"""Changed files while jobs run: first what is decided, then with real processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from edgedaq.control import ControlError, request
from edgedaq.policy import Policy
from edgedaq.reload import changes_between
from edgedaq.worker_plan import WorkerPlan

from tests.common.test_supervisor import start as _start

start = _start


def plan(name, *, source="", **facts):
    return WorkerPlan(
        name, "T", 0, Policy(), {"config": facts.pop("config", {})}, source=source or f"{name}.toml", **facts
    )


def held(*plans):
    return {one.unique_id: one for one in plans}


UPLINK = WorkerPlan("uplink", "Uplink", 1, Policy(), {})


def test_what_did_not_change_is_not_touched():
    plans = [plan("a"), plan("b", config={"x": 1})]
    assert changes_between(held(*plans, UPLINK), plans).to_map() == {
        "added": [], "changed": [], "removed": [], "refused": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        plan("a", config={"x": 2}),
        plan("a", code="2"),
        replace(plan("a"), policy=Policy(hang_limit_s=1)),
        plan("a", source="renamed.toml"),
    ],
)
def test_a_changed_file_policy_or_code_changes_that_job_alone(changed):
    found = changes_between(held(plan("a"), plan("b")), [changed, plan("b")])
    assert found.to_map() == {"added": [], "changed": ["a"], "removed": [], "refused": {}}


def test_new_files_are_added_and_missing_ones_removed_but_never_the_parts():
    found = changes_between(held(plan("a"), UPLINK), [plan("b")])
    assert found.to_map() == {"added": ["b"], "changed": [], "removed": ["a"], "refused": {}}


def test_a_file_that_is_broken_now_leaves_its_job_as_it_was_also_under_another_id():
    broken = plan("hv", source="device.toml", problem="device.toml: x")
    running = plan("high_voltage", source="device.toml")
    found = changes_between(held(running), [broken])
    assert found.to_map() == {
        "added": [], "changed": [], "removed": [], "refused": {"high_voltage": "device.toml: x"},
    }  # fmt: skip


def test_a_broken_file_that_was_broken_before_tells_the_new_problem_and_a_mended_one_begins():
    before = held(plan("a", problem="old"))
    assert changes_between(before, [plan("a", problem="new")]).to_map()["changed"] == ["a"]
    assert changes_between(before, [plan("a")]).to_map()["changed"] == ["a"]


def test_an_id_that_another_file_has_now_belongs_to_that_one():
    found = changes_between(
        held(plan("x", source="a.toml")),
        [plan("a", source="a.toml", problem="broken"), plan("x", source="b.toml")],
    )
    assert found.to_map() == {"added": [], "changed": ["x"], "removed": [], "refused": {}}


def write(run, name, kind, more=""):
    directory = run.log.parent
    (directory / f"{name}.toml").write_text(
        f'daq_job_type = "jobs.py:{kind}"\nlog = "{directory / "notes"}"\nrestart_backoff = "50 ms"\n{more}'
    )


def test_a_reload_starts_changes_and_ends_each_job_for_itself(start):
    run = start(stays="Runs", changes="Runs", goes="Runs")
    first = run.wait_running("stays", "changes", "goes")
    write(run, "changes", "Runs", 'verbosity = "DEBUG"')
    write(run, "comes", "Runs")
    (run.log.parent / "goes.toml").unlink()
    told = request(run.runtime_dir, "reload", limit_s=10)
    assert told == {"added": ["comes"], "changed": ["changes"], "removed": ["goes"], "refused": {}}
    then = run.wait(
        lambda jobs: (
            jobs.get("comes", {}).get("state") == "RUNNING"
            and jobs["changes"]["state"] == "RUNNING"
            and jobs["changes"]["pid"] != first["changes"]["pid"]
            and jobs["goes"]["state"] == "STOPPED"
            and jobs
        )
    )
    assert then["stays"]["pid"] == first["stays"]["pid"]
    assert then["goes"]["reason"] == "stopped; its file was removed"
    assert request(run.runtime_dir, "reload")["changed"] == []
    write(run, "goes", "Runs")
    assert request(run.runtime_dir, "reload")["added"] == ["goes"]
    run.wait_running("goes")


def test_a_broken_file_leaves_the_old_job_running_and_says_so_until_it_is_mended(start):
    run = start(a="Runs", b="Runs")
    pid = run.wait_running("a", "b")["a"]["pid"]
    write(run, "a", "Runs", "hang_limitt = 3")
    write(run, "new", "NoSuchClass")
    told = request(run.runtime_dir, "reload")
    assert list(told["refused"]) == ["a"]
    assert "hang_limitt" in told["refused"]["a"]
    jobs = run.jobs()
    assert (jobs["a"]["state"], jobs["a"]["pid"]) == ("RUNNING", pid)
    assert "its file is broken" in jobs["a"]["reason"]
    assert jobs["new"]["state"] == "FAILED"
    write(run, "a", "Runs")
    write(run, "new", "Runs")
    assert request(run.runtime_dir, "reload") == {
        "added": [], "changed": ["new"], "removed": [], "refused": {},
    }  # fmt: skip
    assert run.wait_running("a", "new")["a"]["reason"] == ""
    assert run.jobs()["a"]["pid"] == pid


def test_code_of_a_user_that_was_edited_is_taken_at_a_reload(start):
    run = start(a="Fails\nrestart_limit = 0")
    run.wait(lambda jobs: jobs.get("a", {}).get("state") == "FAILED")
    code = run.log.parent / "jobs.py"
    code.write_text(code.read_text().replace('raise RuntimeError("the crate is off")', "self.sleep(100)"))
    assert request(run.runtime_dir, "reload")["changed"] == ["a"]
    run.wait_running("a")


def test_a_hang_up_is_a_reload_under_a_service_and_a_stop_in_a_terminal(start):
    run = start({"INVOCATION_ID": "x"}, a="Runs")
    run.wait_running("a")
    write(run, "b", "Runs")
    os.kill(run.process.pid, signal.SIGHUP)
    run.wait_running("a", "b")
    assert run.stop()[0] == 0


def test_nothing_is_reloaded_while_everything_stops(start):
    run = start(slow="Stuck\nstop_limit = 2")
    run.wait_running("slow")
    os.kill(run.process.pid, signal.SIGTERM)
    write(run, "b", "Runs")
    with pytest.raises(ControlError, match="stopping"):
        run.wait(lambda _: request(run.runtime_dir, "reload"), 3)
    assert run.process.wait(10) == 0
    assert "job=b" not in run.log.read_text()


def test_jobs_begin_in_the_order_that_their_files_ask_for_and_nobody_waits_for_one_that_fails(start):
    run = start(
        last="Runs\nstart_order = 2",
        broken="NoSuchClass\nstart_order = -1",
        fails="Fails\nstart_order = 0",
        first="Runs\nstart_order = 1",
    )
    run.wait_running("first", "last")
    log = run.log.read_text()
    begun = [log.index(f"job={name} state_from=STOPPED state_to=STARTING") for name in ("fails", "first")]
    assert begun[0] < begun[1]
    assert log.index("job=first state_from=STARTING state_to=RUNNING") < log.index(
        "job=last state_from=STOPPED state_to=STARTING"
    )
