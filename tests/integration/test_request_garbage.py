"""What a request leaves behind in the processes that served it: nothing that waits for a full collection. Those come seldom, and
until then a request's prompt and its output, many times over, are most of what a router holds.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.sim_house import house

OURS = {"baton", "router", "prefill_worker", "decode_worker"}


@contextmanager
def kept_garbage() -> Iterator[list[object]]:
    """What is found to be unreachable, but not free, once the context is left."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    found: list[object] = []
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("prefill", [0, 1])
async def test_an_answered_request_is_freed_when_it_ends(prefill: int) -> None:
    """Whether its KV is handed over or not. (The traceback of one that fails may wait for the collector.)"""
    async with house(prefill, 1) as here:
        await here.generate(0)
        await here.settled()
        with kept_garbage() as found:
            for number in range(1, 9):
                await here.generate(number)
            await here.settled()
        kinds = {(type(each).__module__, type(each).__qualname__) for each in found}
        assert not {kind for kind in kinds if kind[0].partition(".")[0] in OURS}
