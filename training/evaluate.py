"""Measures the tales model on held-out tales and prints a table.

`python -m training.evaluate --model baton/models/tales` loads the directory with `transformers`,
answers greedily with a KV cache, and counts exact answers and answers that contain the asked-for
words. Invariants: tales come from a seed space that training does not use, and every question is
about a pairing that no training tale contains.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from training.corpus import Message, Tale, Turn, as_messages, write_tale, write_turns
from training.tokenizer import END, PAD, render

_ANSWER_TOKENS = 32
_ASK_TOKENS = 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Held-out conversations of one shape."""

    name: str
    """Heading in the table."""
    prompt_tokens: int
    """Length of the first prompt: tale, question and special tokens."""
    tales: int
    """Number of tales."""
    questions: int
    """Questions per tale."""
    conversation: bool
    """Whether the questions of a tale follow each other in one conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Figures of a suite, or of one relation in it."""

    questions: int
    """Questions asked."""
    prompt_tokens: float
    """Mean length of the prompts."""
    right: float
    """Share of answers that contain the asked-for words."""
    exact: float
    """Share of answers equal to the right one."""


SUITES = (
    Suite(name="200", prompt_tokens=200, tales=300, questions=2, conversation=False),
    Suite(name="1500", prompt_tokens=1500, tales=100, questions=4, conversation=False),
    Suite(name="chat-200", prompt_tokens=200, tales=100, questions=4, conversation=True),
    Suite(name="chat-1500", prompt_tokens=1500, tales=30, questions=8, conversation=True),
)


class Reader:
    """The model and its tokenizer, answering batches of conversations."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, batch_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self._model.eval()  # type: ignore[no-untyped-call]
        self._pad = self._tokenizer.token_to_id(PAD)
        self._end = self._tokenizer.token_to_id(END)
        self._batch_tokens = batch_tokens

    def count(self, text: str) -> int:
        """Length of the text in tokens."""
        return len(self._tokenizer.encode(text).ids)

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The model's next message in each conversation; nothing is mutated."""
        prompts = [
            self._tokenizer.encode(render(messages, add_generation_prompt=True)).ids
            for messages in conversations
        ]
        answers: list[str] = []
        step = max(1, self._batch_tokens // max(map(len, prompts)))
        for start in range(0, len(prompts), step):
            answers += self._generate(prompts[start : start + step])
        return answers

    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        """Greedy continuations up to the end of the turn."""
        # ids, mask: [B, T], padded on the left
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(  # type: ignore[misc]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            )
        return [self._tokenizer.decode(row[width:].tolist()) for row in out]


def held_out(suite: Suite, seed: int, reader: Reader) -> list[tuple[Tale, list[Turn]]]:
    """Tales with as many questions as the suite wants; tales with too few facts are passed over."""
    found: list[tuple[Tale, list[Turn]]] = []
    number = 0
    while len(found) < suite.tales:
        rng = random.Random(f"held-out/{seed}/{suite.name}/{number}")
        number += 1
        size = suite.prompt_tokens - _ASK_TOKENS
        tale = write_tale(rng, split="held-out", max_tokens=size, count=reader.count)
        turns = write_turns(rng, tale, split="held-out", limit=suite.questions)
        if len(turns) == suite.questions:
            found.append((tale, turns))
    return found


def run(suite: Suite, seed: int, reader: Reader) -> tuple[Result, dict[str, Result], list[str]]:
    """The suite's figures, the same by relation, and its wrong answers."""
    asked: list[tuple[Turn, str, int]] = []
    tales = held_out(suite, seed, reader)
    given: list[list[Turn]] = [[] for _ in tales]
    for number in range(suite.questions):
        conversations = []
        for (tale, turns), before in zip(tales, given, strict=True):
            history = before if suite.conversation else []
            conversations.append(as_messages(tale, [*history, turns[number]])[:-1])
        for messages, (_, turns), before, text in zip(
            conversations, tales, given, reader.answer(conversations), strict=True
        ):
            turn = turns[number]
            size = reader.count(render(messages, add_generation_prompt=True))
            asked.append((turn, text, size))
            # The conversation goes on with what the model said, right or wrong.
            said = Turn(question=turn.question, answer=text, key=turn.key, relation=turn.relation)
            before.append(said)
    groups: dict[str, list[tuple[Turn, str, int]]] = defaultdict(list)
    for item in asked:
        groups[item[0].relation].append(item)
    wrong = [
        f"{turn.question} | right: {turn.answer} | said: {text}"
        for turn, text, _ in asked
        if text != turn.answer
    ]
    return summary(asked), {name: summary(items) for name, items in sorted(groups.items())}, wrong


def summary(asked: Sequence[tuple[Turn, str, int]]) -> Result:
    """Shares of right and exact answers."""
    return Result(
        questions=len(asked),
        prompt_tokens=round(sum(size for _, _, size in asked) / len(asked), 1),
        right=sum(turn.key in text for turn, text, _ in asked) / len(asked),
        exact=sum(turn.answer == text for turn, text, _ in asked) / len(asked),
    )


def main() -> None:
    """Read the command line, run every suite and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="to compute in")
    parser.add_argument("--share", type=float, default=1.0, help="share of the tales to use")
    parser.add_argument("--suite", choices=[suite.name for suite in SUITES], action="append")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to print per suite")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reader = Reader(args.model, dtype=_DTYPES[args.dtype], batch_tokens=16_384)
    figures: dict[str, dict[str, object]] = {}
    print(f"{'suite':<12}{'questions':>10}{'tokens':>9}{'right':>9}{'exact':>9}")
    for suite in SUITES:
        if args.suite and suite.name not in args.suite:
            continue
        fields = asdict(suite) | {"tales": max(1, round(suite.tales * args.share))}
        total, by_relation, wrong = run(Suite(**fields), args.seed, reader)
        figures[suite.name] = asdict(total)
        for name, result in {suite.name: total, **by_relation}.items():
            label = name if name == suite.name else f"  {name}"
            print(
                f"{label:<12}{result.questions:>10}{result.prompt_tokens:>9.0f}"
                f"{result.right:>9.1%}{result.exact:>9.1%}",
                flush=True,
            )
        for line in wrong[: args.wrong]:
            print(f"    {line}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
