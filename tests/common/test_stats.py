from __future__ import annotations

import math

import pytest
from edgedaq.errors import WireError
from edgedaq.stats import (
    JOBS_MAX,
    RELATIVE_ERROR,
    JobReport,
    NodeReport,
    QuantileSketch,
    Snapshot,
    WindowedRate,
    WindowedSketch,
    fold,
    snapshot_from_map,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SECOND = 1_000_000_000
values_lists = st.lists(st.floats(min_value=1e-8, max_value=1e8), min_size=1, max_size=60)


def snapshot(life: str, **counts: object) -> Snapshot:
    return Snapshot("hv", "DAQJobTest", life, 1, 0, **counts)  # type: ignore[arg-type]


def sketch_of(values: list[float]) -> QuantileSketch:
    sketch = QuantileSketch()
    for value in values:
        sketch.add(value)
    return sketch


@settings(max_examples=80, deadline=None)
@given(values_lists, st.sampled_from([0.0, 0.01, 0.5, 0.95, 0.99, 1.0]))
def test_every_quantile_is_right_to_the_promised_error(values, q):
    true = sorted(values)[max(math.ceil(q * len(values)), 1) - 1]
    found = sketch_of(values).quantile(q)
    assert found is not None
    assert abs(found - true) <= RELATIVE_ERROR * true * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(values_lists, values_lists)
def test_merging_sketches_is_the_same_as_adding_everything_to_one(a, b):
    merged = sketch_of(a)
    merged.merge(sketch_of(b))
    assert merged.buckets == sketch_of(a + b).buckets
    assert merged.count == len(a) + len(b)


def test_a_sketch_stays_small_whatever_is_added():
    sketch = QuantileSketch()
    for exponent in range(-400, 400):
        for mantissa in (1.0, 1.7, 3.1, 6.3):
            sketch.add(mantissa * 10.0 ** min(exponent, 300))
    sketch.add(-5.0)
    sketch.add(math.inf)
    assert len(sketch.buckets) <= 1100
    assert QuantileSketch.from_list(sketch.to_list()).buckets == sketch.buckets
    assert sketch.quantile(0.0) == 0.0
    assert sketch.quantile(1.0) == pytest.approx(1e9, rel=0.05)


def test_an_empty_sketch_knows_no_quantile():
    assert QuantileSketch().quantile(0.5) is None


@pytest.mark.parametrize(
    "bad",
    [None, {}, [1], [1, 0], [1, -1], ["1", 1], [10**6, 1], [1, 1.0], [True, 1], [1, 1] * 5000],
)
def test_a_sketch_from_elsewhere_is_refused_unless_it_is_one(bad):
    with pytest.raises(WireError):
        QuantileSketch.from_list(bad)


def test_a_windowed_sketch_forgets_what_is_older_than_the_window_and_nothing_younger():
    window = WindowedSketch(60.0, 12)
    for second in range(120):
        window.add(1.0 if second < 50 else 100.0, 1, second * SECOND)
    held = window.sketch(120 * SECOND)
    assert 60 <= held.count <= 66
    assert held.quantile(0.01) == pytest.approx(100.0, rel=0.02)
    assert window.sketch(200 * SECOND).count == 0


def test_a_rate_is_the_growth_over_the_window():
    rate = WindowedRate(10.0)
    assert rate.per_s() is None
    for second in range(30):
        rate.add(second * 100 if second < 15 else 1500 + (second - 15) * 7, second * SECOND)
    assert rate.per_s() == pytest.approx(7.0)


def test_a_count_that_went_back_starts_the_rate_anew_instead_of_making_it_negative():
    rate = WindowedRate()
    rate.add(1000, 0)
    rate.add(10, SECOND)
    assert rate.per_s() is None
    rate.add(30, 2 * SECOND)
    assert rate.per_s() == pytest.approx(20.0)


def test_folding_adds_counters_keeps_the_latest_date_and_drops_gauges():
    first = snapshot("a", out_count=5, out_bytes=50, last_out_ns=9, dropped_count=1, put_blocked_s=0.5)
    second = snapshot("b", out_count=7, last_out_ns=4, cpu_percent=3.0, rss_bytes=10, streams={"1": 7})
    total = fold(fold(None, first), second)
    assert (total.out_count, total.out_bytes, total.last_out_ns, total.dropped_count) == (12, 50, 9, 1)
    assert total.put_blocked_s == 0.5
    assert (total.cpu_percent, total.rss_bytes, total.streams, total.life) == (None, None, {}, "b")


def test_folding_a_life_twice_counts_it_once():
    last = snapshot("a", out_count=5)
    once = fold(None, last)
    assert fold(once, last).out_count == 5


def test_a_job_report_totals_ended_lives_and_the_current_one_with_its_gauges():
    report = JobReport(
        "hv",
        "T",
        "RUNNING",
        folded=snapshot("a", out_count=5),
        current=snapshot("b", out_count=2, rss_bytes=9),
    )
    total = report.total()
    assert total is not None
    assert (total.out_count, total.rss_bytes) == (7, 9)
    assert JobReport("hv", "T", "STARTING").total() is None


def test_a_job_report_whose_current_life_was_just_folded_counts_it_once():
    life = snapshot("a", out_count=5)
    total = JobReport("hv", "T", "BACKOFF", folded=fold(None, life), current=life).total()
    assert total is not None
    assert total.out_count == 5


def test_reports_survive_the_way_through_plain_maps():
    report = NodeReport(
        "pi-1",
        "0.1",
        "boot",
        1,
        2,
        [JobReport("hv", "T", "RUNNING", current=snapshot("a"))],
        {"x": [1]},
        "ab",
    )
    assert NodeReport.from_map(report.to_map()) == report
    assert snapshot_from_map(snapshot("a").to_map()) == snapshot("a")


@pytest.mark.parametrize(
    "change",
    [
        {"node": "../etc"},
        {"node": "ALL"},
        {"t_utc_ns": "now"},
        {"jobs": [{"job": "a/b", "job_type": "T", "state": "RUNNING"}]},
        {"jobs": [{"job": "hv", "job_type": "T", "state": "RUNNING", "restart_count": -1}]},
        {"jobs": [{"job": f"j{n}", "job_type": "T", "state": "RUNNING"} for n in range(JOBS_MAX + 1)]},
    ],
)
def test_a_report_from_elsewhere_is_refused_unless_it_is_one(change):
    good = NodeReport("pi-1", "0.1", "boot", 1, 2).to_map()
    with pytest.raises(WireError):
        NodeReport.from_map({**good, **change})


def test_a_snapshot_from_elsewhere_is_refused_unless_it_is_one():
    with pytest.raises(WireError):
        snapshot_from_map({**snapshot("a").to_map(), "out_count": -1})
