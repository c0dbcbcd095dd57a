"""The transports under contract, each with a source and a way to end it."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle

from baton.transfer.base import KVTransport
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.transfer.ray_store import RayTransport
from tests.contract import fake_source
from tests.contract.fake_source import FakePrefill, FakeSource

BUDGET_BYTES = 64 << 20
NAMESPACE = "baton-tests"

_names = (f"fake-prefill-{i}" for i in itertools.count())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A transport and the one source that it can reach."""

    transport: KVTransport
    budget: ByteCredits
    address: str
    kill: Callable[[], Awaitable[None]]
    """Ends the source at once, as SIGKILL does."""
    held_references: Callable[[], int]
    """How many of the store's objects this process holds."""

    async def drained(self) -> None:
        """Fails where references are still held after a few seconds."""
        end_s = time.monotonic() + 6
        while self.held_references():
            assert time.monotonic() < end_s, "references leak"
            await asyncio.sleep(0.05)


@contextmanager
def memory_rig() -> Iterator[Rig]:
    sources, budget = MemorySources(), ByteCredits(BUDGET_BYTES)

    async def kill() -> None:
        sources.remove("fake-prefill")

    with sources.serving("fake-prefill", FakeSource()):
        yield Rig(
            transport=MemoryTransport(sources, budget),
            budget=budget,
            address="fake-prefill",
            kill=kill,
            held_references=lambda: 0,
        )


class RayPeers:
    """Fake prefill actors, one at a time: starting one takes a second, so it serves tests until one of them kills it. The actors'
    processes are the only ones that are killed.
    """

    def __init__(self) -> None:
        # Workers cannot import the tests.
        ray.cloudpickle.register_pickle_by_value(fake_source)  # type: ignore[no-untyped-call]
        actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
        self._actor_class: ActorClass[FakePrefill] = actor(FakePrefill)
        self._actor: ActorHandle[Any] | None = None
        self._name = ""
        self._pid = 0

    def rig(self) -> Rig:
        """Needs a cluster with the tests' namespace."""
        if self._actor is None:
            self._name = next(_names)
            actor: Any = self._actor_class.options(name=self._name).remote()
            self._pid = ray.get(actor.pid.remote())
            self._actor = actor
        budget = ByteCredits(BUDGET_BYTES)
        return Rig(
            transport=RayTransport(budget, NAMESPACE),
            budget=budget,
            address=self._name,
            kill=self._kill,
            held_references=_held_references,
        )

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)

    async def _kill(self) -> None:
        self._actor = None
        os.kill(self._pid, signal.SIGKILL)


def _held_references() -> int:
    # No public call tells what this process holds.
    worker: Any = ray._private.worker.global_worker
    return len(worker.core_worker.get_all_reference_counts())
