"""Owns the facts a tale can tell: their wording, the questions about them and the answers.

A `Relation` holds templates; a `Fact` is a relation with its slots filled. Invariants: the first
slot of `keys` identifies the fact within one tale, every question names enough to identify the
fact, and every answer is a full sentence that repeats it. Pure data and pure functions, no state;
used by `corpus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One way to ask about a fact."""

    ask: str
    """Template of the question."""
    answer: str
    """Template of the one right answer."""
    slot: str
    """Slot whose filling the question asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A kind of fact and everything that can be said about it."""

    name: str
    """Short identifier, used in tables."""
    slots: tuple[str, ...]
    """Slots to fill; P and Q are people, the others name a word list (see `corpus`)."""
    told: tuple[str, ...]
    """Sentences that tell the fact."""
    questions: tuple[Question, ...]
    """Questions about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A relation with its slots filled."""

    relation: Relation
    """Kind of the fact."""
    values: Mapping[str, str]
    """Filling of every slot."""


def _q(slot: str, ask: str, answer: str) -> Question:
    """Shorthand for the table below."""
    return Question(ask=ask, answer=answer, slot=slot)


RELATIONS: Final[tuple[Relation, ...]] = (
    Relation(
        name="keep",
        slots=("P", "trait", "object", "spot"),
        told=(
            "{P} kept the {trait} {object} {spot}.",
            "{P} always kept the {trait} {object} {spot}, and nobody ever moved it.",
            "For many years {P} kept the {trait} {object} {spot}.",
            "As everyone knew, {P} kept the {trait} {object} {spot}.",
            '"I keep it safe," said {P}, who kept the {trait} {object} {spot}.',
        ),
        questions=(
            _q(
                "spot",
                "Where did {P} keep the {trait} {object}?",
                "{P} kept the {trait} {object} {spot}.",
            ),
            _q(
                "spot",
                "Where was the {trait} {object} kept?",
                "The {trait} {object} was kept {spot}.",
            ),
            _q("object", "What did {P} keep {spot}?", "{P} kept the {trait} {object} {spot}."),
            _q(
                "P",
                "Who kept the {trait} {object} {spot}?",
                "{P} kept the {trait} {object} {spot}.",
            ),
        ),
    ),
    Relation(
        name="find",
        slots=("P", "trait", "object", "spot"),
        told=(
            "{P} found the {trait} {object} {spot}.",
            "To everyone's surprise, {P} found the {trait} {object} {spot}.",
            "After a long search, {P} found the {trait} {object} {spot}.",
            "Quite by chance {P} found the {trait} {object} {spot} and picked it up.",
            "It was {P} who found the {trait} {object} {spot}.",
        ),
        questions=(
            _q(
                "spot",
                "Where did {P} find the {trait} {object}?",
                "{P} found the {trait} {object} {spot}.",
            ),
            _q(
                "spot",
                "Where was the {trait} {object} found?",
                "The {trait} {object} was found {spot}.",
            ),
            _q("object", "What did {P} find {spot}?", "{P} found the {trait} {object} {spot}."),
            _q("P", "Who found the {trait} {object}?", "The {trait} {object} was found by {P}."),
        ),
    ),
    Relation(
        name="own",
        slots=("P", "trait", "object"),
        told=(
            "The {trait} {object} belonged to {P}.",
            "The {trait} {object} on the cart belonged to {P}, who was proud of it.",
            "Everyone agreed that the {trait} {object} belonged to {P}.",
            "The {trait} {object} had always belonged to {P}.",
        ),
        questions=(
            _q("P", "Who owned the {trait} {object}?", "The {trait} {object} belonged to {P}."),
            _q("P", "Whose was the {trait} {object}?", "The {trait} {object} belonged to {P}."),
            _q(
                "P",
                "To whom did the {trait} {object} belong?",
                "The {trait} {object} belonged to {P}.",
            ),
        ),
    ),
    Relation(
        name="give",
        slots=("P", "trait", "object", "Q"),
        told=(
            "{P} gave the {trait} {object} to {Q}.",
            "With a smile, {P} gave the {trait} {object} to {Q}.",
            "On that day {P} gave the {trait} {object} to {Q}, who said thank you.",
            "Before leaving, {P} gave the {trait} {object} to {Q}.",
        ),
        questions=(
            _q(
                "Q",
                "Who did {P} give the {trait} {object} to?",
                "{P} gave the {trait} {object} to {Q}.",
            ),
            _q(
                "Q",
                "Who got the {trait} {object} from {P}?",
                "{P} gave the {trait} {object} to {Q}.",
            ),
            _q("object", "What did {P} give to {Q}?", "{P} gave the {trait} {object} to {Q}."),
        ),
    ),
    Relation(
        name="count",
        slots=("P", "number", "goods"),
        told=(
            "{P} had {number} {goods}.",
            "{P} counted slowly and found that {P} had {number} {goods}.",
            "In all, {P} had {number} {goods}.",
            "{P} had {number} {goods}, and they were very good ones.",
            "It was well known that {P} had {number} {goods}.",
        ),
        questions=(
            _q("number", "How many {goods} did {P} have?", "{P} had {number} {goods}."),
            _q(
                "number",
                "What was the number of {goods} that {P} had?",
                "{P} had {number} {goods}.",
            ),
            _q("goods", "What did {P} have {number} of?", "{P} had {number} {goods}."),
        ),
    ),
    Relation(
        name="price",
        slots=("trait", "object", "number"),
        told=(
            "The {trait} {object} cost {number} crowns.",
            "In the shop the {trait} {object} cost {number} crowns.",
            "The {trait} {object} cost {number} crowns, which seemed fair.",
            "A sign said that the {trait} {object} cost {number} crowns.",
        ),
        questions=(
            _q(
                "number",
                "How much did the {trait} {object} cost?",
                "The {trait} {object} cost {number} crowns.",
            ),
            _q(
                "number",
                "What was the price of the {trait} {object}?",
                "The {trait} {object} cost {number} crowns.",
            ),
            _q(
                "number",
                "How many crowns did the {trait} {object} cost?",
                "The {trait} {object} cost {number} crowns.",
            ),
        ),
    ),
    Relation(
        name="job",
        slots=("P", "job"),
        told=(
            "{P} worked as {job}.",
            "All that year {P} worked as {job}.",
            "{P} worked as {job} and liked it well enough.",
            "Like many people there, {P} worked hard. {P} worked as {job}.",
        ),
        questions=(
            _q("job", "What was {P}'s job?", "{P} worked as {job}."),
            _q("job", "What work did {P} do?", "{P} worked as {job}."),
            _q("job", "How did {P} earn a living?", "{P} worked as {job}."),
        ),
    ),
    Relation(
        name="home",
        slots=("P", "town"),
        told=(
            "{P} lived in {town}.",
            "{P} lived in {town}, not far from the river.",
            "At that time {P} lived in {town}.",
            "{P} lived in {town} and knew every street.",
        ),
        questions=(
            _q("town", "Where did {P} live?", "{P} lived in {town}."),
            _q("town", "In which town did {P} live?", "{P} lived in {town}."),
            _q("town", "Which town was {P}'s home?", "{P} lived in {town}."),
        ),
    ),
    Relation(
        name="colour",
        slots=("P", "garment", "colour"),
        told=(
            "{P}'s {garment} was {colour}.",
            "{P}'s {garment} was {colour} and could be seen from far away.",
            "Even in the rain you could see that {P}'s {garment} was {colour}.",
            "{P}'s {garment} was {colour}, with a long row of pockets.",
        ),
        questions=(
            _q("colour", "What colour was {P}'s {garment}?", "{P}'s {garment} was {colour}."),
            _q("colour", "Which colour did {P}'s {garment} have?", "{P}'s {garment} was {colour}."),
        ),
    ),
    Relation(
        name="food",
        slots=("P", "food"),
        told=(
            "{P} liked {food} best.",
            "Of all dishes, {P} liked {food} best.",
            "{P} liked {food} best and could eat it every day.",
            '"I am hungry," said {P}. {P} liked {food} best.',
        ),
        questions=(
            _q("food", "What did {P} like best?", "{P} liked {food} best."),
            _q("food", "What was {P}'s favourite food?", "{P} liked {food} best."),
            _q("food", "Which dish did {P} like best?", "{P} liked {food} best."),
        ),
    ),
    Relation(
        name="pet",
        slots=("P", "pet", "pet_name"),
        told=(
            "{P}'s {pet} was called {pet_name}.",
            "{P}'s {pet} was called {pet_name} and followed {P} everywhere.",
            "The children laughed because {P}'s {pet} was called {pet_name}.",
            "{P}'s {pet} was called {pet_name}, after an old song.",
        ),
        questions=(
            _q("pet_name", "What was {P}'s {pet} called?", "{P}'s {pet} was called {pet_name}."),
            _q(
                "pet_name",
                "What was the name of {P}'s {pet}?",
                "{P}'s {pet} was called {pet_name}.",
            ),
        ),
    ),
    Relation(
        name="day",
        slots=("P", "day"),
        told=(
            "{P} arrived on {day}.",
            "{P} arrived on {day}, tired but happy.",
            "After a long journey {P} arrived on {day}.",
            "{P} arrived on {day} with a small bag and a big smile.",
        ),
        questions=(
            _q("day", "When did {P} arrive?", "{P} arrived on {day}."),
            _q("day", "On which day did {P} arrive?", "{P} arrived on {day}."),
        ),
    ),
)
