"""Placement decides as its docstring promises, on tables; `test_placement_promises` has random fleets."""

from dataclasses import replace

import pytest

from baton.kv.spec import WeightFormat
from baton.service.settings import PlacementPolicy
from baton.types import Role, WorkerId
from router.placement import (
    FleetView,
    NoWorker,
    Placement,
    PlaceRequest,
    Policy,
    Resident,
)
from router.policies import PrefixAware, RoundRobin, policy_of
from tests.unit.placement_views import OTHER, POLICIES, decode, ids, info, prefill, view_of

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
