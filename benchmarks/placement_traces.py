"""Synthetic traces with the published mean lengths of Mooncake's (FAST '25). How prompts share prefixes, and how much, is chosen here.

    conversation   about 12,000 tokens in, 340 out; each turn repeats its session's turns before it, then adds a message
    agent          about 8,600 tokens in, 180 out; prompts begin with one of a few tool descriptions, then work step by step

Seeded: the same arguments give the same trace. What a session's tokens are does not matter, only which are the same, so blocks
are named by (session, position), or (tool description, position).
"""

import random
from dataclasses import dataclass

from baton.types import BlockHash
from benchmarks.placement_sim import BLOCK_TOKENS, TraceRequest

_SESSION_BITS = 24
"""Of a block's name; the rest is its position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a trace looks like."""

    name: str
    mean_prompt_tokens: int
    mean_output_tokens: int
    mean_turns: float
    first_tokens: float
    """Own tokens of a session's first prompt, in relation to what each later turn adds."""
    shared_prefixes: int
    """How many shared beginnings there are; popularity falls with rank."""
    shared_tokens: float
    """Their mean length, in relation to what each later turn adds."""
    pause_s: float
    """Mean time from a turn to the next."""


CONVERSATION = Shape(
    name="conversation",
    mean_prompt_tokens=12_000,
    mean_output_tokens=340,
    mean_turns=1.7,
    first_tokens=2.0,
    shared_prefixes=0,
    shared_tokens=0.0,
    pause_s=25.0,
)
AGENT = Shape(
    name="agent",
    mean_prompt_tokens=8_600,
    mean_output_tokens=180,
    mean_turns=1.3,
    first_tokens=1.0,
    shared_prefixes=60,
    shared_tokens=0.95,
    pause_s=12.0,
)


@dataclass(slots=True)
class _Turn:
    at_s: float
    session: int
    prefix: int
    shared: float
    own: float
    """Before this prompt's end, without the shared part: in units that are scaled to the wanted mean."""
    outputs: int
    """Tokens of the session's answers before."""
    output: int


def trace(shape: Shape, *, requests: int, rate_per_s: float, seed: int = 1) -> list[TraceRequest]:
    """So many requests, in order of arrival, at that mean rate."""
    rng = random.Random(seed)
    lengths = [rng.lognormvariate(0.0, 0.6) for _ in range(shape.shared_prefixes)]
    turns: list[_Turn] = []
    session = 0
    # More than wanted: the beginning, when few sessions are in their later turns, is cut off.
    wanted = 2 * requests
    while len(turns) < wanted:
        session += 1
        at_s = rng.uniform(0.0, wanted / rate_per_s)
        rank = _zipf(rng, shape.shared_prefixes)
        shared = shape.shared_tokens * lengths[rank] if lengths else 0.0
        own, outputs = shape.first_tokens * rng.lognormvariate(-0.32, 0.8), 0
        for _ in range(1 + _geometric(rng, shape.mean_turns - 1)):
            output = max(2, round(rng.lognormvariate(-0.32, 0.8) * shape.mean_output_tokens))
            turns.append(_Turn(at_s, session, rank, shared, own, outputs, output))
            own, outputs = own + rng.lognormvariate(-0.32, 0.8), outputs + output
            at_s += shape.pause_s * (0.4 + rng.expovariate(1 / 0.6))
    turns.sort(key=lambda turn: turn.at_s)
    first_s = turns[requests // 2].at_s
    turns = turns[requests // 2 : requests // 2 + requests]
    scale = (shape.mean_prompt_tokens - sum(t.outputs for t in turns) / requests) / (
        sum(t.shared + t.own for t in turns) / requests
    )
    stretch = (requests / rate_per_s) / (turns[-1].at_s - first_s)
    return [_request(turn, scale, (turn.at_s - first_s) * stretch) for turn in turns]


def _request(turn: _Turn, scale: float, at_s: float) -> TraceRequest:
    shared_blocks = round(turn.shared * scale) // BLOCK_TOKENS
    prompt_tokens = round((turn.shared + turn.own) * scale) + turn.outputs
    prompt_tokens = max(prompt_tokens, BLOCK_TOKENS * (shared_blocks + 1))
    blocks = (prompt_tokens + turn.output) // BLOCK_TOKENS
    shared = [_name(2 * turn.prefix, index) for index in range(shared_blocks)]
    own = [_name(2 * turn.session + 1, index) for index in range(shared_blocks, blocks)]
    whole = shared + own
    return TraceRequest(
        at_s=at_s,
        prompt_tokens=prompt_tokens,
        output_tokens=turn.output,
        prompt=whole[: prompt_tokens // BLOCK_TOKENS],
        whole=whole,
    )


def _name(owner: int, index: int) -> BlockHash:
    return BlockHash(index << _SESSION_BITS | owner)


def owner_of(name: BlockHash) -> int:
    """Of a block: odd for a session, even for what sessions share."""
    return name & (1 << _SESSION_BITS) - 1


def _zipf(rng: random.Random, ranks: int) -> int:
    weights = [1 / (rank + 1) for rank in range(ranks)]
    return rng.choices(range(ranks), weights)[0] if ranks else 0


def _geometric(rng: random.Random, mean: float) -> int:
    """0, 1, 2, ... with that mean."""
    count = 0
    while rng.random() < mean / (1 + mean):
        count += 1
    return count
