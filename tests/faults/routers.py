"""Routers as processes of their own, and the simulated workers of this process that join them."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Self

from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from tests.ports import free_port
from tests.served import until

START_S = 40.0
SIM = SimConfig(num_blocks=512, max_batch_tokens=256, step_s=0.01)


class RouterProcess:
    """`python -m router`. The ports that clients know stay the same when it is started again."""

    def __init__(
        self, environ: Mapping[str, str], *, http: bool = False, module: str = "router"
    ) -> None:
        """`environ` is added to this process's, sessions are kept in memory but where it says otherwise; `http` asks for an HTTP port."""
        self._environ = {"BATON_SESSION_STORE": "sqlite://", **environ}
        self._module = module
        self.port = free_port()
        self.http_port = free_port() if http else 0
        """0 where there is none."""
        self.metrics_port = 0

    def start(self) -> Self:
        """Returns once it serves. Fails with what it said."""
        command = [sys.executable, "-m", self._module, "--listen", self.address]
        if self.http_port:
            command += ["--http", self.http_address]
        with tempfile.NamedTemporaryFile(prefix="baton-router-") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **self._environ}, stderr=log
            )
            # Not through `log`: the router writes at the place in the file that the two share.
            said = Path(log.name)
            try:
                until(
                    lambda: self._serves(said.read_text()),
                    START_S,
                    "a router serves",
                    said.read_text,
                )
            except BaseException:
                self.end()
                raise
        return self

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http_address(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Returns the exit code, once it has ended."""
        return self._process.wait(40)

    def end(self) -> None:
        """Kills it, if it runs. Idempotent."""
        self._process.kill()
        self._process.wait(10)

    def _serves(self, said: str) -> bool:
        """Notes those that it has drawn. Fails where it has ended."""
        assert self.running, f"the router ended before it served\n{said}"
        grpc = re.search(r"serving on port \d+, .*metrics on port (\d+)", said)
        if grpc is None or (self.http_port and "serving HTTP on port" not in said):
            return False
        self.metrics_port = int(grpc[1])
        return True


class Workers:
    """Prefill and decode workers in this process."""

    def __init__(self, settings: WorkerSettings, sim: SimConfig) -> None:
        self._sim = sim
        sources = MemorySources()
        self.prefill = PrefillWorker(settings, self._engine("prefill"))
        transport = MemoryTransport(sources, ByteCredits(1 << 24))
        self.decode = DecodeWorker(settings, self._engine("decode"), transport)
        self._sources = sources

    async def start(self) -> None:
        info = await self.prefill.start()
        self._sources.add(info.transfer_address, self.prefill)
        info = await self.decode.start()
        self._sources.add(info.transfer_address, self.decode)

    async def stop(self) -> None:
        await self.decode.stop()
        await self.prefill.stop()

    async def at_rest(self, timeout_s: float) -> None:
        """Returns once no worker holds anything for a request."""
        async with asyncio.timeout(timeout_s):
            for worker in (self.prefill, self.decode):
                while True:
                    load = await worker.host.engine.refresh_load()
                    held = load.used_blocks + load.reserved_blocks + load.in_flight_blocks
                    if not held and not load.running_requests + load.waiting_requests:
                        break
                    await asyncio.sleep(0.01)
                await worker.host.engine.check_integrity()

    def _engine(self, name: str) -> AsyncEngine:
        sim = self._sim
        return AsyncEngine(lambda: build_sim_engine(sim), name=name)


@asynccontextmanager
async def fleet(
    *,
    routers: int = 2,
    sim: SimConfig = SIM,
    environ: Mapping[str, str] = MappingProxyType({}),
    module: str = "router",
) -> AsyncIterator[tuple[list[RouterProcess], Workers]]:
    """Everything up, and every router with its workers."""
    async with AsyncExitStack() as stack:
        processes = [RouterProcess(environ, module=module) for _ in range(routers)]
        for process in processes:
            stack.callback(process.end)
            await asyncio.to_thread(process.start)
        addresses = tuple(process.address for process in processes)
        workers = Workers(WorkerSettings(routers=addresses, reflection=False), sim)
        await workers.start()
        stack.push_async_callback(workers.stop)
        yield processes, workers
