"""Owns the training rows: token ids with a loss weight each.

Rows are conversations, plain tales, and recitals: meaningless phrases of random tokens, told over
and over in changing order. Recitals teach the model to go on with whatever followed the last few
tokens before, which is how it answers; tales alone teach this one relation at a time, slowly.

Invariants: one row holds one tale, so no row contradicts itself; a row depends only on its seed.
Used by `train`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import Tokenizer

from training import scenes
from training.corpus import Message, Turn, as_messages, write_tale, write_turns
from training.novelty import with_made_up_words, with_small_talk
from training.tokenizer import ASSISTANT, END, PAD, render

_PLAIN_SHARE: Final = 0.08
_SYSTEM_SHARE: Final = 0.2
_RECITAL_WEIGHT: Final = 0.5
_FIRST_WORD: Final = 261  # Ids below are special tokens and single bytes.


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of equal length, shifted for next-token prediction."""

    inputs: torch.Tensor
    """Token ids, [B, T]."""
    targets: torch.Tensor
    """Token ids one later, [B, T]."""
    weights: torch.Tensor
    """Weight of each target's loss, [B, T]."""


class RowMaker:
    """Makes batches; holds only the tokenizer and the mix of rows."""

    def __init__(
        self, tokenizer: Tokenizer, *, story_weight: float, recital_share: float, novel_share: float
    ) -> None:
        """Weigh what is not an answer by `story_weight`; the shares are explained in `Stage`."""
        self._tokenizer = tokenizer
        self._story_weight = story_weight
        self._recital_share = recital_share
        self._novel_share = novel_share

    def batch(self, seed: str, *, rows: int, length: int) -> Batch:
        """`rows` rows of `length` targets."""
        made = [
            self._recital(random.Random(f"{seed}/{i}"), length + 1)
            if i < round(rows * self._recital_share)
            else self._row(random.Random(f"{seed}/{i}"), length + 1)
            for i in range(rows)
        ]
        ids = torch.tensor([ids for ids, _ in made])
        weights = torch.tensor([weights for _, weights in made])
        return Batch(inputs=ids[:, :-1], targets=ids[:, 1:], weights=weights[:, 1:])

    def count(self, text: str) -> int:
        """Length of the text in tokens."""
        return len(self._tokenizer.encode(text).ids)

    def _row(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Ids and weights, cut or padded to `length`."""
        plain = rng.random() < _PLAIN_SHARE
        text = self._plain(rng, length) if plain else self._chat(rng, length)
        ids = self._tokenizer.encode(text).ids[:length]
        pad, end, assistant = (self._tokenizer.token_to_id(t) for t in (PAD, END, ASSISTANT))
        assert pad is not None, "the tokenizer is ours and has it"
        weights, in_answer = [], False
        for token in ids:
            weights.append(1.0 if in_answer else self._story_weight)
            in_answer = token == assistant or (in_answer and token != end)
        missing = length - len(ids)
        return ids + [pad] * missing, weights + [0.0] * missing

    def _recital(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Ids and weights of phrases, first told without weight, then again and again."""
        known = rng.sample(
            range(_FIRST_WORD, self._tokenizer.get_vocab_size()), rng.randint(12, 60)
        )
        phrases = [
            rng.choices(known, k=rng.randint(3, 9))
            for _ in range(rng.randint(max(3, length // 40), max(4, length // 12)))
        ]
        ids: list[int] = []
        weights: list[float] = []
        weight = 0.0
        while len(ids) < length:
            for phrase in phrases:
                ids += phrase
                # Which phrase comes next is chance, hence the first token is not to be learnt.
                weights += [0.0] + [weight] * (len(phrase) - 1)
            rng.shuffle(phrases)
            weight = _RECITAL_WEIGHT
        return ids[:length], weights[:length]

    def _plain(self, rng: random.Random, length: int) -> str:
        """A tale and nothing else."""
        tale = write_tale(rng, split="train", max_tokens=length - 1, count=self.count)
        return tale.text + END

    def _chat(self, rng: random.Random, length: int) -> str:
        """A tale followed by questions until the row is full."""
        system = rng.choice(scenes.GREETINGS) if rng.random() < _SYSTEM_SHARE else None
        share = rng.uniform(0.3, 0.85)
        tale = write_tale(rng, split="train", max_tokens=int(share * length), count=self.count)
        turns: list[Turn] = []
        missing = (1.0 - share) * length
        while missing > 0:
            # Asking again, in other words, is better use of a row than padding.
            for turn in write_turns(rng, tale, split="train", limit=len(tale.facts)):
                turns.append(turn)
                missing -= self.count(turn.question + turn.answer) + 4
                if missing <= 0:
                    break
            if not tale.facts:
                break
        if rng.random() < self._novel_share:
            tale, turns = with_made_up_words(rng, tale, turns, share=rng.uniform(0.2, 1.0))
        messages: list[Message] = as_messages(tale, turns, system=system)
        if rng.random() < self._novel_share:
            messages = with_small_talk(rng, messages)
        return render(messages)
