"""What the load generator computes from what it saw."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.figures import (
    Distribution,
    Objective,
    Slo,
    e2e_s,
    figures_of,
    is_good,
    itl_s,
    parse_slos,
    ttft_s,
)
from baton.bench.records import OK, UNFINISHED, Record
from baton.errors import InvalidRequestError
from tests.unit.bench_records import record, records

STRICT = (Slo(Objective.TTFT, 0.1), Slo(Objective.TPOT, 0.02))


def test_the_formulas_are_the_ones_that_are_documented() -> None:
    one = record(due_s=5, late_s=0.5, ttft_s=0.3, gaps_s=(0.1, 0.2, 0.3))
    assert ttft_s(one) == pytest.approx(0.3)
    assert e2e_s(one) == pytest.approx(0.9)
    assert itl_s(one) == pytest.approx(0.6 / 3)
    figures = figures_of([one])
    assert figures.icl_s is not None
    assert figures.icl_s.count == 3
    assert figures.icl_s.mean == pytest.approx(0.2)
    assert figures.ttft_since_due_s is not None
    assert figures.ttft_since_due_s.mean == pytest.approx(0.8)
    assert figures.e2e_since_due_s is not None
    assert figures.e2e_since_due_s.mean == pytest.approx(1.4)
    assert figures.late_s is not None
    assert figures.late_s.max == pytest.approx(0.5)


def test_tokens_are_the_servers_count_where_it_has_one() -> None:
    """A part of an answer may hold several tokens, or none that has a text yet."""
    assert itl_s(record(gaps_s=(0.1, 0.1), tokens=11)) == pytest.approx(0.02)
    assert itl_s(record(gaps_s=(0.1, 0.1), tokens=1)) is None
    assert itl_s(record(gaps_s=())) is None


def test_throughput_is_what_was_answered_from_the_first_send_to_the_last_part() -> None:
    """What failed or was cut off counts neither as work nor as time."""
    figures = figures_of(
        [
            record(due_s=10, ttft_s=0.1, gaps_s=[0.1]),
            record(due_s=11, ttft_s=0.5, gaps_s=[0.5]),
            record(due_s=1, status="UNAVAILABLE"),
            record(due_s=90, status=UNFINISHED),
        ]
    )
    assert (figures.answered, figures.failed, figures.unfinished) == (2, 1, 1)
    assert figures.errors == {"UNAVAILABLE": 1}
    assert figures.duration_s == pytest.approx(2.0)
    assert figures.requests_per_s == pytest.approx(1.0)
    assert figures.input_tokens_per_s == pytest.approx(8.0)
    assert figures.output_tokens_per_s == pytest.approx(2.0)


def test_goodput_counts_requests_that_meet_all_objectives_and_failures_as_bad() -> None:
    given_ = [
        record(ttft_s=0.1, gaps_s=[0.02]),
        record(ttft_s=0.11, gaps_s=[0.01]),
        record(ttft_s=0.05, gaps_s=[0.03]),
        record(late_s=0.05, ttft_s=0.06, gaps_s=[0.01]),
        record(ttft_s=0.01, gaps_s=[0.01], status="ABORTED"),
        record(ttft_s=0.01, gaps_s=[0.01], status=UNFINISHED),
    ]
    slos = (Slo(Objective.TTFT, 0.1000001), Slo(Objective.TPOT, 0.0200001))
    goodput = figures_of(given_, slos).goodput
    assert goodput is not None
    assert goodput.requests == 2
    assert goodput.requests_since_due == 1
    assert goodput.share == pytest.approx(2 / 5)
    assert figures_of(given_).goodput is None


def test_an_objective_without_a_value_is_not_met() -> None:
    """As with AIPerf: an answer of one token has no time per output token."""
    assert not is_good(record(gaps_s=()), [Slo(Objective.TPOT, 1)])
    assert is_good(record(gaps_s=()), [Slo(Objective.E2E, 1), Slo(Objective.TTFT, 1)])


def test_nothing_gives_no_figures() -> None:
    figures = figures_of([], STRICT)
    assert figures.ttft_s is figures.e2e_s is figures.itl_s is None
    assert figures.requests_per_s == 0
    assert figures.goodput is not None
    assert figures.goodput.share == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_lie_where_a_sorted_list_says(values: list[float]) -> None:
    """Linear interpolation between the two nearest, as AIPerf and numpy do it."""
    found = Distribution.of(values)
    assert found is not None
    ordered = sorted(values)
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.95, found.p95), (0.99, found.p99)):
        place = share * (len(ordered) - 1)
        low, part = ordered[int(place)], place - int(place)
        high = ordered[min(int(place) + 1, len(ordered) - 1)]
        assert value == pytest.approx(low + part * (high - low), abs=1e-6)
    assert (found.count, found.min, found.max) == (len(values), ordered[0], ordered[-1])
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)


@given(st.lists(records, max_size=12), st.lists(st.sampled_from(STRICT), max_size=2))
def test_whatever_happened_every_request_is_told_once(
    given_: list[Record], slos: list[Slo]
) -> None:
    figures = figures_of(given_, slos)
    assert figures.answered + figures.failed + figures.unfinished == len(given_)
    assert sum(figures.errors.values()) == figures.failed
    answered = [r for r in given_ if r.status == OK]
    assert figures.output_tokens == sum(r.output_tokens for r in answered)
    if figures.e2e_s is not None and figures.ttft_s is not None:
        assert figures.ttft_s.max <= figures.e2e_s.max <= figures.duration_s + 1e-6
        assert figures.e2e_since_due_s is not None
        assert figures.e2e_since_due_s.mean >= figures.e2e_s.mean - 1e-9
    if figures.goodput is not None:
        assert 0 <= figures.goodput.requests_since_due <= figures.goodput.requests
        assert figures.goodput.requests <= figures.answered


@given(st.lists(records, max_size=12), st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_looser_objective_is_met_by_no_fewer(
    given_: list[Record], limit_s: float, more_s: float
) -> None:
    for objective in Objective:
        strict, loose = (
            sum(is_good(r, [Slo(objective, limit)]) for r in given_)
            for limit in (limit_s, limit_s + more_s)
        )
        assert strict <= loose


def test_objectives_are_written_as_other_load_generators_have_them() -> None:
    slos = parse_slos(["ttft:200", "tpot:50,e2e:1500 ITL:7.5"], "--goodput")
    assert [str(slo) for slo in slos] == ["ttft:200", "tpot:50", "e2e:1500", "itl:7.5"]
    assert slos[0].limit_s == 0.2
    assert parse_slos([], "--goodput") == ()


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "tbt:3", ":3"]
)
def test_other_objectives_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^--goodput: "):
        parse_slos([text], "--goodput")
