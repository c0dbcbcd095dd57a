"""A router that lets roles follow the load, over simulated workers that compute no faster than they are told."""

import asyncio
from dataclasses import replace

from baton.engine.sim import SimConfig
from baton.types import Role
from tests.integration.flex_house import FlexHouse, flex_house
from tests.integration.router_fakes import SETTINGS

PREFILL, DECODE = Role.PREFILL, Role.DECODE
# 2,000 tokens of a prompt a second; a generated token takes 2 ms, however many are generated together.
SIM = SimConfig(
    num_blocks=512, max_batch_tokens=64, step_s=0.001, token_s=0.0005, prefix_cache=False
)
EAGER = replace(
    SETTINGS,
    autoscale=True,
    autoscale_window_s=0.6,
    autoscale_cooldown_s=0.6,
    autoscale_dwell_s=1.5,
    autoscale_backlog_s=0.2,
    autoscale_decode_requests=6.0,
    drain_grace_s=2.0,
)


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    return tuple((number * 31 + position * 7) % 255 + 1 for position in range(length))


class Clients:
    """Ask in a circle until they are told to stop, and keep what they were told."""

    def __init__(self, here: FlexHouse, count: int, *, prompt: int, answer: int) -> None:
        self._here = here
        self._prompt, self._answer = prompt, answer
        self._stop = asyncio.Event()
        self.answers: dict[int, list[int]] = {}
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(count)]

    async def _ask(self, number: int) -> None:
        prompt = prompt_of(number, self._prompt)
        while not self._stop.is_set():
            got = await self._here.generate(prompt, max_tokens=self._answer, seed=number)
            assert set(got.failures) <= {"DRAINING"}
            assert self.answers.setdefault(number, got.tokens) == got.tokens

    async def end(self) -> dict[int, list[int]]:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        return self.answers


def count(here: FlexHouse, role: Role) -> int:
    return sum(each is role for each in here.roles.values())


def changes(here: FlexHouse, role: Role, outcome: str) -> float:
    """That the autoscaler asked for."""
    labels = {"role": role.value, "outcome": outcome}
    name = "baton_autoscaler_changes_total"
    return here.app.metrics.registry.get_sample_value(name, labels) or 0.0


async def test_roles_follow_a_load_that_shifts_from_long_prompts_to_long_answers() -> None:
    """Promise: workers turn to the phase that lacks them, none is lost from a role that has one, and every answer is right and whole,
    with no attempt that fails: some move on, with their KV.
    """
    house = {"a": PREFILL, "b": PREFILL, "c": DECODE, "d": DECODE}
    async with flex_house(house, sim=SIM, settings=EAGER) as here:
        prompts = Clients(here, 8, prompt=800, answer=2)
        await here.until(lambda: count(here, PREFILL) == 3, 20)
        long_prompts = await prompts.end()
        answers = Clients(here, 24, prompt=40, answer=120)
        await here.until(lambda: count(here, DECODE) == 3, 20)
        long_answers = await answers.end()
        for role in Role:
            assert changes(here, role, "ok") >= 1
    assert len(long_prompts) == 8
    assert len(long_answers) == 24
    async with flex_house({"only": DECODE}, sim=replace(SIM, token_s=0.0)) as still:
        for number, tokens in long_prompts.items():
            again = await still.generate(prompt_of(number, 800), max_tokens=2, seed=number)
            assert again.tokens == tokens
        for number, tokens in long_answers.items():
            again = await still.generate(prompt_of(number, 40), max_tokens=120, seed=number)
            assert again.tokens == tokens


async def test_without_the_setting_roles_stay() -> None:
    async with flex_house(
        {"a": PREFILL, "b": PREFILL, "c": DECODE}, sim=SIM, settings=replace(EAGER, autoscale=False)
    ) as here:
        crowd = Clients(here, 24, prompt=40, answer=60)
        await asyncio.sleep(1.5)
        await crowd.end()
        assert here.roles == {"a": PREFILL, "b": PREFILL, "c": DECODE}


async def test_a_worker_that_cannot_turn_is_left_alone() -> None:
    """A change that fails is told in the log, and tried again only after the pauses that a change has."""
    async with flex_house(
        {"a": PREFILL, "b": PREFILL, "c": DECODE}, sim=SIM, settings=EAGER
    ) as here:
        for name in ("a", "b"):
            here.workers[name].host.refuse_calls()
        crowd = Clients(here, 24, prompt=20, answer=60)
        await asyncio.sleep(1.5)
        await crowd.end()
        assert count(here, PREFILL) == 2
