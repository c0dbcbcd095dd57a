"""`python -m tests.faults.soak_router`: a router whose metrics tell which asyncio tasks it runs."""

import asyncio
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from router import __main__ as command
from router.app import RouterApp
from tests.faults.soak_tasks import tasks_by_name

TASKS = "soak_tasks"


class TaskCollector(Collector):
    """Called by the thread that serves metrics."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(TASKS, "asyncio tasks", labels=["name"])
        for name, count in tasks_by_name(self._loop).items():
            family.add_metric([name], count)
        yield family


class CountingRouter(RouterApp):
    """See the module docstring."""

    async def start(self) -> int:
        port = await super().start()
        self.metrics.registry.register(TaskCollector(asyncio.get_running_loop()))
        return port


if __name__ == "__main__":
    command.RouterApp = CountingRouter  # type: ignore[attr-defined]
    command.main()
