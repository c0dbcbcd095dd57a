"""The questions of `baton demo`: short tales whose answer stands nowhere but in the prompt, so that a lost, stale or misplaced KV block
shows as a wrong answer.
"""

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TypedDict

from baton.client import ChatMessage, SamplingOptions
from baton.errors import ModelLoadError

MAX_TOKENS = 48


class _Question(TypedDict):
    question: str
    answer: str
    key: str


class _Example(TypedDict):
    name: str
    story: str
    questions: list[_Question]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request of the demo."""

    number: int
    story: str
    question: str
    key: str
    """What a right answer says."""
    sampling: SamplingOptions

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation to send."""
        return (ChatMessage("user", f"{self.story}\n\n{self.question}"),)

    def is_right(self, answer: str) -> bool:
        """Whether the answer names the fact."""
        return self.key in answer


def load_questions(path: Path, count: int, *, temperature: float, seed: int) -> list[Question]:
    """The first `count` questions, taking one of each tale in turn. Raises `ModelLoadError` where the file is unusable."""
    try:
        examples: list[_Example] = json.loads(path.read_text(encoding="utf-8"))
        rounds = max(len(example["questions"]) for example in examples)
        asked = [
            (example["story"], example["questions"][turn])
            for turn in range(rounds)
            for example in examples
            if turn < len(example["questions"])
        ]
        return [
            Question(
                number=number,
                story=story,
                question=question["question"],
                key=question["key"],
                sampling=SamplingOptions(
                    max_tokens=MAX_TOKENS, temperature=temperature, seed=seed + number
                ),
            )
            for number, (story, question) in enumerate(islice(cycle(asked), count), start=1)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(str(path), f"no questions to ask: {error!r}") from error
