"""When requests are sent, open-loop: whatever the server does. Pure; the caller's generator is the only chance."""

from collections.abc import Iterator
from enum import Enum

import numpy as np


class ArrivalPattern(Enum):
    """How the gaps between requests are distributed, around the same mean."""

    POISSON = "poisson"
    """Exponential: independent users."""
    GAMMA = "gamma"
    """With a burstiness: below 1 requests come in bursts, 1 is Poisson, above 1 they are spread evenly."""
    FIXED = "fixed"
    """All equal."""


def arrival_times(
    pattern: ArrivalPattern, rate_per_s: float, rng: np.random.Generator, *, burstiness: float = 1.0
) -> Iterator[float]:
    """Seconds since the beginning, without end; the first is 0. Gamma gaps have the shape `burstiness` and the mean 1 / rate, hence a
    coefficient of variation of burstiness ** -0.5. Precondition: both numbers are positive.
    """
    if pattern is ArrivalPattern.FIXED:
        index = 0
        while True:
            yield index / rate_per_s
            index += 1
    shape = 1.0 if pattern is ArrivalPattern.POISSON else burstiness
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.gamma(shape, 1.0 / (rate_per_s * shape))
