"""Wall times are UTC, and no value makes their rendering fail."""

from __future__ import annotations

from edgedaq.clock import boot_id, iso_utc, utc_date
from hypothesis import given
from hypothesis import strategies as st


def test_a_time_is_rendered_in_utc_with_milliseconds():
    assert iso_utc(1_777_636_800_123_456_789) == "2026-05-01T12:00:00.123Z"
    assert utc_date(1_777_636_800_123_456_789) == "2026-05-01"


def test_never_is_empty():
    assert iso_utc(0) == ""


@given(st.integers(-(2**63), 2**64))
def test_any_number_is_a_date_that_can_name_a_file(t_utc_ns):
    date = utc_date(t_utc_ns)
    assert len(date) == 10 and "/" not in date
    assert iso_utc(t_utc_ns) == "" or iso_utc(t_utc_ns).endswith("Z")


def test_a_boot_has_one_name():
    assert boot_id() == boot_id() != ""
