"""A short soak, and what decides which faults it has; `make soak` runs a long one."""

import random
from itertools import combinations_with_replacement

import pytest

from baton.transfer.ray_runtime import RayCluster
from tests.faults.soak import soak
from tests.faults.soak_plan import Kind, Lasted, Plan, Target, may_strand, pair_of, pairs_among

KINDS = tuple(
    Kind(f"{name} {target.value}", target) for name in ("one", "two") for target in Target
)


@pytest.mark.e2e
@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_each_fault_beside_another_leaves_nothing_behind(ray_cluster: RayCluster) -> None:
    """Promise: whichever two faults come together, under steady load: no hang, no failed request, no wrong token, and no block, file
    descriptor, task or thread left behind. Each kind comes once, in another order each time.
    """
    seed = random.SystemRandom().randrange(10**6)
    again = f"the same faults: python -m tests.faults.soak --once --seed {seed}"
    print(again)  # noqa: T201 - shown where the test fails
    try:
        report = await soak(ray_cluster, seconds=None, seed=seed)
    except Exception as error:
        error.add_note(again)
        raise
    assert report.requests > 50
    assert all(row.times == 1 for row in report.rows.values())
    assert report.pairs
    print(report.table())  # noqa: T201


def test_once_has_each_kind_once() -> None:
    """Promise: in an order that the seed decides."""
    orders = []
    for seed in (1, 1, 2):
        plan = Plan(KINDS, random.Random(seed), once=True)
        order: list[Kind] = []
        while not plan.is_done:
            assert not plan.draw_alone()
            order.append(plan.draw(order[-1] if order else None))
        assert sorted(order, key=KINDS.index) == list(KINDS)
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]


def test_covering_has_every_pair() -> None:
    """Promise: those that were least often come first, so that each pair comes to be, and no kind is forgotten."""
    plan, rng = Plan(KINDS, random.Random(3), once=False), random.Random(4)
    met = set()
    for _ in range(2 * len(KINDS) ** 2):
        lasting = rng.choice(KINDS)
        met.add(pair_of(lasting.name, plan.draw(lasting).name))
    assert met == {pair_of(a.name, b.name) for a, b in combinations_with_replacement(KINDS, 2)}


@pytest.mark.parametrize(
    ("targets", "strands"),
    [
        ((Target.DECODE,), False),
        ((Target.DECODE, Target.PREFILL), False),
        ((Target.DECODE, Target.DECODE), True),
        ((Target.ROUTER, Target.ROUTER), True),
        ((Target.CLIENT, Target.CLIENT), False),
    ],
)
def test_two_faults_of_one_kind_of_process_may_strand(
    targets: tuple[Target, ...], *, strands: bool
) -> None:
    """Promise: what may leave nobody to serve is told from what cannot."""
    assert may_strand([Kind("fault", target) for target in targets]) is strands


def test_pairs_are_those_that_lasted_at_one_time() -> None:
    """Promise: faults that follow one another are no pair."""
    faults = [Lasted("b", 0, 2), Lasted("a", 1, 3), Lasted("c", 3, 4)]
    assert pairs_among(faults) == {("a", "b"): 1}
