"""The noise is uniform, reproducible for ever, and different wherever its key is."""

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.noise import uniform

_SEEDS = st.integers(0, 2**64 - 1)
_CHOICES = st.integers(0, 2**32 - 1)


@given(_SEEDS, _CHOICES, _SEEDS)
def test_noise_lies_in_the_unit_interval_on_the_53_bit_grid(
    seed: int, choice: int, position: int
) -> None:
    value = uniform(seed, choice, position)
    assert 0 <= value < 1
    assert (value * 2**53).is_integer()
    assert uniform(seed, choice, position) == value


def test_noise_never_changes_between_releases() -> None:
    """Promise: a seed told to a client repeats its tokens on any later version."""
    assert [uniform(0, 0, 0), uniform(7, 0, 3), uniform(2**64 - 1, 2**32 - 1, 2**64 - 1)] == [
        0.09069365387688266,
        0.08236616354857995,
        0.368172413027927,
    ]


def test_seed_choice_and_position_each_change_the_draw() -> None:
    keys = [(s, c, p) for s in (0, 1, 2**63) for c in range(3) for p in range(200)]
    assert len({uniform(*key) for key in keys}) == len(keys)


def test_draws_along_positions_are_uniform_and_uncorrelated() -> None:
    """Chi-square over 50 bins, and over 8 x 8 cells of consecutive pairs; both bounds are 5 standard deviations wide."""
    draws = [uniform(42, 0, position) for position in range(20_000)]
    for cells, found in (
        (50, [int(x * 50) for x in draws]),
        (64, [int(a * 8) * 8 + int(b * 8) for a, b in zip(draws[::2], draws[1::2], strict=True)]),
    ):
        expected = len(found) / cells
        chi_square = sum((found.count(cell) - expected) ** 2 / expected for cell in range(cells))
        assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5
