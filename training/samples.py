"""Writes `examples.json`: held-out tales with questions, ready to be shown in the demo.

`python -m training.samples --model baton/models/tales` needs the tokenizer only. The tales come
from a seed space of their own, so they are part of neither training nor the evaluation.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from training.corpus import as_messages, write_tale, write_turns
from training.tokenizer import render

_QUESTIONS = 4
_SHAPES = (("short", 200), ("short", 160), ("short", 240), ("long", 1500)) * 3


def make_examples(tokenizer: Tokenizer, seed: int) -> list[dict[str, object]]:
    """One example per shape: the tale, its length and questions with their right answers."""
    examples: list[dict[str, object]] = []
    number = 0

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    while len(examples) < len(_SHAPES):
        kind, size = _SHAPES[len(examples)]
        rng = random.Random(f"examples/{seed}/{number}")
        number += 1
        tale = write_tale(rng, split="held-out", max_tokens=size - 20, count=count)
        turns = write_turns(rng, tale, split="held-out", limit=_QUESTIONS)
        if len(turns) < _QUESTIONS:
            continue
        first = as_messages(tale, turns[:1])[:-1]
        examples.append(
            {
                "name": f"{kind}-{len(examples) + 1}",
                "prompt_tokens": count(render(first, add_generation_prompt=True)),
                "story": tale.text,
                "questions": [
                    {"question": turn.question, "answer": turn.answer, "key": turn.key}
                    for turn in turns
                ],
            }
        )
    return examples


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    examples = make_examples(tokenizer, args.seed)
    (args.model / "examples.json").write_text(json.dumps(examples, indent=2) + "\n")


if __name__ == "__main__":
    main()
