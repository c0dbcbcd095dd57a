"""What the router knows of the model it serves: its tokenizer from the checkpoint, everything else from the workers.

Used on the router's event loop. What the last worker told stays true after it left, so that requests are still validated.
"""

from baton.service.settings import RouterSettings
from baton.types import Role, WorkerInfo
from router.text import Tokenizer
from router.validation import ModelFacts


class ServedModel:
    """One model, under one name: the settings' or, where they leave it open, the first worker's."""

    def __init__(self, settings: RouterSettings, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._name = settings.model_name
        self._latest: WorkerInfo | None = None

    @property
    def name(self) -> str:
        """Empty while nobody has named it."""
        return self._name

    @property
    def facts(self) -> ModelFacts | None:
        """None before the first worker joined."""
        info = self._latest
        if info is None:
            return None
        return ModelFacts(
            model=self._name,
            vocab_size=info.vocab_size,
            max_context_tokens=info.max_context_tokens,
            eos_token_ids=info.eos_token_ids,
        )

    @property
    def latest(self) -> WorkerInfo | None:
        """The worker whose description counts."""
        return self._latest

    def check(self, info: WorkerInfo) -> str | None:
        """Why a worker cannot serve this model, or None."""
        if self._name and info.model != self._name:
            return f"this router serves {self._name!r}, not {info.model!r}"
        return None

    def learn(self, info: WorkerInfo) -> None:
        """A worker joined. Decode workers know best how long a sequence may be."""
        self._name = self._name or info.model
        if self._latest is None or info.role is Role.DECODE:
            self._latest = info
