"""Workers that tell how many asyncio tasks they run. Sent to their processes by value: workers cannot import the tests."""

import asyncio

from decode_worker.actor import DecodeActor
from prefill_worker.actor import PrefillActor


class CountingPrefillActor(PrefillActor):
    async def num_tasks(self) -> int:
        return len(asyncio.all_tasks())


class CountingDecodeActor(DecodeActor):
    async def num_tasks(self) -> int:
        return len(asyncio.all_tasks())
