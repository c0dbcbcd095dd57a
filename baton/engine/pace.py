"""How often those who read streams of tokens are woken: what comes within a rest is read together.

One pace is for many streams, whose rests end together, so that what they say can travel together. Used on the event loop.
"""

import asyncio
import math


class Pace:
    """See the module docstring."""

    def __init__(self) -> None:
        self.rest_s = 0.0
        """How long tokens may wait for more; 0 wakes for each step's. Holds from the next rest on."""
        self._resting: set[asyncio.Event] = set()
        self._rest: asyncio.TimerHandle | None = None
        """Runs while somebody rests."""
        self._woken_s = -math.inf

    def wake(self, reader: asyncio.Event) -> None:
        """Sets the event: at once, or when the rest is over."""
        if not self.rest_s:
            reader.set()
            return
        self._resting.add(reader)
        if self._rest is None:
            # Where nobody has been woken for long, in the next turn: whoever is to be woken in this one comes along.
            self._rest = asyncio.get_running_loop().call_at(
                self._woken_s + self.rest_s, self._rested
            )

    def _rested(self) -> None:
        self._rest = None
        self._woken_s = asyncio.get_running_loop().time()
        resting, self._resting = self._resting, set()
        for reader in resting:
            reader.set()
