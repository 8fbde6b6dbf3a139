from __future__ import annotations

import io

from edgedaq.stats import JobReport, Snapshot
from edgedaq.tables import WIDTH, LiveTable, format_status, summary_line, table
from hypothesis import given, settings
from hypothesis import strategies as st


def job(unique_id: str = "hv", group: str = "device", **facts: object) -> dict[str, object]:
    report = JobReport(unique_id, "T", "RUNNING", current=Snapshot(unique_id, "T", "a", 7, 0, out_count=12))
    total = report.total()
    assert total is not None
    return {
        "unique_id": unique_id,
        "job_type": "T",
        "group": group,
        "state": "RUNNING",
        "state_for_s": 3.0,
        "reason": "",
        "pid": 7,
        "restart_count": 0,
        "last_restart_ns": 0,
        "total": total.to_map(),
        "rates": {"out_count_per_s": 4.0},
        **facts,
    }


def status(*jobs: dict[str, object], **facts: object) -> dict[str, object]:
    return {
        "role": "agent",
        "node": "pi-1",
        "version": "0.1.0",
        "pid": 5,
        "uptime_s": 61.0,
        "jobs": list(jobs),
        **facts,
    }


def node_row(node: str, **facts: object) -> dict[str, object]:
    return {"supervisor": node, "is_alive": True, "message_in_count": 9, "stored_count": 8, **facts}


def test_numbers_stand_right_and_texts_left():
    text = table(["name", "count"], [["a", 5], ["long name", 12345], ["c", None]])
    assert text.split("\n") == [
        "name       count",
        "a              5",
        "long name  12345",
        "c              -",
    ]


def test_unknown_is_a_dash_and_zero_is_zero():
    assert table(["a", "b"], [[None, 0]]).split("\n")[1].split() == ["-", "0"]


def test_a_status_names_every_job_with_state_pid_and_counts():
    text = format_status(status(job("hv"), job("tpc", state="BACKOFF", pid=None, reason="killed by SIGKILL")))
    assert "pi-1" in text
    assert "tpc: killed by SIGKILL" in text
    line = next(line for line in text.split("\n") if line.startswith("hv"))
    assert {"RUNNING", "7", "12", "4.00"} <= set(line.split())


def test_an_aggregators_status_has_a_line_for_each_node_and_all():
    rows = [node_row("pi-1"), node_row("pi-2", is_alive=False), node_row("ALL", message_in_count=18)]
    held = status(job("csv", "store"), role="aggregator", statistics={"nodes": rows})
    lines = format_status(held).split("\n")
    assert [line.split()[:2] for line in lines if line.startswith(("pi-2", "ALL"))] == [
        ["pi-2", "no"],
        ["ALL", "yes"],
    ]
    assert "18 arrived" in summary_line(held)


def test_what_an_intake_refused_is_told_in_words():
    security = {"told": ["refused 3 times: unknown key, last 2026-11-20T12:00:00.000Z (address 10.0.0.3)"]}
    intake = job("intake", "intake", total={"extra": {"security": security}})
    assert "intake: refused 3 times: unknown key" in format_status(status(intake))
    assert format_status(status(job("intake", "intake", total={"extra": {"security": {"told": 3}}})))


def test_a_summary_is_one_line_that_counts_what_runs():
    line = summary_line(status(job("hv"), job("tpc", state="FAILED")))
    assert line.startswith("pi-1: 1 of 2 jobs run, 8.00 rows/s put")
    assert "\n" not in line


values = st.none() | st.integers(0, 10**15) | st.floats() | st.text(max_size=30) | st.booleans()


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(["unique_id", "state", "pid", "group", "reason", "restart_count"]), values
    ),
    st.dictionaries(
        st.sampled_from(["in_count", "out_count", "cpu_percent"]), st.none() | st.integers(0, 10**18)
    ),
)
def test_no_status_breaks_the_table_or_makes_it_wider_than_a_terminal(facts, total):
    rows = [node_row("n" * 63, waiting_count=10**15, message_in_mb_per_s=1234.5)]
    text = format_status(status({**job("x" * 63), **facts, "total": total}, statistics={"nodes": rows}))
    assert max(map(len, text.split("\n"))) <= WIDTH


def test_nothing_that_a_job_says_can_steer_the_terminal():
    text = format_status(status(job("hv", reason="bad \x1b[2J\x07 thing\nsecond line")))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_live_table_redraws_in_place_in_a_terminal():
    stream = io.StringIO()
    live = LiveTable(stream, is_terminal=True)
    live.show("a\nb", "line")
    live.show("c", "line")
    first, second = stream.getvalue().split("\x1b[H")[1:]
    assert first.startswith("a\x1b[K\nb\x1b[K\n")
    assert second.startswith("c\x1b[K\n")
    assert second.endswith("\x1b[J")
    assert stream.getvalue().count("\x1b[2J") == 1


def test_where_nobody_looks_a_live_table_is_one_line_per_second():
    stream = io.StringIO()
    live = LiveTable(stream)
    for _ in range(5):
        live.show("a\nb", "line")
    assert stream.getvalue() == "line\n"


def test_a_live_table_never_scrolls_a_small_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    stream = io.StringIO()
    LiveTable(stream, is_terminal=True).show("\n".join("x" * 50 for _ in range(30)), "")
    shown = stream.getvalue()
    assert shown.count("\n") <= 4
    assert "x" * 20 not in shown


def test_a_store_or_an_uplink_that_cannot_says_why():
    store = Snapshot("csv", "S", "a", 7, 0, extra={"state": "retrying", "error": "No space left on device"})
    uplink = Snapshot(
        "uplink", "U", "b", 8, 0, extra={"link": "down", "reason": "refused", "spool_problem": ""}
    )
    text = format_status(
        status(
            job("csv", "store", total=store.to_map()),
            job("uplink", "uplink", total=uplink.to_map()),
        )
    )
    assert "csv: No space left on device" in text.split("\n")
    assert "uplink: refused" in text.split("\n")


def test_a_status_of_nodes_alone_has_no_line_about_a_process():
    text = format_status({"statistics": {"nodes": [node_row("pi-1")]}})
    assert text.split("\n")[0].startswith("node ")
