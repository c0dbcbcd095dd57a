"""What asyncio runs in this process. Imported by routers, and sent to workers by value: they cannot import the tests."""

import asyncio
import gc
from collections import Counter


def tasks_by_name(loop: asyncio.AbstractEventLoop) -> Counter[str]:
    """How many tasks run each coroutine, and other garbage is collected: connections are a part of it that the collector finds late.
    Called by any thread.
    """
    gc.collect()
    return Counter(_name(task) for task in asyncio.all_tasks(loop))


def _name(task: "asyncio.Task[object]") -> str:
    running = task.get_coro()
    return str(getattr(running, "__qualname__", type(running).__name__))
