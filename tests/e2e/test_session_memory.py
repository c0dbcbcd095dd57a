"""What live sessions cost a router process."""

import pytest

from benchmarks.sessions import measure

pytestmark = pytest.mark.e2e

MAX_BYTES = 40_000


async def test_a_live_session_costs_the_router_little_memory() -> None:
    """With its history of 2,048 tokens in the router's own memory; 20,000 of them then fit 0.8 GB."""
    summary, _ = await measure(800, 2048, "sqlite://")
    assert summary["bytes_per_session"] < MAX_BYTES
