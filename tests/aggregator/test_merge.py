from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from edgedaq.errors import WireError
from edgedaq.stats import JobReport, NodeReport, QuantileSketch, Snapshot, fold
from edgedaq_aggregator.merge import SILENT_S, Merge
from edgedaq_aggregator.stats_columns import JOB_COLUMNS, NODE_COLUMNS
from edgedaq_aggregator.stream_counts import STREAMS_MAX, Arrived, Stored, StreamCounts, arrived_of, stored_of
from hypothesis import given, settings
from hypothesis import strategies as st

SECOND = 1_000_000_000
UTC = 1_780_000_000 * SECOND
SEED_JOB_COLUMNS = (
    "supervisor,daq_job,is_alive,last_message_in_date,message_in_count,last_message_out_date,message_out_count,"
    "message_in_queue_size,message_out_queue_size,last_restart_date,restart_count"
)
SEED_NODE_COLUMNS = (
    "supervisor,is_alive,last_active,message_in_count,message_in_megabytes,message_out_count,"
    "message_out_megabytes"
)


def snapshot(life: str, job: str = "hv", **facts: object) -> Snapshot:
    return Snapshot(job, "DAQJobTest", life, 1, 0, **facts)  # type: ignore[arg-type]


def report(second: int, *jobs: JobReport, node: str = "pi-1", life: str = "s1") -> NodeReport:
    return NodeReport(node, "0.1.0", "boot", UTC + second * SECOND, second * SECOND, list(jobs), life=life)


def running(current: Snapshot | None, folded: Snapshot | None = None, **facts: object) -> JobReport:
    job = current or folded
    name = job.job if job is not None else "hv"
    state = facts.pop("state", "RUNNING")
    return JobReport(name, "DAQJobTest", state, folded=folded, current=current, **facts)  # type: ignore[arg-type]


def update(merge: Merge, held: NodeReport, second: int | None = None) -> bool:
    at = second if second is not None else held.t_mono_ns // SECOND
    return merge.update(held, at * SECOND, UTC + at * SECOND)


def job_row(merge: Merge, second: int, unique_id: str = "hv") -> dict[str, object]:
    return next(row for row in merge.job_rows(second * SECOND) if row["unique_id"] == unique_id)


def node_row(merge: Merge, second: int, node: str = "pi-1") -> dict[str, object]:
    return next(row for row in merge.node_rows(second * SECOND) if row["supervisor"] == node)


def test_the_first_columns_are_the_seeds_in_its_order():
    assert ",".join(JOB_COLUMNS).startswith(SEED_JOB_COLUMNS + ",unique_id,state,")
    assert ",".join(NODE_COLUMNS).startswith(SEED_NODE_COLUMNS + ",message_in_mb_per_s,")
    assert JOB_COLUMNS[-2:] == ("cpu_percent", "rss_megabytes")
    assert NODE_COLUMNS[-3:] == ("clock_offset_ms", "clock_error_ms", "version")


def test_a_repeated_or_older_report_changes_nothing():
    merge = Merge()
    first = report(1, running(snapshot("a", out_count=10)))
    second = report(2, running(snapshot("a", out_count=15)))
    for held in (first, second, second, first, second):
        update(merge, held, 2)
    assert job_row(merge, 2)["message_out_count"] == 15


def test_ended_lives_of_a_job_and_of_its_supervisor_are_counted_once():
    merge = Merge()
    update(merge, report(1, running(snapshot("a", out_count=10))))
    folded = fold(None, snapshot("a", out_count=12))
    update(merge, report(2, running(snapshot("b", out_count=3), folded, restart_count=1)))
    assert job_row(merge, 2)["message_out_count"] == 15
    old = report(3, running(snapshot("b", out_count=4), folded, restart_count=1))
    update(merge, old)
    update(merge, report(1, running(snapshot("c", out_count=1)), life="s2"), 4)
    update(merge, old, 5)
    update(merge, report(2, running(snapshot("c", out_count=2), restart_count=2), life="s2"), 6)
    row = job_row(merge, 6)
    assert row["message_out_count"] == 12 + 4 + 2
    assert row["restart_count"] == 3


