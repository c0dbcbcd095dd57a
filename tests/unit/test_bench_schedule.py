"""When the load generator's requests are due, and how long they are."""

from contextlib import suppress
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.arrivals import ArrivalPattern, arrival_times
from baton.bench.lengths import Lengths
from baton.errors import InvalidRequestError

rates = st.floats(0.01, 1e4)
seeds = st.integers(0, 2**32 - 1)


def times(pattern: ArrivalPattern, rate: float, seed: int, burstiness: float = 1.0) -> list[float]:
    rng = np.random.default_rng(seed)
    return list(islice(arrival_times(pattern, rate, rng, burstiness=burstiness), 200))


@given(st.sampled_from(ArrivalPattern), rates, seeds, st.floats(0.05, 50))
def test_arrivals_begin_at_zero_never_go_back_and_repeat_with_the_seed(
    pattern: ArrivalPattern, rate: float, seed: int, burstiness: float
) -> None:
    due = times(pattern, rate, seed, burstiness)
    assert due[0] == 0
    assert all(before <= after for before, after in pairwise(due))
    assert due == times(pattern, rate, seed, burstiness)


@given(rates)
def test_a_fixed_rate_has_equal_gaps_and_does_not_drift(rate: float) -> None:
    due = times(ArrivalPattern.FIXED, rate, 0)
    assert due[199] == 199 / rate


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(
    burstiness: float,
) -> None:
    rng = np.random.default_rng(5)
    due = list(islice(arrival_times(ArrivalPattern.GAMMA, 20, rng, burstiness=burstiness), 50_000))
    gaps = np.diff(due)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_poisson_is_gamma_of_burstiness_one() -> None:
    assert times(ArrivalPattern.POISSON, 7, 3, 0.1) == times(ArrivalPattern.GAMMA, 7, 3, 1.0)


@given(st.integers(1, 10_000), seeds)
def test_a_number_is_that_length(tokens: int, seed: int) -> None:
    lengths = Lengths.parse(str(tokens), "--isl")
    assert lengths.draw(np.random.default_rng(seed)) == tokens
    assert str(lengths) == str(tokens)


@given(st.integers(1, 500), st.integers(0, 500), seeds)
def test_uniform_lengths_stay_between_their_bounds(low: int, more: int, seed: int) -> None:
    lengths = Lengths.parse(f"uniform:{low}:{low + more}", "--isl")
    rng = np.random.default_rng(seed)
    assert all(low <= lengths.draw(rng) <= low + more for _ in range(50))


@pytest.mark.parametrize(("shape", "spread"), [("normal", 40), ("lognormal", 300)])
def test_the_two_numbers_are_mean_and_deviation_of_the_lengths(shape: str, spread: int) -> None:
    lengths = Lengths.parse(f"{shape}:400:{spread}", "--isl")
    rng = np.random.default_rng(1)
    drawn = np.array([lengths.draw(rng) for _ in range(50_000)])
    assert drawn.min() >= 1
    assert drawn.mean() == pytest.approx(400, rel=0.02)
    assert drawn.std() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "0",
        "-3",
        "1.5",
        "uniform:9:3",
        "uniform:9",
        "zipf:3:4",
        "normal:0:4",
        "normal:nan:1",
        "normal:inf:1",
        "1:2",
    ],
)
def test_other_lengths_are_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^--osl: "):
        Lengths.parse(text, "--osl")


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    with suppress(InvalidRequestError):
        assert Lengths.parse(text, "--isl").draw(np.random.default_rng(0)) >= 1
