"""A worker's use of its checkpoint's tokenizer: prompts that come as text, stop strings, and the files for routers that have none.

Within Baton, text is the router's business; foreign routers may leave some of it to workers. Immutable, but for `StopFinder`, which
belongs to one choice.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from baton.errors import FieldViolation, InvalidRequestError

TOKENIZER_FILE = "tokenizer.json"
_ARCHIVED = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file of what a tokenizer is loaded from."""

    data: bytes
    sha256: str


class WorkerText:
    """See the module docstring."""

    def __init__(self, directory: Path) -> None:
        """Reads the tokenizer. Raises what the library raises."""
        self._directory = directory
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def load(cls, directory: str) -> "WorkerText | None":
        """None where there is no tokenizer."""
        path = Path(directory)
        return cls(path) if directory and (path / TOKENIZER_FILE).is_file() else None

    def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens, with the special tokens that the tokenizer puts around a text. Raises `InvalidRequestError`."""
        try:
            return tuple(self._tokenizer.encode(text).ids)
        except Exception as error:  # the library raises nothing narrower
            problem = f"the model's tokenizer cannot encode it: {error}"
            raise InvalidRequestError(FieldViolation("text", problem)) from error

    def decode(self, token_ids: list[int]) -> str:
        """Special tokens have no text."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def archive(self) -> Archive:
        """Reads the files."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name in _ARCHIVED:
                path = self._directory / name
                if path.is_file():
                    # Not the files' times: equal files, equal digests.
                    file.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
        data = buffer.getvalue()
        return Archive(data, hashlib.sha256(data).hexdigest())


class StopFinder:
    """Tells which stop string an output's newest token completes. Strings that begin before `min_tokens` tokens do not count."""

    def __init__(self, text: WorkerText, stops: tuple[str, ...], min_tokens: int) -> None:
        """`stops` is not empty."""
        self._text = text
        self._stops = sorted(stops, key=len, reverse=True)
        self._skipped_tokens = min_tokens
        # A character of a stop takes four tokens at most; those before them decide how they read.
        self._kept_tokens = 4 * len(self._stops[0]) + 8
        self._tail: list[int] = []

    def push(self, token_id: int) -> str | None:
        """The stop that ends the output with this token; the longest of several."""
        if self._skipped_tokens:
            self._skipped_tokens -= 1
            return None
        self._tail = [*self._tail, token_id][-self._kept_tokens :]
        text = self._text.decode(self._tail)
        return next((stop for stop in self._stops if stop in text), None)
