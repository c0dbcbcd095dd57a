"""The router places a request once: what admission was told is what its first attempt gets, while nothing changes."""

from collections.abc import Callable

from baton.kv.prefix import SequenceHashes
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.types import PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.fleet import Fleet
from router.placement import FleetView, NoWorker, Placement, PlaceRequest
from router.policies import LeastLoaded
from tests.integration.router_fakes import SPEC


class Counting:
    """A policy that counts its decisions."""

    def __init__(self) -> None:
        self.decisions = 0
        self._policy = LeastLoaded()

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        self.decisions += 1
        return self._policy.place(view, request)


def decode_worker(name: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        role=Role.DECODE,
        address="127.0.0.1:1",
        transfer_address="",
        model="m",
        spec=SPEC,
        vocab_size=256,
        max_context_tokens=1024,
        eos_token_ids=(0,),
        block_size_tokens=16,
        num_blocks=512,
        node="here",
        pid=0,
        device="fake",
        version="0",
    )


async def test_a_decision_holds_until_something_changes() -> None:
    """Promise: admission and the first attempt share a decision; whoever is placed after the claim is told anew, and goes elsewhere."""
    policy = Counting()
    fleet = Fleet(RouterSettings(), policy, RouterMetrics())
    members = [fleet.join(decode_worker(name)) for name in ("one", "two")]
    first, second = SequenceHashes(range(1, 40)), SequenceHashes(range(1, 40))
    try:
        fleet.predicted_ttft_s(first, None)
        placed = fleet.place(first)
        assert policy.decisions == 1
        assert isinstance(placed, Placement)

        held = fleet.hold(placed, len(first))
        other = fleet.place(second)
        assert isinstance(other, Placement)
        assert policy.decisions == 2
        assert other.decode.info.worker_id != placed.decode.info.worker_id

        changes: list[Callable[[], None]] = [
            held.release,
            lambda: fleet.suspect(WorkerId("one")),
            lambda: fleet.heartbeat(members[1], WorkerLoad(), PrefixDelta(), draining=True),
            lambda: fleet.note_cached(WorkerId("one"), first),
            lambda: fleet.leave(members[1], "it ends"),
        ]
        for decisions, change in enumerate(changes, start=3):
            change()
            fleet.place(second)
            fleet.place(second)
            assert policy.decisions == decisions
        assert fleet.registry.claimed_tokens() == 0
    finally:
        await fleet.close()
