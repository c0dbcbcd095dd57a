"""How long to wait before starting a dead process again. Pure."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Doubles the pause with each death, and forgets them after a life that was long enough."""

    first_s: float = 0.5
    most_s: float = 30.0
    healthy_s: float = 60.0
    """A life this long counts as healthy."""
    _deaths: int = 0

    def after(self, lived_s: float) -> float:
        """The pause before the next start, given how long the dead one lived."""
        if lived_s >= self.healthy_s:
            self._deaths = 0
        pause_s: float = min(self.most_s, self.first_s * 2**self._deaths)
        self._deaths += 1
        return pause_s
