"""What placement promises holds on any fleet."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types import Role, WorkerId
from router.placement import (
    FleetView,
    NoWorker,
    Placement,
    PlaceRequest,
    Policy,
    WorkerView,
)
from router.policies import PrefixAware
from tests.unit.placement_views import OTHER, POLICIES, SPEC, prefill

views = st.builds(
    replace,
    st.builds(
        lambda name, node, spec: (name, node, spec),
        st.integers(0, 30),
        st.sampled_from(["x", "y"]),
        st.sampled_from([SPEC, OTHER]),
    ).map(lambda t: prefill(f"p{t[0]}", node=t[1], spec=t[2])),
    draining=st.booleans(),
    suspect=st.booleans(),
    requests=st.integers(0, 50),
    queued_prefill_tokens=st.integers(0, 5000),
    free_blocks=st.integers(0, 256),
    reclaimable_blocks=st.integers(0, 256),
    prefill_tokens_per_s=st.sampled_from([0.0, 1000.0, 50_000.0]),
    decode_step_s=st.sampled_from([0.0, 0.02, 0.5]),
)


def as_decode(worker: WorkerView) -> WorkerView:
    name = worker.info.worker_id.replace("p", "d")
    return replace(worker, info=replace(worker.info, worker_id=WorkerId(name), role=Role.DECODE))


fleets = st.builds(
    FleetView,
    st.lists(views, max_size=6, unique_by=lambda w: w.info.worker_id).map(tuple),
    st.lists(views.map(as_decode), max_size=6, unique_by=lambda w: w.info.worker_id).map(tuple),
    st.dictionaries(
        st.builds("{}{}".format, st.sampled_from("pd"), st.integers(0, 30)).map(WorkerId),
        st.integers(1, 60).map(lambda blocks: 16 * blocks),
    ),
    st.sampled_from([0.0, 0.3]),
)


requests = st.builds(
    PlaceRequest,
    num_tokens=st.integers(1, 1000),
    turn=st.integers(0, 2**40),
    avoid=st.frozensets(
        st.builds("{}{}".format, st.sampled_from("pd"), st.integers(0, 30)).map(WorkerId),
        max_size=6,
    ),
    digest=st.sampled_from([None, SPEC.digest, OTHER.digest]),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(view=fleets, request_=requests)
def test_on_any_fleet_a_placement_upholds_what_every_policy_promises(
    policy: Policy, view: FleetView, request_: PlaceRequest
) -> None:
    usable = [w for w in view.decode if not w.draining and request_.digest in (None, w.digest)]
    placed = policy.place(view, request_)
    if isinstance(placed, NoWorker):
        assert not usable
        assert placed.reason
        return
    assert placed.decode in usable
    sound = [w for w in usable if not w.suspect and w.info.worker_id not in request_.avoid]
    if sound:
        assert placed.decode in sound
    if placed.prefill is None:
        lacking = request_.num_tokens - placed.skip_tokens
        partners = [
            w
            for w in view.prefill
            if w.digest == placed.decode.digest
            and not w.draining
            and not w.suspect
            and w.info.worker_id not in request_.avoid
        ]
        assert lacking <= 32 or not partners
        return
    assert placed.prefill in view.prefill
    assert placed.prefill.digest == placed.decode.digest
    assert not placed.prefill.draining
    assert not placed.prefill.suspect
    assert placed.prefill.info.worker_id not in request_.avoid
    assert placed == policy.place(view, request_), "placement is a pure function"


@given(view=fleets, request_=requests)
def test_adding_load_to_the_chosen_decode_worker_never_attracts_a_request(
    view: FleetView, request_: PlaceRequest
) -> None:
    before = PrefixAware().place(view, request_)
    if isinstance(before, NoWorker):
        return
    chosen = before.decode.info.worker_id
    others = tuple(
        w if w.info.worker_id == chosen else replace(w, requests=w.requests + 1)
        for w in view.decode
    )
    after = PrefixAware().place(replace(view, decode=others), request_)
    assert isinstance(after, Placement)
    assert after.decode.info.worker_id == chosen
