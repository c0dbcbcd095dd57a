"""How fast an engine computes, from the length of its steps. Pure; owned by the engine, on its thread."""

MEMORY = 0.95
"""What a step's measurement keeps of its weight with each later one: about twenty steps count."""


class SpeedMeter:
    """Averages in which recent steps weigh most."""

    def __init__(self) -> None:
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0
        self.decode_step_s = 0.0
        """Mean length of the steps that generate tokens; 0 before the first."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens in a second of the steps that compute any, whatever else they compute; 0 before the first."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s > 0 else 0.0

    def record(self, *, prefill_tokens: int, generating: int, seconds: float) -> None:
        """A step computed so many tokens of prompts, and one token each for so many requests."""
        if prefill_tokens:
            # Sums, not rates: a step weighs by what it computed, and a prompt's short end does not look like a slow engine.
            self._prefill_tokens = MEMORY * self._prefill_tokens + prefill_tokens
            self._prefill_s = MEMORY * self._prefill_s + seconds
        if generating:
            before_s = self.decode_step_s or seconds
            self.decode_step_s = MEMORY * before_s + (1 - MEMORY) * seconds
