"""The soak's workers: their engines hang and fail when they are told to, and heed everything that a client may ask of sampling; and
they tell which asyncio tasks they run. Sent to their processes by value: workers cannot import the tests.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from baton.engine.aio import AsyncEngine
from baton.engine.batch import BatchRow, Sampled, SampleInput
from baton.engine.engine import PagedEngine
from baton.engine.sim import SimConfig, SimRunner
from baton.types import Role, SamplingParams
from baton.worker.actor import ActorConfig, WorkerActor
from decode_worker.actor import DecodeActor
from flex_worker.actor import FlexActor
from prefill_worker.actor import PrefillActor
from tests.faults.soak_tasks import tasks_by_name

LIKELY = slice(65, 73)
"""Tokens that come again and again, so that penalties have something to say."""


class Trouble:
    """What the engine's next step is to suffer. Set by the event loop, taken by the engine's thread."""

    hang_s = 0.0


class SoakRunner(SimRunner):
    """The simulated runner, whose tokens depend on bias and penalties too, and so on how often each token is in the output."""

    def __init__(self, config: SimConfig, trouble: Trouble) -> None:
        super().__init__(config)
        self._trouble = trouble

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        hang_s, self._trouble.hang_s = self._trouble.hang_s, 0.0
        time.sleep(hang_s)
        return super().run(rows)

    def _choose(self, state: int, sample: SampleInput) -> Sampled:
        plain, params = super()._choose(state, sample), sample.params
        if not is_adjusted(params):
            return plain
        size = self.info.vocab_size
        # [V] float64, all positive: a repetition penalty divides
        scores = np.random.default_rng((state, plain.token_id)).random(size)
        scores[LIKELY] += 1
        for token_id, bias in params.logit_bias:
            scores[token_id] += bias
        times = np.bincount(sample.output, minlength=size)
        seen = times + np.bincount(sample.prompt, minlength=size) > 0
        scores[seen] /= params.repetition_penalty
        scores -= params.presence_penalty * (times > 0) + params.frequency_penalty * times
        return replace(plain, token_id=int(scores.argmax()))


def is_adjusted(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def soak_engine(config: SimConfig, trouble: Trouble) -> PagedEngine:
    """On the thread that owns it."""
    return PagedEngine(
        SoakRunner(config, trouble),
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        prefix_cache=config.prefix_cache,
    )


def troubled(actor: type[WorkerActor]) -> type[WorkerActor]:
    """The soak's worker of a kind."""

    class SoakActor(actor):  # type: ignore[valid-type,misc]  # one of three
        def __init__(self, config: ActorConfig) -> None:
            super().__init__(config)
            self._trouble = put_up(self._engine, config)

        async def hang(self, duration_s: float) -> None:
            """The engine's next step takes so much longer."""
            self._trouble.hang_s = duration_s

        async def fail(self) -> None:
            """As an engine fails that hangs for too long."""
            self._engine.give_up("the soak says so")

        async def tasks(self) -> Counter[str]:
            return tasks_by_name(asyncio.get_running_loop())

    return SoakActor


def put_up(engine: AsyncEngine, config: ActorConfig) -> Trouble:
    """Gives an engine that has not started yet the soak's runner; returns what that suffers from."""
    assert isinstance(config.engine, SimConfig)
    trouble = Trouble()
    engine._build = partial(soak_engine, config.engine, trouble)
    return trouble


DEDICATED: Mapping[Role, type[WorkerActor]] = {
    Role.PREFILL: troubled(PrefillActor),
    Role.DECODE: troubled(DecodeActor),
}
FLEXIBLE: Mapping[Role, type[WorkerActor]] = dict.fromkeys(Role, troubled(FlexActor))
"""These turn to the other role when they are told to."""
