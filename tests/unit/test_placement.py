"""Placement decides as its docstring promises, on tables and on random fleets."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.spec import KVDtype, KVSpec, WeightFormat
from baton.service.settings import PlacementPolicy
from baton.types import Role, WorkerId, WorkerInfo
from router.placement import (
    FleetView,
    NoWorker,
    Placement,
    PlaceRequest,
    Policy,
    Resident,
    WorkerView,
    longest_tokens,
)
from router.policies import PrefixAware, RoundRobin, policy_of

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


LONG = PlaceRequest(num_tokens=500)
P1, P2, D1, D2 = prefill("p1"), prefill("p2"), decode("d1"), decode("d2")


@pytest.mark.parametrize(
    ("why", "fleet", "expected"),
    [
        ("one of each", FleetView((P1,), (D1,)), ("p1", "d1")),
        (
            "the prefill worker with the shorter queue",
            FleetView((replace(P1, queued_prefill_tokens=600), P2), (D1,)),
            ("p2", "d1"),
        ),
        (
            "the faster prefill worker, though its queue is longer",
            FleetView(
                (
                    replace(P1, queued_prefill_tokens=900, prefill_tokens_per_s=20_000.0),
                    replace(P2, queued_prefill_tokens=600, prefill_tokens_per_s=5_000.0),
                ),
                (D1,),
            ),
            ("p1", "d1"),
        ),
        (
            "the prefill worker whose queue will have gone down",
            FleetView(
                (
                    replace(P1, queued_prefill_tokens=9000, prefill_tokens_per_s=10_000.0),
                    replace(P2, queued_prefill_tokens=600, prefill_tokens_per_s=100.0),
                ),
                (D1,),
                now_s=1.0,
            ),
            ("p1", "d1"),
        ),
        (
            "the decode worker with blocks that hold nothing, between equals",
            FleetView((P1,), (replace(D1, free_blocks=0, reclaimable_blocks=256), D2)),
            ("p1", "d2"),
        ),
        (
            "the prefill worker that holds the prefix, though its queue is longer",
            FleetView((replace(P1, queued_prefill_tokens=300), P2), (D1,), {WorkerId("p1"): 480}),
            ("p1", "d1"),
        ),
        (
            "not the one that holds the prefix once its queue is longer than what it saves",
            FleetView((replace(P1, queued_prefill_tokens=1500), P2), (D1,), {WorkerId("p1"): 480}),
            ("p2", "d1"),
        ),
        (
            "the decode worker with fewer requests",
            FleetView((P1,), (replace(D1, requests=5), replace(D2, requests=2))),
            ("p1", "d2"),
        ),
        (
            "the decode worker with blocks, though it has more requests",
            FleetView((P1,), (replace(D1, free_blocks=4), replace(D2, requests=3))),
            ("p1", "d2"),
        ),
        (
            "the decode worker that holds the prefix, as nothing need be shipped",
            FleetView((P1,), (D1, D2), {WorkerId("d2"): 320}),
            ("p1", "d2"),
        ),
        (
            "a pair on one node",
            FleetView((prefill("p1", node="x"), prefill("p2", node="y")), (decode("d", node="y"),)),
            ("p2", "d"),
        ),
        (
            "a distant prefill worker where the near one is swamped",
            FleetView(
                (
                    prefill("p1", node="x"),
                    replace(prefill("p2", node="y"), queued_prefill_tokens=5000),
                ),
                (decode("d", node="y"),),
            ),
            ("p1", "d"),
        ),
        (
            "no draining worker",
            FleetView((replace(P1, draining=True), P2), (D1, replace(D2, draining=True))),
            ("p2", "d1"),
        ),
        (
            "no worker under suspicion while there is another",
            FleetView(
                (replace(P1, suspect=True), replace(P2, queued_prefill_tokens=900)),
                (replace(D1, requests=9), replace(D2, suspect=True)),
            ),
            ("p2", "d1"),
        ),
        (
            "a decode worker under suspicion where there is no other",
            FleetView((P1,), (replace(D1, suspect=True),)),
            ("p1", "d1"),
        ),
        (
            "decode alone where no prefill worker has joined",
            FleetView((), (D1,)),
            (None, "d1"),
        ),
        (
            "decode alone where the only prefill worker is under suspicion",
            FleetView((replace(P1, suspect=True),), (D1,)),
            (None, "d1"),
        ),
        (
            "decode alone where it lacks little",
            FleetView((P1,), (D1,), {WorkerId("d1"): 480}),
            (None, "d1"),
        ),
        (
            "only a prefill worker of decode's KV digest",
            FleetView((prefill("p1", spec=OTHER), replace(P2, queued_prefill_tokens=900)), (D1,)),
            ("p2", "d1"),
        ),
        (
            "decode alone where every prefill worker has another digest",
            FleetView((prefill("p1", spec=OTHER),), (D1,)),
            (None, "d1"),
        ),
    ],
)
def test_the_default_policy_takes(
    why: str, fleet: FleetView, expected: tuple[str | None, str]
) -> None:
    assert ids(PrefixAware().place(fleet, LONG)) == expected, why


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_that_failed_the_request_is_used_again_only_if_there_is_nobody_else(
    policy: Policy,
) -> None:
    request = replace(LONG, avoid=frozenset({WorkerId("d1"), WorkerId("p1")}))
    assert ids(policy.place(FleetView((P1, P2), (D1, D2)), request)) == ("p2", "d2")
    assert ids(policy.place(FleetView((P1, P2), (D1,)), request)) == ("p2", "d1")
    assert ids(policy.place(FleetView((P1,), (D1, D2)), request)) == (None, "d2")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("fleet", "digest", "reason"),
    [
        (FleetView((P1,), ()), None, "no decode worker has joined"),
        (FleetView((P1,), (replace(D1, draining=True),)), None, "every decode worker is draining"),
        (
            FleetView((P1,), (D1,)),
            OTHER.digest,
            "no decode worker has the KV digest that the request began with",
        ),
    ],
)
def test_where_nobody_can_decode_the_reason_is_told(
    policy: Policy, fleet: FleetView, digest: str | None, reason: str
) -> None:
    assert policy.place(fleet, replace(LONG, digest=digest)) == NoWorker(reason)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_with_tokens_stays_with_the_digest_that_made_them(policy: Policy) -> None:
    fleet = FleetView((P1, prefill("p9", spec=OTHER)), (D1, decode("d9", spec=OTHER)))
    for turn in range(4):
        request = replace(LONG, digest=OTHER.digest, turn=turn)
        assert ids(policy.place(fleet, request)) == ("p9", "d9")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_whose_pool_is_too_small_is_left_out_while_another_fits(policy: Policy) -> None:
    small = view_of(replace(D1.info, num_blocks=8))
    for turn in range(4):
        request = replace(LONG, turn=turn)
        assert ids(policy.place(FleetView((), (small, D2)), request)) == (None, "d2")
    assert ids(policy.place(FleetView((), (small,)), LONG)) == (None, "d1")


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_workers_take_turns(policy: Policy) -> None:
    decodes = tuple(decode(f"d{i}") for i in range(3))
    fleet = FleetView((P1, P2), decodes)
    placed = [ids(policy.place(fleet, replace(LONG, turn=turn))) for turn in range(12)]
    assert {d for _, d in placed} == {"d0", "d1", "d2"}
    assert {p for p, _ in placed} == {"p1", "p2"}


def test_round_robin_goes_through_the_workers_whatever_their_load() -> None:
    fleet = FleetView((P1,), (replace(D1, requests=99), D2))
    placed = [ids(RoundRobin().place(fleet, replace(LONG, turn=turn)))[1] for turn in range(4)]
    assert placed == ["d1", "d2", "d1", "d2"]


def test_a_limit_of_zero_never_computes_at_decode_while_a_prefill_worker_is_there() -> None:
    fleet = FleetView((P1,), (D1,))
    assert ids(PrefixAware(local_prefill_tokens=0).place(fleet, PlaceRequest(num_tokens=1))) == (
        "p1",
        "d1",
    )


def test_a_sessions_last_decode_worker_breaks_ties_and_no_more() -> None:
    fleet = FleetView((P1,), (D1, D2))
    for turn in range(4):
        request = replace(LONG, turn=turn, last_decode=WorkerId("d2"))
        assert ids(PrefixAware().place(fleet, request)) == ("p1", "d2")
        busy = FleetView((P1,), (D1, replace(D2, requests=1)))
        assert ids(PrefixAware().place(busy, request)) == ("p1", "d1")


def test_the_first_token_is_predicted_from_queue_speed_and_prefix() -> None:
    """(queued - computed since + lacking) / speed; unknown while nobody has measured a speed."""
    worker = replace(P1, queued_prefill_tokens=300, as_of_s=1.0, prefill_tokens_per_s=1000.0)
    fleet = FleetView((worker,), (D1,), {WorkerId("p1"): 400, WorkerId("d1"): 160}, now_s=1.1)
    placed = PrefixAware().place(fleet, LONG)
    assert isinstance(placed, Placement)
    assert placed.predicted_ttft_s == pytest.approx((300 - 100 + 100) / 1000)
    assert (placed.prefill_cached_tokens, placed.skip_tokens) == (400, 160)
    unknown = PrefixAware().place(FleetView((P1,), (D1,)), LONG)
    assert isinstance(unknown, Placement)
    assert unknown.predicted_ttft_s is None


def test_round_robin_and_least_loaded_do_not_see_prefixes() -> None:
    """The baselines are what they say."""
    fleet = FleetView((P1, replace(P2, queued_prefill_tokens=1)), (D1,), {WorkerId("p2"): 480})
    least = policy_of(PlacementPolicy.LEAST_LOADED, local_prefill_tokens=32)
    assert {ids(least.place(fleet, replace(LONG, turn=turn))) for turn in range(4)} == {
        ("p1", "d1")
    }
    around = [ids(RoundRobin().place(fleet, replace(LONG, turn=turn)))[0] for turn in range(4)]
    assert around == ["p1", "p2", "p1", "p2"]


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


def test_kv_that_was_left_a_moment_ago_counts_as_held() -> None:
    """In whole blocks, on that decode worker alone, and never less than what it reported."""
    fleet = FleetView((P1,), (D1, D2), {WorkerId("d2"): 496})
    knowing = fleet.knowing(Resident(WorkerId("d1"), 495))
    assert knowing.cached == {"d1": 480, "d2": 496}
    assert fleet.knowing(Resident(WorkerId("d2"), 30)) == fleet
    assert fleet.knowing(Resident(WorkerId("gone"), 495)) == fleet
    assert ids(PrefixAware().place(replace(knowing, decode=(D1,)), LONG)) == (None, "d1")


INT8_ANSWERS = replace(info("d8", Role.DECODE), weights=WeightFormat.INT8)
IMPORTS = replace(view_of(INT8_ANSWERS), computes_prompts=False)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
class TestAnotherFormatThanPrompts:
    """A decode worker that computes no prompts."""

    def test_gets_a_prefill_worker_for_the_shortest_prompt(self, policy: Policy) -> None:
        assert not INT8_ANSWERS.computes_prompts
        short = PlaceRequest(num_tokens=3)
        assert ids(policy.place(FleetView((P1,), (IMPORTS,)), short)) == ("p1", "d8")
        assert ids(policy.place(FleetView((P1,), (D1,)), short)) == (None, "d1")

    def test_gets_a_troubled_prefill_worker_rather_than_none(self, policy: Policy) -> None:
        view = FleetView((replace(P1, suspect=True),), (IMPORTS,))
        assert ids(policy.place(view, LONG)) == ("p1", "d8")

    def test_gets_nothing_without_a_prefill_worker(self, policy: Policy) -> None:
        assert isinstance(policy.place(FleetView((), (IMPORTS,)), LONG), NoWorker)
        draining = FleetView((replace(P1, draining=True),), (IMPORTS,))
        assert isinstance(policy.place(draining, LONG), NoWorker)
        assert ids(policy.place(FleetView((), (IMPORTS, D1)), LONG)) == (None, "d1")

    def test_gets_a_request_that_moves_without_a_prefill_worker(self, policy: Policy) -> None:
        moving = replace(LONG, moves=True, weights=WeightFormat.INT8)
        placement = policy.place(FleetView((), (D1, IMPORTS)), moving)
        assert ids(placement)[1] == "d8"

    def test_goes_on_with_what_its_format_began_and_with_nothing_else(self, policy: Policy) -> None:
        begun = replace(LONG, digest=INT8_ANSWERS.spec.digest, weights=WeightFormat.INT8)
        view = FleetView((P1,), (D1, D2, IMPORTS))
        assert ids(policy.place(view, begun))[1] == "d8"
        assert isinstance(policy.place(FleetView((P1,), (D1, D2)), begun), NoWorker)
        of_others = replace(begun, weights=D1.info.weight_format)
        assert ids(policy.place(view, of_others))[1] in {"d1", "d2"}
        assert isinstance(policy.place(FleetView((P1,), (IMPORTS,)), of_others), NoWorker)
