"""`python -m tests.faults.lone_decode ID ROUTER...`: a decode worker with a simulated engine in a process of its own, which computes every
prompt itself. Runs until it is killed.
"""

import asyncio
import sys

from baton.engine.aio import AsyncEngine
from baton.engine.sim import build_sim_engine
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from decode_worker.worker import DecodeWorker
from tests.faults.routers import SIM


async def main() -> None:
    _, worker_id, *routers = sys.argv
    settings = WorkerSettings(routers=tuple(routers), worker_id=worker_id, reflection=False)
    engine = AsyncEngine(lambda: build_sim_engine(SIM), name=worker_id)
    transport = MemoryTransport(MemorySources(), ByteCredits(1 << 24))
    await DecodeWorker(settings, engine, transport).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