class Model:
    """What really happened on a node whose supervisor and job end at random moments."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.told = 0
        self.second = 0
        self.supervisor = self.job = 0
        self.folded: Snapshot | None = None
        self.current = snapshot("0")

    def step(self) -> NodeReport:
        self.second += 1
        match self.random.randrange(6):
            case 0:
                self.folded = fold(self.folded, self.current)
                self.new_job()
            case 1:
                self.supervisor += 1
                self.folded = None
                self.new_job()
            case _:
                count = self.random.randrange(100)
                self.told += count
                self.current.out_count += count
                self.current.out_bytes += 8 * count
        current = Snapshot(**{name: getattr(self.current, name) for name in Snapshot.__struct_fields__})
        return report(self.second, running(current, self.folded), life=f"s{self.supervisor}")

    def new_job(self) -> None:
        self.job += 1
        self.current = snapshot(str(self.job))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_totals_are_right_whatever_ends_is_repeated_or_overtaken_and_over_restarts_of_the_aggregator(
    seed, steps
):
    model, merge = Model(seed), Merge()
    sent: list[NodeReport] = []
    for _ in range(steps):
        newest = model.step()
        sent.append(newest)
        update(merge, newest)
        if model.random.random() < 0.5:
            update(merge, model.random.choice(sent[-8:]), model.second)
        if model.random.random() < 0.2:
            merge = Merge.from_map(json.loads(json.dumps(merge.to_map())))
        assert sum(row["message_out_count"] for row in merge.job_rows(0)) == model.told
    assert node_row(merge, model.second)["message_out_count"] == model.told


def test_totals_are_wrong_when_ended_lives_are_forgotten_so_the_test_above_can_fail():
    model, merge = Model(3), Merge()
    for _ in range(30):
        update(merge, model.step())
        merge.nodes["pi-1"].jobs["hv"].base = None
    assert node_row(merge, model.second)["message_out_count"] != model.told


def test_a_silent_node_keeps_its_rows_with_is_alive_false_and_without_gauges():
    merge = Merge()
    update(
        merge, report(1, running(snapshot("a", out_count=7, cpu_percent=5.0, rss_bytes=1 << 20, in_queue=3)))
    )
    assert job_row(merge, 2)["is_alive"] is True
    assert job_row(merge, 2)["rss_megabytes"] == 1.0
    late = 1 + int(SILENT_S) + 1
    row = job_row(merge, late)
    assert (row["is_alive"], row["state"], row["message_out_count"]) == (False, None, 7)
    assert (row["cpu_percent"], row["rss_megabytes"], row["message_in_queue_size"]) == (None, None, None)
    row = node_row(merge, late)
    assert (row["is_alive"], row["message_out_count"], row["jobs_total"]) == (False, 7, 1)
    assert (row["cpu_percent"], row["message_out_mb_per_s"], row["jobs_running"]) == (None, None, None)
    assert str(row["last_active"]).startswith("2026-05-28T")


def test_a_node_known_only_from_before_a_restart_is_not_alive():
    merge = Merge()
    update(merge, report(1, running(snapshot("a", out_count=7))))
    again = Merge.from_map(merge.to_map())
    assert node_row(again, 1)["is_alive"] is False
    assert node_row(again, 1)["message_out_count"] == 7


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        ("RUNNING", True),
        ("BLOCKED", True),
        ("STOPPING", True),
        ("STARTING", False),
        ("BACKOFF", False),
        ("FAILED", False),
        ("STOPPED", False),
    ],
)
def test_a_job_is_alive_while_it_has_started_and_not_ended(state, alive):
    merge = Merge()
    update(merge, report(1, running(snapshot("a"), state=state)))
    assert job_row(merge, 1)["is_alive"] is alive
    assert job_row(merge, 1)["state"] == state


def test_jobs_of_one_type_have_a_row_each_and_a_job_that_is_no_longer_there_keeps_its_row():
    merge = Merge()
    update(
        merge, report(1, running(snapshot("a", "x", out_count=1)), running(snapshot("b", "y", out_count=2)))
    )
    update(merge, report(2, running(snapshot("a", "x", out_count=5))))
    assert [row["unique_id"] for row in merge.job_rows(0)] == ["x", "y"]
    gone = job_row(merge, 2, "y")
    assert (gone["is_alive"], gone["state"], gone["message_out_count"]) == (False, None, 2)
    assert node_row(merge, 2)["jobs_total"] == 1
    assert node_row(merge, 2)["message_out_count"] == 7


def test_what_is_unknown_is_empty_never_zero():
    merge = Merge()
    update(merge, report(1, JobReport("hv", "DAQJobTest", "STARTING")))
    row = job_row(merge, 1)
    assert all(
        row[column] is None for column in JOB_COLUMNS if column.startswith(("message", "latency", "cpu"))
    )
    row = node_row(merge, 1)
    unknown = [column for column in NODE_COLUMNS if row[column] is None]
    assert {
        "message_in_count",
        "message_out_count",
        "stored_count",
        "latency_p50_ms",
        "spool_megabytes",
        "clock_offset_ms",
        "waiting_count",
        "duplicate_count",
    } <= set(unknown)
    assert node_row(merge, 1, "ALL")["message_in_count"] is None


def test_what_the_intake_counts_is_summed_over_its_lives():
    merge = Merge()
    for life, mib in (("i1", 10), ("i1", 30), ("i2", 5), ("i2", 6)):
        told = {"in_bytes": mib << 20, "duplicate_count": 1, "gap_count": 0}
        merge.update_intake(life, {"pi-1": told}, {}, SECOND)
    row = node_row(merge, 1)
    assert (row["message_in_megabytes"], row["duplicate_count"], row["gap_count"]) == (36.0, 2, 0)


def streams(**rows: int) -> dict[str, Arrived]:
    return {stream: Arrived("pi-1", count, 0, ("csv", "raw")) for stream, count in rows.items()}


def test_rows_that_arrived_and_were_stored_are_counted_once_over_all_restarts():
    merge = Merge()
    merge.update_store("csv", "csv", {"a": Stored(1, 0)})
    for told, csv_rows in (({"a": 5}, 1), ({"a": 9, "b": 2}, 4), ({"a": 9, "b": 2}, 9), ({"b": 7}, 9)):
        merge.update_intake("i", {}, streams(**told), SECOND)
        merge.update_store("csv", "csv", {"a": Stored(csv_rows, 0)})
        merge.update_store("raw", "raw", {"b": Stored(1, 0)})
        merge = Merge.from_map(json.loads(json.dumps(merge.to_map())))
    row = node_row(merge, 1)
    assert (row["message_in_count"], row["stored_count"], row["waiting_count"]) == (9 + 7, 9 + 1, None)


def test_what_waits_is_what_the_stores_of_a_stream_lack_and_known_losses_do_not_wait():
    merge = Merge()
    merge.update_intake("i", {}, streams(a=10) | {"b": Arrived("pi-1", 4, 3, ("csv",))}, SECOND)
    assert node_row(merge, 1)["waiting_count"] == 10 + 10 + 4 + 3
    merge.update_store("csv", "csv", {"a": Stored(6, 0), "b": Stored(2, 5)})
    merge.update_store("raw", "raw", {"a": Stored(10, 0)})
    merge.update_intake("i", {}, streams(a=10), SECOND)
    assert node_row(merge, 1)["waiting_count"] == 4
    assert node_row(merge, 1, "ALL")["waiting_count"] == 4
    assert node_row(merge, 8)["waiting_count"] is None


def test_the_queue_of_a_store_is_what_waits_for_it_alone():
    merge = Merge()
    store = Snapshot("my_csv", "DAQJobStoreCSV", "c", 1, 0)
    update(merge, report(1, JobReport("my_csv", "DAQJobStoreCSV", "RUNNING", current=store), node="hub"))
    assert job_row(merge, 1, "my_csv")["message_in_queue_size"] is None
    merge.update_intake("i", {}, streams(a=10), SECOND)
    merge.update_store("my_csv", "csv", {"a": Stored(6, 0)})
    merge.update_store("my_raw", "raw", {})
    assert job_row(merge, 1, "my_csv")["message_in_queue_size"] == 4


def test_a_clock_that_was_put_back_makes_no_node_look_dead():
    merge = Merge()
    merge.update_intake("i", {"pi-1": {"last_active_ns": UTC + 9 * SECOND}}, {}, SECOND)
    merge.update_intake("i", {"pi-1": {"last_active_ns": UTC}}, {}, 20 * SECOND)
    assert node_row(merge, 20)["is_alive"] is True
    merge.update_intake("i", {"pi-1": {"last_active_ns": UTC}}, {}, 40 * SECOND)
    assert node_row(merge, 40)["is_alive"] is False


def test_reports_about_streams_are_taken_as_far_as_they_are_as_agreed():
    good = ["pi-1", "hv", 3, 10, 1, 0, False, ["csv"]]
    told = {"a": good, "b": good[:5], "c": ["pi-1", "hv", 3, "x", 1, 0, False, []], "d": None}
    assert arrived_of(told) == {"a": Arrived("pi-1", 10, 1, ("csv",))}
    assert stored_of({"a": [4, 10, 1, True], "b": [4], "c": 3}) == {"a": Stored(10, 1)}
    assert not arrived_of(None)
    assert not stored_of([])


def test_accounts_of_streams_are_bounded_and_the_newest_are_kept():
    counts = StreamCounts()
    for stream in range(STREAMS_MAX + 100):
        counts.update(str(stream), "pi-1", 1)
        counts.update("0", "pi-1", stream + 1)
    assert len(counts.seen) == STREAMS_MAX
    assert counts.totals == {"pi-1": 2 * (STREAMS_MAX + 100) - 1}


def test_rates_are_over_the_last_ten_seconds():
    merge = Merge()
    for second in range(30):
        out_bytes = 100 * (1 << 20) if second < 15 else (100 + second) << 20
        update(merge, report(second, running(snapshot("a", out_bytes=out_bytes))))
        merge.update_intake("i1", {"pi-1": {"in_bytes": second << 21}}, {}, second * SECOND)
    row = node_row(merge, 29)
    assert row["message_out_mb_per_s"] == pytest.approx(1.0)
    assert row["message_in_mb_per_s"] == pytest.approx(2.0)


def test_latency_is_of_the_node_of_the_job_and_for_all_of_everything_together():
    merge = Merge()
    sketches = {"pi-1": QuantileSketch(), "pi-2": QuantileSketch()}
    sketches["pi-1"].add(0.001, 90)
    sketches["pi-2"].add(0.1, 10)
    for node, sketch in sketches.items():
        update(merge, report(1, running(snapshot("a")), node=node))
        told = {
            "latency": sketch.to_list(),
            "latency_by_job": {"hv": sketch.to_list()},
            "clock_offset_ms": -3.0,
        }
        merge.update_intake("i1", {node: told}, {}, SECOND)
    assert node_row(merge, 1)["latency_p99_ms"] == pytest.approx(1.0, rel=0.02)
    assert job_row(merge, 1)["latency_p50_ms"] == pytest.approx(1.0, rel=0.02)
    assert node_row(merge, 1)["clock_offset_ms"] == -3.0
    whole = node_row(merge, 1, "ALL")
    assert whole["latency_p50_ms"] == pytest.approx(1.0, rel=0.02)
    assert whole["latency_p95_ms"] == pytest.approx(100.0, rel=0.02)
    assert node_row(merge, 8)["latency_p50_ms"] is None


def test_the_last_row_sums_what_is_known():
    merge = Merge()
    for node, count in (("pi-2", 5), ("pi-1", 7)):
        update(merge, report(1, running(snapshot("a", out_count=count)), node=node))
    merge.update_intake("i1", {"pi-1": {}}, streams(a=4), SECOND)
    rows = merge.node_rows(SECOND)
    assert [row["supervisor"] for row in rows] == ["pi-1", "pi-2", "ALL"]
    assert (rows[-1]["message_out_count"], rows[-1]["message_in_count"]) == (12, 4)
    assert (rows[-1]["is_alive"], rows[-1]["jobs_total"], rows[-1]["version"]) == (True, 2, "0.1.0")
    assert all(set(row) == set(NODE_COLUMNS) for row in rows)


@pytest.mark.parametrize(
    "kept", [None, [], {"version": 2, "nodes": []}, {"version": 1, "nodes": [{"node": 1}]}]
)
def test_kept_totals_that_are_not_what_was_kept_are_refused(kept):
    with pytest.raises(WireError):
        Merge.from_map(kept)


def test_the_page_on_statistics_defines_every_column_in_order():
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
    jobs, nodes = text.split("## stats_remote.csv")
    assert tuple(re.findall(r"^\| `(\w+)` \|", jobs, re.MULTILINE)) == JOB_COLUMNS
    assert tuple(re.findall(r"^\| `(\w+)` \|", nodes, re.MULTILINE)) == NODE_COLUMNS
