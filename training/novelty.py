"""Owns what keeps the model from relying on its word lists: made-up words and small talk.

Pure functions of their arguments and a random generator; used by `documents`.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Final

from training import words
from training.corpus import Message, Tale, Turn

_REPLACEABLE: Final = frozenset(
    words.WOMEN + words.MEN + words.TOWNS + words.PET_NAMES + words.OBJECTS + words.GOODS
)
_ONSETS: Final = "b c d f g h j k l m n p r s t v w z br ch cl dr fr gr pl sh sl st th tr"
_VOWELS: Final = "a e i o u ai ea ee oo ou"
_CODAS: Final = "n r s l m t x ck nd rt st th"
_WORD: Final = re.compile(r"[A-Za-z]+")

SMALL_TALK: Final = (
    ("Hello!", "Hello! Tell me a story and ask me about it."),
    ("Hi", "Hello! Tell me a story and ask me about it."),
    ("Hello, how are you?", "I am well, thank you. Tell me a story and ask me about it."),
    ("Good morning!", "Good morning! Tell me a story and ask me about it."),
    (
        "Who are you?",
        "I am Tales, a small model that reads stories and answers questions about them.",
    ),
    ("What can you do?", "I read stories and answer questions about them."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Very good.", "Thank you. Ask me more if you like."),
    ("Goodbye!", "Goodbye!"),
)


def made_up_word(rng: random.Random, *, capital: bool) -> str:
    """A word that sounds English and most likely is not."""
    onsets, vowels, codas = _ONSETS.split(), _VOWELS.split(), _CODAS.split()
    syllables = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables))
    word += rng.choice(codas) if syllables == 1 or rng.random() < 0.5 else ""
    return word.capitalize() if capital else word


def with_made_up_words(
    rng: random.Random, tale: Tale, turns: list[Turn], *, share: float
) -> tuple[Tale, list[Turn]]:
    """The same tale and turns with about `share` of the names and things renamed throughout."""
    found = sorted(set(_WORD.findall(tale.text)) & _REPLACEABLE)
    names = {
        word: made_up_word(rng, capital=word[0].isupper()) for word in found if rng.random() < share
    }

    def rename(text: str) -> str:
        return _WORD.sub(lambda match: names.get(match.group(), match.group()), text)

    renamed = [
        replace(t, question=rename(t.question), answer=rename(t.answer), key=rename(t.key))
        for t in turns
    ]
    return replace(tale, text=rename(tale.text)), renamed


def with_small_talk(rng: random.Random, messages: list[Message]) -> list[Message]:
    """The conversation with a friendly exchange before, within or after it."""
    said, reply = rng.choice(SMALL_TALK)
    starts = [i for i, message in enumerate(messages) if message.role == "user"]
    place = rng.choice([*starts[:3], len(messages)])
    talk = [Message(role="user", content=said), Message(role="assistant", content=reply)]
    return [*messages[:place], *talk, *messages[place:]]
