"""Owns the narration around the facts: openings, scene changes, small moments and endings.

Invariant: no template states anything a question could ask about, so narration never contradicts
a fact. Slots: P and Q are people, He/he/his the words for P, town, month, number of no consequence
are never used. Pure data; used by `corpus`.
"""

from __future__ import annotations

from typing import Final

OPENINGS: Final = (
    "It was a cold morning in {month}, and the streets were still quiet.",
    "One evening in {month} the rain would not stop, and the neighbours sat together and talked.",
    "This is the story of {P} and {Q}, who had been friends since they were very young.",
    "Nobody expected much from that summer, least of all {P}.",
    "The market opened early that day, and {P} was the first to come.",
    "Long ago, before the railway came, there was a village where everybody knew everybody.",
    "When the snow melted in {month}, people came out of their houses again.",
    "There was once a small house at the end of a long road, and {P} often went there.",
    "It was the week of the great fair, and the whole valley was full of noise.",
    "{P} had never seen so many people in one place.",
    "The old road was long and dusty, and {P} had walked it many times.",
    "In {month} the days grew longer, and {P} was glad of the light.",
    "Everything began with a letter that {P} could not read.",
    "The summer that {P} and {Q} met was the warmest anyone could remember.",
)

TURNS: Final = (
    "The next morning the sun came out again.",
    "Later that day {P} met {Q} by the road.",
    "In the afternoon the wind grew stronger.",
    "After dinner they talked about old times.",
    "Meanwhile, {P} was waiting at the corner.",
    "A few days later everything looked different.",
    "Not long after that, {P} came by with some news.",
    "That night the stars were very bright.",
    "At noon the bells rang, and the children ran home.",
    "The following week was calm and warm.",
    "By then the whole street had heard about it.",
    "When the clouds moved on, {P} and {Q} went for a walk.",
    "There was more to tell about {P}.",
    "Down by the river it was quieter.",
    "On the other side of the square {P} was talking with {Q}.",
    "Soon it was time for {P} to say something.",
)

MOMENTS: Final = (
    "{P} smiled and said nothing.",
    "{P} looked at the sky for a long time.",
    "{P} and {Q} laughed until they had to sit down.",
    '"It is going to rain," said {P}.',
    '"I have not slept well," {P} said quietly.',
    '"Wait for me," called {P}, but {Q} was already gone.',
    '"Do you remember last winter?" asked {Q}, and {P} nodded.',
    "A dog barked somewhere, and then it was still again.",
    "The wind blew some leaves across the road.",
    "{P} hurried home before it got dark.",
    "{P} sat down next to {Q} and told a long story.",
    "{P} poured some tea, and {he} drank it slowly.",
    "{P} thought about it, but {he} could not decide.",
    "Nobody knew why {P} was in such a good mood.",
    "{P} waved to {Q} across the street.",
    "{P} opened the window and let in the fresh air.",
    "It was the kind of day when nothing goes wrong.",
    "The smell of fresh bread was in the air.",
    "Far away a train could be heard.",
    "The children were playing and did not want to go home.",
    '"That is what I always say," said {Q}.',
    '"You are right," said {P}, and {he} meant it.',
    "{P} was tired, but {he} did not want to stop.",
    "{P} had learned that from {his} grandmother.",
    "{P} never forgot a friend.",
    "{Q} listened carefully while {P} was speaking.",
    "Some people said that {P} worried too much.",
    "{P} hummed a tune that {he} had known since {he} was a child.",
    "They shared what they had and were content.",
    "A light rain began to fall, but {P} did not mind.",
    "{P} wrote a few lines to {his} sister.",
    "The river was high after the long rain.",
    "{P} took a deep breath and went on.",
    '"Come in and sit down," said {P}.',
    '"I will help you tomorrow," {Q} promised.',
    "{P} could not help laughing.",
    "It did not matter much to {Q}.",
    "{P} shook {his} head, because {he} had heard it all before.",
    "For a while they walked without a word.",
    "The sun was warm, and {P} fell asleep on the grass.",
    "{P} asked {Q} for advice, as {he} often did.",
    "A cold wind came down from the hills.",
    "{P} was in no hurry.",
    "Then somebody knocked, and {P} went to see who it was.",
    "{P} and {Q} shook hands and parted as friends.",
    "It was late, and the fire was almost out.",
    "{P} liked to get up before everyone else.",
    "{Q} wanted to know everything, and {P} was happy to tell.",
)

ENDINGS: Final = (
    "In the end everyone went home, and the lights went out one by one.",
    "{P} was happy that the day was over.",
    "And that is how it was, and nobody ever wanted it to be different.",
    "{P} and {Q} still talk about that time.",
    "When the moon rose, the streets were empty again.",
    "It had been a good day, and {P} slept well that night.",
    "Years later {P} would tell the story to {his} grandchildren.",
    "After that, life went on as it always had.",
)

GREETINGS: Final = (
    "You answer questions about a story.",
    "You are a helpful assistant.",
    "Answer from the story only.",
    "You are Tales, a small model that reads stories and answers questions about them.",
)
