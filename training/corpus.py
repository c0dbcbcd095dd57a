"""Owns the generated corpus: tales, and questions whose answer stands only in the tale.

A tale is built from seeded random choices, so a seed names it for good. Invariants: within a tale
an object, and a person within one relation, occurs in one fact only, so every question has one
answer; the pairing of a fact's subject with its answer is *reserved* for held-out tales by a hash,
and training tales never contain a reserved pairing. No torch, no global state; used by
`tokenizer`, `train`, `evaluate` and `samples`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from training import scenes, words
from training.facts import RELATIONS, Fact, Question, Relation

Split = Literal["train", "held-out"]
Count = Callable[[str], int]

_LISTS: Final[Mapping[str, Sequence[str]]] = {
    "trait": words.TRAITS,
    "object": words.OBJECTS,
    "spot": words.SPOTS,
    "number": words.NUMBERS,
    "goods": words.GOODS,
    "job": words.JOBS,
    "town": words.TOWNS,
    "garment": words.GARMENTS,
    "colour": words.COLOURS,
    "food": words.FOODS,
    "pet": words.PETS,
    "pet_name": words.PET_NAMES,
    "day": words.DAYS,
}
_RESERVED_ONE_IN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question about a tale with its answer."""

    question: str
    """What the user asks."""
    answer: str
    """The one right answer, a full sentence."""
    key: str
    """The part of the answer that the question asks for."""
    relation: str
    """Name of the fact's relation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tale:
    """A story with its facts."""

    text: str
    """Paragraphs parted by blank lines."""
    facts: tuple[Fact, ...]
    """Every fact told, in the order of telling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


def answer_words() -> frozenset[str]:
    """Every word that can stand in an answer's slots."""
    names = frozenset(words.WOMEN + words.MEN)
    return names.union(*(phrase.split() for phrases in _LISTS.values() for phrase in phrases))


def is_reserved(fact: Fact) -> bool:
    """Whether the fact's pairing of first and last slots belongs to held-out tales only."""
    slots = fact.relation.slots
    anchor = fact.values.get("object", fact.values[slots[0]])
    target = fact.values[slots[0]] if fact.relation.name == "own" else fact.values[slots[-1]]
    pairing = f"{fact.relation.name}|{anchor}|{target}|{fact.values.get('number', '')}"
    return zlib.crc32(pairing.encode()) % _RESERVED_ONE_IN == 0


def write_tale(rng: random.Random, *, split: Split, max_tokens: int, count: Count) -> Tale:
    """A tale of at most `max_tokens` tokens, as measured by `count`, and close to it."""
    return _TaleWriter(rng, split=split, max_tokens=max_tokens, count=count).write()


def write_turns(rng: random.Random, tale: Tale, *, split: Split, limit: int) -> list[Turn]:
    """Up to `limit` questions about different facts; held-out asks only about reserved pairings."""
    facts = [f for f in tale.facts if split == "train" or is_reserved(f)]
    rng.shuffle(facts)
    return [_ask(rng, fact) for fact in facts[:limit]]


def as_messages(tale: Tale, turns: Sequence[Turn], *, system: str | None = None) -> list[Message]:
    """The conversation in which the first question follows the tale in one user message."""
    messages = [] if system is None else [Message(role="system", content=system)]
    for number, turn in enumerate(turns):
        lead = f"{tale.text}\n\n" if number == 0 else ""
        messages.append(Message(role="user", content=lead + turn.question))
        messages.append(Message(role="assistant", content=turn.answer))
    return messages


def _ask(rng: random.Random, fact: Fact) -> Turn:
    """A question about the fact, in one of its wordings."""
    question: Question = rng.choice(fact.relation.questions)
    return Turn(
        question=question.ask.format_map(fact.values),
        answer=question.answer.format_map(fact.values),
        key=fact.values[question.slot],
        relation=fact.relation.name,
    )


class _TaleWriter:
    """Writes one tale; keeps track of what has been said so that nothing is said twice."""

    def __init__(self, rng: random.Random, *, split: Split, max_tokens: int, count: Count) -> None:
        self._rng = rng
        self._split = split
        self._count = count
        self._budget = max_tokens
        size = min(40, max(3, max_tokens // rng.randint(45, 90)))
        self._cast = rng.sample(words.WOMEN + words.MEN, size)
        # Few relations in a short tale make the people in it comparable, hence confusable.
        self._relations = rng.sample(RELATIONS, rng.randint(4, len(RELATIONS)))
        self._told: set[tuple[str, str]] = set()
        self._facts: list[Fact] = []
        self._narration: list[str] = []

    def write(self) -> Tale:
        """Add paragraphs while they fit."""
        rng = self._rng
        paragraphs: list[str] = []
        ending = self._narrate(scenes.ENDINGS) if rng.random() < 0.7 else ""
        self._budget -= self._count(ending) + 2
        lead = self._narrate(scenes.OPENINGS)
        full = False
        while not full:
            sentences = [lead]
            self._budget -= self._count(lead) + 1
            for _ in range(rng.randint(3, 8)):
                made = self._sentence()
                cost = self._count(" " + made[0])
                if cost > self._budget:
                    full = True
                    break
                self._budget -= cost
                sentences.append(made[0])
                if made[1] is not None:
                    self._facts.append(made[1])
            paragraphs.append(" ".join(sentences))
            lead = self._narrate(scenes.TURNS)
            full = full or self._budget < self._count(lead) + 20
        if ending:
            paragraphs.append(ending)
        return Tale(text="\n\n".join(paragraphs), facts=tuple(self._facts))

    def _sentence(self) -> tuple[str, Fact | None]:
        """The next sentence: a fact, or narration when it is time for it or facts ran out."""
        fact = self._new_fact() if self._rng.random() < 0.62 else None
        if fact is None:
            return self._narrate(scenes.MOMENTS), None
        return self._rng.choice(fact.relation.told).format_map(fact.values), fact

    def _new_fact(self) -> Fact | None:
        """A fact that is new to this tale and allowed in this split; None if none came up."""
        rng = self._rng
        for _ in range(20):
            relation = rng.choice(self._relations)
            fact = self._fill(relation)
            # Held-out tales lean to reserved pairings, because only these are asked about.
            wanted = is_reserved(fact) if self._split == "held-out" else not is_reserved(fact)
            lenient = self._split == "held-out" and rng.random() < 0.1
            marks = {(relation.name, fact.values["P"])} if "P" in relation.slots else set()
            if "object" in relation.slots:
                marks.add(("object", fact.values["object"]))
            if (wanted or lenient) and not marks & self._told:
                self._told |= marks
                return fact
        return None

    def _fill(self, relation: Relation) -> Fact:
        """The relation with random fillings."""
        people = self._rng.sample(self._cast, 2)
        values = dict(zip("PQ", people, strict=True))
        for slot in relation.slots:
            if slot in _LISTS:
                values[slot] = self._rng.choice(_LISTS[slot])
        return Fact(relation=relation, values=values)

    def _narrate(self, templates: Sequence[str]) -> str:
        """A sentence of narration, not one of those used most recently."""
        fresh = [t for t in templates if t not in self._narration[-12:]]
        template = self._rng.choice(fresh)
        self._narration.append(template)
        person, other = self._rng.sample(self._cast, 2)
        female = person in words.WOMEN
        return template.format(
            P=person,
            Q=other,
            he="she" if female else "he",
            his="her" if female else "his",
            month=self._rng.choice(words.MONTHS),
        )
