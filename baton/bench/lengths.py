"""How long prompts and answers are, in tokens. Pure; the caller's generator is the only chance."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Self

import numpy as np

from baton.errors import FieldViolation, InvalidRequestError

MAX_TOKENS = 10_000_000


class Shape(Enum):
    """Of a distribution, with what its two numbers are."""

    FIXED = "fixed"
    """The length, twice."""
    UNIFORM = "uniform"
    """Shortest and longest."""
    NORMAL = "normal"
    """Mean and standard deviation."""
    LOGNORMAL = "lognormal"
    """Mean and standard deviation of the lengths themselves, not of their logarithms."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths; what it draws is a whole number of at least 1."""

    shape: Shape
    first: float
    second: float

    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """From N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SD. Raises `InvalidRequestError` naming the option."""
        name, _, rest = text.strip().partition(":")
        try:
            if not rest:
                shape, first, second = Shape.FIXED, float(int(name)), float(int(name))
            else:
                shape = Shape(name.lower())
                first, second = (float(part) for part in rest.split(":"))
        except ValueError:
            raise _invalid(
                option,
                f"{text!r} is neither a number of tokens nor uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SD",
            ) from None
        if not (1 <= first <= MAX_TOKENS and 0 <= second <= MAX_TOKENS):
            raise _invalid(option, f"{text!r} is out of range")
        if shape in (Shape.FIXED, Shape.UNIFORM) and second < first:
            raise _invalid(option, f"{text!r} ends before it begins")
        return cls(shape, first, second)

    def draw(self, rng: np.random.Generator) -> int:
        """The next length."""
        match self.shape:
            case Shape.FIXED:
                return int(self.first)
            case Shape.UNIFORM:
                return int(rng.integers(math.ceil(self.first), math.floor(self.second) + 1))
            case Shape.NORMAL:
                drawn = rng.normal(self.first, self.second)
            case Shape.LOGNORMAL:
                variance = math.log1p((self.second / self.first) ** 2)
                drawn = rng.lognormal(math.log(self.first) - variance / 2, math.sqrt(variance))
        return int(min(max(1, round(drawn)), MAX_TOKENS))

    def __str__(self) -> str:
        if self.shape is Shape.FIXED:
            return f"{self.first:g}"
        return f"{self.shape.value}:{self.first:g}:{self.second:g}"


def _invalid(option: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(option, description))
