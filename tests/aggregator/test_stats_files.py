from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest
from edgedaq.errors import WireError
from edgedaq.stats import JobReport, NodeReport, Snapshot
from edgedaq_aggregator.stats_columns import JOB_COLUMNS, NODE_COLUMNS
from edgedaq_aggregator.stats_files import JOBS_FILE, KEPT_FILE, NODES_FILE, Statistics, replace_file

SECOND = 1_000_000_000


def report(
    second: int, *, node: str = "pi-1", life: str = "s1", count: int = 5, **extra: object
) -> NodeReport:
    current = Snapshot("hv", "DAQJobTest", f"{life}-a", 1, 0, out_count=count)
    jobs = [JobReport("hv", "DAQJobTest", "RUNNING", current=current)]
    return NodeReport(node, "0.1.0", "boot", second * SECOND, second * SECOND, jobs, life=life)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_files_have_the_promised_columns_and_a_row_for_all_nodes(tmp_path):
    statistics = Statistics(tmp_path / "out", tmp_path / "state")
    statistics.take(report(1).to_map())
    statistics.service()
    jobs, nodes = read(tmp_path / "out" / JOBS_FILE), read(tmp_path / "out" / NODES_FILE)
    assert tuple(jobs[0]) == JOB_COLUMNS
    assert tuple(nodes[0]) == NODE_COLUMNS
    assert [row["supervisor"] for row in nodes] == ["pi-1", "ALL"]
    assert (jobs[0]["is_alive"], jobs[0]["message_out_count"], jobs[0]["cpu_percent"]) == ("true", "5", "")


def test_before_anything_was_reported_there_are_files_with_only_all(tmp_path):
    Statistics(tmp_path, tmp_path / "state").close()
    assert read(tmp_path / JOBS_FILE) == []
    assert [row["supervisor"] for row in read(tmp_path / NODES_FILE)] == ["ALL"]


def test_totals_go_on_after_the_aggregator_was_started_again(tmp_path):
    first = Statistics(tmp_path, tmp_path / "state")
    first.take(report(1, count=5).to_map())
    first.close()
    second = Statistics(tmp_path, tmp_path / "state")
    second.take(report(1, life="s2", count=3).to_map())
    second.take(report(2, life="s2", count=4).to_map())
    second.close()
    assert [row["message_out_count"] for row in read(tmp_path / JOBS_FILE)] == ["9"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": 1}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_kept_totals_are_set_aside_and_counting_starts_anew(tmp_path, damage):
    kept = tmp_path / KEPT_FILE
    kept.write_bytes(damage)
    statistics = Statistics(tmp_path / "out", tmp_path)
    assert kept.with_suffix(".bad").read_bytes() == damage
    statistics.take(report(1).to_map())
    statistics.close()
    assert read(tmp_path / "out" / JOBS_FILE)[0]["message_out_count"] == "5"


def test_kept_totals_cut_at_any_byte_never_keep_the_aggregator_from_starting(tmp_path):
    statistics = Statistics(tmp_path, tmp_path)
    statistics.take(report(1).to_map())
    statistics.close()
    whole = (tmp_path / KEPT_FILE).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / KEPT_FILE).write_bytes(whole[:length])
        assert Statistics(tmp_path, tmp_path).merge.nodes == {}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "stats.csv"
    contents = [bytes([65 + index]) * 200_000 for index in range(8)]
    replace_file(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                replace_file(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {path.read_bytes() for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)
    assert len(seen) > 1


def test_a_disk_that_takes_nothing_stops_no_counting_and_is_tried_again(tmp_path):
    blocked = tmp_path / "out"
    blocked.write_text("a file where the directory should be")
    statistics = Statistics(blocked, tmp_path / "state")
    statistics.take(report(1).to_map())
    statistics.service()
    blocked.unlink()
    statistics.close()
    assert read(blocked / JOBS_FILE)[0]["message_out_count"] == "5"


def test_what_is_not_a_report_is_refused_and_changes_nothing(tmp_path):
    statistics = Statistics(tmp_path, tmp_path)
    with pytest.raises(WireError):
        statistics.take({"node": "../x"})
    assert statistics.merge.nodes == {}


def test_the_intake_and_the_stores_tell_through_this_aggregators_own_report(tmp_path):
    statistics = Statistics(tmp_path, tmp_path / "state")
    nodes = {"pi-1": {"in_bytes": 1 << 20, "last_active_ns": 1}}
    extras: dict[str, dict[str, object]] = {
        "DAQJobStoreCSV": {"streams": {"a": [5, 3, 0, False]}},
        "Intake": {"nodes": nodes, "streams": {"a": ["pi-1", "hv", 6, 4, 0, 0, False, ["csv"]]}},
    }
    jobs = [
        JobReport(name, name, "RUNNING", current=Snapshot(name, name, name, 1, 0, extra=extra))
        for name, extra in extras.items()
    ]
    statistics.take_own(NodeReport("hub", "0.1.0", "boot", SECOND, SECOND, jobs, life="s1"))
    statistics.service()
    row = {row["supervisor"]: row for row in read(tmp_path / NODES_FILE)}["pi-1"]
    assert (row["message_in_count"], row["stored_count"], row["waiting_count"]) == ("4", "3", "1")
    assert (row["message_in_megabytes"], row["is_alive"]) == ("1.0", "true")


def test_a_node_that_calls_itself_like_the_aggregator_does_not_replace_its_account(tmp_path):
    statistics = Statistics(tmp_path, tmp_path / "state")
    statistics.take_own(report(1, node="hub", count=5))
    with pytest.raises(WireError, match="own supervisor_id"):
        statistics.take(report(1, node="hub", life="other", count=9).to_map())
    assert [row["message_out_count"] for row in statistics.status()["jobs"]] == [5]


def test_files_are_written_once_a_second_not_at_every_call(tmp_path):
    statistics = Statistics(tmp_path, tmp_path / "state")
    due_ns = statistics.service()
    (tmp_path / JOBS_FILE).unlink()
    assert statistics.service() == due_ns
    assert not (tmp_path / JOBS_FILE).exists()


def test_the_files_that_remain_say_that_nobody_is_alive_and_how_the_aggregators_own_jobs_ended(tmp_path):
    statistics = Statistics(tmp_path, tmp_path / "state")
    statistics.take(report(1).to_map())
    own = report(1, node="hub")
    statistics.take_own(own)
    own.jobs[0].state, own.t_mono_ns = "STOPPED", own.t_mono_ns + 1
    statistics.take_own(own)
    statistics.close()
    jobs = {row["supervisor"]: row for row in read(tmp_path / JOBS_FILE)}
    assert [(jobs[node]["is_alive"], jobs[node]["state"]) for node in ("hub", "pi-1")] == [
        ("false", "STOPPED"),
        ("false", ""),
    ]
    nodes = {row["supervisor"]: row for row in read(tmp_path / NODES_FILE)}
    assert {node: row["is_alive"] for node, row in nodes.items()} == dict.fromkeys(nodes, "false")
    assert nodes["pi-1"]["message_out_count"] == "5"
    assert nodes["pi-1"]["last_active"]
