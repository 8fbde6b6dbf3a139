"""The window follows the rate of acknowledgements: small on a slow link, out of the way on a fast one."""

from __future__ import annotations

from edgedaq_agent.link_window import WINDOW_MIN_BYTES, LinkWindow

MS = 1_000_000


def carried(rate_bytes_per_s, round_trip_ns, *, seconds=5, credit=16 << 20, bulk_ns=0):
    """Return the bytes in flight at the end, and all that was carried, over a link of that rate.

    Args:
        bulk_ns: Acknowledgements come together, so far apart.
    """
    window = LinkWindow()
    now_ns = sent = acked = arrived = 0
    flying: list[tuple[int, int]] = []
    free_ns = 0
    while now_ns < seconds * 1000 * MS:
        now_ns += MS
        while sent - acked < min(window.limit_bytes(now_ns), credit):
            size = min(1 << 20, max(window.limit_bytes(now_ns) // 4, 4096))
            sent += size
            window.sent(0, sent, now_ns)
            free_ns = max(free_ns, now_ns) + size * 1_000_000_000 // rate_bytes_per_s
            flying.append((free_ns + round_trip_ns, sent))
        is_told = not bulk_ns or now_ns % bulk_ns == 0
        while is_told and flying and flying[0][0] <= now_ns:
            arrived = flying.pop(0)[1]
        if arrived > acked:
            window.acked(0, arrived, arrived - acked, now_ns)
            acked = arrived
    return sent - acked, acked


def test_on_a_slow_link_less_than_two_thirds_of_a_second_is_on_its_way():
    for rate in (125_000, 1_000_000, 5_000_000):
        in_flight, taken = carried(rate, 20 * MS)
        assert in_flight <= max(rate * 0.66, 1.25 * WINDOW_MIN_BYTES)
        assert taken > 0.9 * 5 * rate


def test_a_fast_link_is_used_up_to_the_credit_also_when_it_is_long_or_answers_in_bulk():
    assert carried(400_000_000, 2 * MS)[1] > 0.9 * 5 * 400_000_000
    assert carried(50_000_000, 150 * MS)[1] > 0.7 * 5 * 50_000_000
    assert carried(20_000_000, 2 * MS, seconds=10, bulk_ns=400 * MS)[1] > 0.6 * 10 * 20_000_000
