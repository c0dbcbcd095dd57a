"""Whether an engine gets on: how long its steps take by their size, and whether requests that wait will see blocks."""

import time
from collections.abc import Callable

from baton.types import WorkerLoad

FADING = 0.9
"""What is left of the slowest step's weight after each quicker one of its size."""


class StepClock:
    """How long steps take by their size, and so how long the one under way may take. Sizes are powers of two of tokens: a prompt's
    chunk is not measured by a generated token's time.

    Written by the engine's thread, between `begin` and `end`; other threads read the properties.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._slowest_s: dict[int, float] = {}
        """By size; fades towards what steps take lately."""
        self._size = 0
        self._now: tuple[float, float | None] | None = None
        """Since when the step under way runs, and what it should take; None while idle."""

    @property
    def stalled_s(self) -> float:
        """How long the step under way has run; 0 while idle."""
        now = self._now
        return 0.0 if now is None else self._clock_s() - now[0]

    @property
    def expected_s(self) -> float | None:
        """What the step under way should take at most, by those before it; None where nothing tells."""
        now = self._now
        return None if now is None else now[1]

    def begin(self) -> None:
        """Something begins that computes no token, as far as is known."""
        self._size = 0
        self._now = (self._clock_s(), self._expected_s(0))

    def computes(self, num_tokens: int) -> None:
        """The step under way computes so many tokens."""
        assert self._now is not None
        self._size = num_tokens.bit_length()
        self._now = (self._now[0], self._expected_s(self._size))

    def end(self) -> None:
        """The step is done."""
        assert self._now is not None
        took_s = self._clock_s() - self._now[0]
        self._now = None
        known_s = self._slowest_s.get(self._size, 0.0)
        self._slowest_s[self._size] = max(took_s, FADING * known_s)

    def _expected_s(self, size: int) -> float | None:
        """By steps of that size; else in proportion by the next smaller ones, or as long as the next larger ones."""
        computing = [known for known in self._slowest_s if known] if size else [0]
        smaller = max((known for known in computing if known <= size), default=None)
        if smaller is not None and smaller in self._slowest_s:
            return self._slowest_s[smaller] * 2.0 ** (size - smaller)
        larger = min((known for known in computing if known > size), default=None)
        return None if larger is None else self._slowest_s[larger]


class Motion:
    """Whether requests that wait get on. Used on the loop."""

    def __init__(self) -> None:
        self._blocks: tuple[int, ...] = ()
        self._since_s: float | None = None
        """When something moved last, while requests wait."""

    def saw(self, load: WorkerLoad, now_s: float, *, computed: bool) -> None:
        """What a turn of the engine left behind."""
        blocks = (
            load.free_blocks,
            load.cached_blocks,
            load.reserved_blocks,
            load.used_blocks,
            load.in_flight_blocks,
        )
        if not load.waiting_requests:
            self._since_s = None
        elif self._since_s is None or computed or blocks != self._blocks:
            self._since_s = now_s
        self._blocks = blocks

    def stuck_s(self, now_s: float) -> float:
        return 0.0 if self._since_s is None else now_s - self._since_s
