"""How OpenAI writes tokens: by their text. Pure."""

from typing import Any

from baton.v1 import common_pb2
from router.text import Tokenizer

LEAST = -9999.0
"""JSON has no infinity."""


class Vocabulary:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def entry(self, token: common_pb2.TokenLogprob) -> dict[str, Any]:
        """A token in a chat's log-probabilities. Tokens that are no whole characters have bytes that make some together."""
        data = self._tokenizer.token_bytes(token.token_id)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": self.logprob(token), "bytes": list(data)}

    def name(self, token_id: int) -> str:
        """A token in a plain completion's log-probabilities; no two have one name."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def characters(self, token_id: int) -> int:
        """How many a token begins: of one that is split over tokens, the first counts it."""
        # In UTF-8, every byte but those that continue a character begins one.
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))

    def logprob(self, token: common_pb2.TokenLogprob) -> float:
        """As JSON can say it."""
        return max(token.logprob, LEAST)
