from __future__ import annotations

import pytest
from edgedaq_aggregator.lag import JournalFill, StoreLag, Told, Trend, full_in_s, level_of

GIB = 1 << 30


def test_a_trend_says_nothing_before_it_has_seen_some_seconds():
    trend = Trend()
    assert trend.per_s is None
    trend.add(0.0, 0)
    trend.add(10.0, 1e9)
    assert trend.per_s is None
    trend.add(25.0, 0)
    assert trend.per_s is not None


@pytest.mark.parametrize("rate", [0.0, 1000.0, -250.0, 1e8])
def test_a_trend_finds_a_steady_rate_whatever_came_before_its_window(rate):
    trend = Trend()
    for second in range(1000):
        trend.add(float(second), 1e6 * second if second < 600 else rate * second)
    assert trend.per_s == pytest.approx(rate)


def test_many_samples_in_a_second_cost_no_more_than_one():
    trend = Trend()
    for step in range(100_000):
        trend.add(step / 1000, step)
    assert trend.per_s == pytest.approx(1000)
    assert len(trend._samples) <= 121


@pytest.mark.parametrize(
    ("used", "limit", "rate", "expected"),
    [
        (0, 100, 10.0, 10.0),
        (90, 100, 1.0, 10.0),
        (100, 100, None, 0.0),
        (120, 100, -5.0, 0.0),
        (0, 100, 0.0, None),
        (0, 100, -1.0, None),
        (0, 100, None, None),
    ],
)
def test_what_is_filled_at_a_rate_is_full_when_the_rest_is_through(used, limit, rate, expected):
    assert full_in_s(used, limit, rate) == expected


def test_a_level_is_reached_at_its_limit_and_left_only_well_behind_it():
    assert [level_of(left, 0) for left in (None, 1e6, 86_399, 3601, 3599, 0)] == [0, 0, 1, 1, 2, 2]
    assert [level_of(left, 2) for left in (3599, 7199, 7201, 172_799, 172_801, None)] == [2, 2, 1, 1, 0, 0]
    assert [level_of(left, 1) for left in (7199, 172_799, 172_801)] == [1, 1, 0]


def test_a_filling_journal_is_told_once_a_day_and_once_an_hour_before():
    fill = JournalFill()
    told: list[tuple[int, Told]] = []
    rate = 100_000
    limit = 100 * 3600 * rate
    for minute in range(100 * 60):
        found = fill.note(minute * 60.0, minute * 60 * rate, limit, "csv")
        if found is not None:
            told.append((minute, found))
    assert [event.event for _, event in told] == ["journal.filling"] * 2
    assert [minute for minute, _ in told] == pytest.approx([76 * 60 + 1, 99 * 60 + 1], abs=1)
    assert told[0][1].facts["store"] == "csv"
    assert fill.full_in_s == pytest.approx(60, abs=1)


def test_a_journal_that_is_emptied_again_is_told_the_next_time_it_fills():
    fill = JournalFill()
    events = []
    for second in range(0, 4000, 10):
        phase = second % 2000
        used = phase * GIB // 100 if phase < 1000 else (2000 - phase) * GIB // 100
        events.append(fill.note(float(second), used, 20 * GIB, "raw"))
    assert sum(event is not None for event in events) >= 2


def test_a_store_that_is_behind_tells_how_it_comes_on_and_when_it_is_through():
    lag = StoreLag()
    events = []
    for second in range(400):
        left = max(300 - second, 0)
        events.append(lag.note(float(second), left * 1000, float(left)))
    told = [event for event in events if event is not None]
    assert [event.event for event in told] == ["store.behind"] * 5 + ["store.caught_up"]
    assert told[1].facts["through_in_s"] == pytest.approx(240, abs=2)
    assert not told[-1].is_warning


def test_a_store_that_only_falls_back_is_never_said_to_be_through():
    lag = StoreLag()
    events = [lag.note(float(second), second * 1000, float(second)) for second in range(200)]
    told = [event for event in events if event is not None]
    assert told and all(event.facts["through_in_s"] is None for event in told)
    assert lag.through_in_s is None
