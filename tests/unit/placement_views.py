"""Workers as placement sees them."""

from dataclasses import replace

from baton.kv.spec import KVDtype, KVSpec
from baton.service.settings import PlacementPolicy
from baton.types import Role, WorkerId, WorkerInfo
from router.placement import (
    NoWorker,
    Placement,
    Policy,
    WorkerView,
    longest_tokens,
)
from router.policies import policy_of

SPEC = KVSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    dtype=KVDtype.FLOAT32,
    position_scheme="rope",
    model_fingerprint="a",
)


OTHER = replace(SPEC, model_fingerprint="b")


POLICIES: list[Policy] = [policy_of(kind, local_prefill_tokens=32) for kind in PlacementPolicy]


def info(worker_id: str, role: Role, *, node: str = "n", spec: KVSpec = SPEC) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(worker_id),
        role=role,
        address="localhost:1",
        transfer_address=worker_id,
        model="m",
        spec=spec,
        vocab_size=256,
        max_context_tokens=4096,
        eos_token_ids=(0,),
        block_size_tokens=16,
        num_blocks=256,
        node=node,
        pid=1,
        device="cpu",
        version="0",
    )


def view_of(worker: WorkerInfo) -> WorkerView:
    return WorkerView(info=worker, longest_tokens=longest_tokens(worker), free_blocks=256)


def prefill(worker_id: str, *, node: str = "n", spec: KVSpec = SPEC) -> WorkerView:
    return view_of(info(worker_id, Role.PREFILL, node=node, spec=spec))


def decode(worker_id: str, *, node: str = "n", spec: KVSpec = SPEC) -> WorkerView:
    return view_of(info(worker_id, Role.DECODE, node=node, spec=spec))


def ids(placement: Placement | NoWorker) -> tuple[str | None, str]:
    assert isinstance(placement, Placement), placement
    of_prefill = None if placement.prefill is None else placement.prefill.info.worker_id
    return of_prefill, placement.decode.info.worker_id
