"""Keeps what people write in a conversation from being taken for the model's control tokens.

A chat template writes control tokens as text, `<|assistant|>`, which the tokenizer finds again. A message that contains such a string
would thereby speak in another role. So, where one does:

    quote    a mark is put before each control string of a message, and the template is rendered
    encode   control strings without a mark become aliases, which a second tokenizer knows as single tokens; the marks go; the second
             tokenizer takes no control string for a token; the aliases' ids are replaced by those of the tokens they stand for

Marks and aliases are random characters of Unicode's private planes, which nobody can write by guessing. Immutable, safe in any thread.
"""

import re
import secrets

import tokenizers

from baton.errors import FieldViolation, InvalidRequestError

_PRIVATE = range(0xE000, 0xF8FF)
_ALIASES_FROM = 0xF0000
_NONCE_CHARACTERS = 10
"""About 126 bits."""


class ControlTokens:
    """Of one tokenizer; see the module docstring."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        special = {
            token.content: (number, token) for number, token in added.items() if token.special
        }
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = "|".join(map(re.escape, longest_first))
        self._ids = frozenset(number for number, _ in special.values())
        nonce = _nonce()
        self._aliases = {
            content: f"{nonce}{chr(_ALIASES_FROM + index)}" for index, content in enumerate(special)
        }
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        self._backend.add_tokens(
            [
                tokenizers.AddedToken(
                    self._aliases[content],
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for content, (_, token) in special.items()
            ]
        )
        self._meant = {
            self._backend.token_to_id(self._aliases[content]): number
            for content, (number, _) in special.items()
        }

    def occur_in(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in it."""
        return bool(self._pattern) and re.search(self._pattern, text) is not None

    def new_mark(self) -> str:
        """For one conversation: an error of its template may quote the mark to whoever sent it."""
        return _nonce()

    def quote(self, text: str, mark: str) -> str:
        """The text, with a mark before each control string."""
        return re.sub(self._pattern, lambda found: mark + found[0], text)

    def encode(self, rendered: str, mark: str) -> list[int]:
        """The tokens of a rendered conversation whose messages were quoted. Raises `InvalidRequestError` where the tokenizer has no way to
        write a control string as text.
        """
        text = re.sub(
            f"(?:{mark})?(?:{self._pattern})",
            lambda found: (
                found[0].removeprefix(mark)
                if found[0].startswith(mark)
                else self._aliases[found[0]]
            ),
            rendered,
        ).replace(mark, "")
        written = self._backend.encode(text, add_special_tokens=False).ids
        if not self._ids.isdisjoint(written):
            problem = "a message contains a control token of the model"
            raise InvalidRequestError(FieldViolation("prompt.chat", problem))
        return [self._meant.get(number, number) for number in written]


def _nonce() -> str:
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(_NONCE_CHARACTERS))
