"""The rings behind percentiles and rates: exact counts, percentiles right to 5 %, and a bound on what they hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.status.traffic import SLOTS, Buckets, Meter, Traffic, bucket_of, percentile

LATENCIES = st.lists(st.floats(1e-5, 600), min_size=1, max_size=200)


@given(LATENCIES, st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_right_to_5_percent(latencies: list[float], share: float) -> None:
    """Promise: of the latency at that rank, whatever the latencies are."""
    buckets = Buckets(bucket_of(seconds) for seconds in latencies)
    ranked = sorted(latencies)[math.ceil(share * len(latencies)) - 1]
    assert percentile(buckets, share) == pytest.approx(ranked, rel=0.05)


def test_what_took_no_time_is_counted_too() -> None:
    assert percentile(Buckets([bucket_of(0.0)]), 0.5) == pytest.approx(1e-6, rel=0.05)
    assert percentile(Buckets(), 0.5) is None


def test_a_slot_holds_its_second_and_the_present_one_is_not_told() -> None:
    traffic = Traffic()
    meter = Meter([traffic])
    meter.first_tokens(1, 100.9, ttft_s=0.25)
    meter.tokens(3, 101.1, gap_s=0.02)
    meter.handoff(4096, 101.2)
    meter.ended(17, 101.9, failed=True)
    assert traffic.status(101.95).completion_tokens.series_per_s[-1] == 1
    status = traffic.status(102.0)
    assert status.completion_tokens.series_per_s[-2:] == (1, 3)
    assert status.handoff_bytes.series_per_s[-2:] == (0, 4096)
    assert (status.requests.per_s, status.failures.per_s) == (0.2, 0.2)
    assert status.prompt_tokens.mean_per_s == round(17 / (SLOTS - 1), 3)
    assert (status.ttft.count, status.itl.count) == (1, 1)
    assert status.ttft.p50_series_s[-2] == pytest.approx(0.25, rel=0.05)
    assert status.ttft.p50_series_s[-1] is None


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60))
def test_the_window_holds_what_came_in_its_seconds_and_nothing_else(seconds: list[int]) -> None:
    """However long nothing came in between: a slot of an earlier round is never taken for one of this."""
    traffic = Traffic()
    for second in sorted(seconds):
        Meter([traffic]).tokens(1, second + 0.5, gap_s=0.01)
    now = max(seconds) + 1
    inside = [second for second in seconds if now - SLOTS < second < now]
    status = traffic.status(float(now))
    assert sum(status.completion_tokens.series_per_s) == len(inside) == status.itl.count
    assert len(status.completion_tokens.series_per_s) == SLOTS - 1 == status.window_s
