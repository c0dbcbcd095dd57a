"""Which fault comes next: decisions only, from what lasts and what has been; `tests.faults.soak_faults` carries them out.

once        each kind once, in random order
covering    for as long as the soak goes on; each time one of those that met what lasts least often, so that every pair comes to be
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations

ALONE_SHARE = 0.05
"""Of the faults, while covering, that no other one may meet."""


class Target(Enum):
    """Whom a fault takes away."""

    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"
    STORE = "session store"
    CLIENT = "client"
    """Nobody: requests end, or are read slowly."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault."""

    name: str
    target: Target


Pair = tuple[str, str]
"""In alphabetical order."""


def pair_of(one: str, two: str) -> Pair:
    return (one, two) if one <= two else (two, one)


def may_strand(lasting: Sequence[Kind]) -> bool:
    """Whether these may leave nobody of a kind. What follows waits for their end: no patience outlasts outages that follow one another."""
    targets = {kind.target for kind in lasting}
    return len(lasting) > 1 and len(targets) == 1 and Target.CLIENT not in targets


class Plan:
    """See the module docstring."""

    def __init__(self, kinds: Sequence[Kind], rng: random.Random, *, once: bool) -> None:
        self._kinds = tuple(kinds)
        self._rng = rng
        self._left = rng.sample(self._kinds, len(self._kinds)) if once else None
        self._times: Counter[str] = Counter()
        self._pairs: Counter[Pair] = Counter()

    @property
    def is_done(self) -> bool:
        """Never while covering."""
        return self._left is not None and not self._left

    def draw_alone(self) -> bool:
        """Whether the next one is to meet nobody."""
        return self._left is None and self._rng.random() < ALONE_SHARE

    def draw(self, lasting: Kind | None) -> Kind:
        """The next one, beside the one that lasts. Precondition: not done."""
        if self._left is not None:
            return self._left.pop()
        had = {kind: self._had(kind, lasting) for kind in self._kinds}
        least = min(had.values())
        kind = self._rng.choice([kind for kind, times in had.items() if times == least])
        self._times[kind.name] += 1
        if lasting is not None:
            self._pairs[pair_of(kind.name, lasting.name)] += 1
        return kind

    def _had(self, kind: Kind, lasting: Kind | None) -> tuple[int, int]:
        met = 0 if lasting is None else self._pairs[pair_of(kind.name, lasting.name)]
        return met, self._times[kind.name]


@dataclass(frozen=True, slots=True)
class Lasted:
    """A fault that was, on the monotonic clock."""

    name: str
    began_s: float
    ended_s: float

    def meets(self, began_s: float, ended_s: float) -> bool:
        return self.began_s < ended_s and began_s < self.ended_s


def pairs_among(faults: Iterable[Lasted]) -> Counter[Pair]:
    """How often faults of two kinds lasted at one time."""
    return Counter(
        pair_of(one.name, two.name)
        for one, two in combinations(faults, 2)
        if one.meets(two.began_s, two.ended_s)
    )
