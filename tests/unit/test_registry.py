"""The registry's books: membership, reports, prefix caches, claims, suspicion."""

from dataclasses import replace

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.kv.prefix import block_hashes
from baton.kv.spec import KVDtype, KVSpec
from baton.types import BlockHash, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.placement import WorkerView
from router.prefix_index import PrefixIndex
from router.registry import Claim, Registry

SPEC = KVSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    dtype=KVDtype.FLOAT32,
    position_scheme="rope",
    model_fingerprint="a",
)
NOTHING = PrefixDelta()


def info(worker_id: str, role: Role = Role.DECODE, *, block_size: int = 4) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(worker_id),
        role=role,
        address="localhost:1",
        transfer_address=worker_id,
        model="m",
        spec=SPEC,
        vocab_size=256,
        max_context_tokens=4096,
        eos_token_ids=(0,),
        block_size_tokens=block_size,
        num_blocks=64,
        node="n",
        pid=1,
        device="cpu",
        version="0",
    )


def only_decode(registry: Registry, now_s: float = 0.0) -> WorkerView:
    (worker,) = registry.view({}, now_s).decode
    return worker


def claim(worker_id: str = "d", *, sent_at_s: float | None = None) -> Claim:
    return Claim(worker_id=WorkerId(worker_id), prefill_tokens=100, blocks=7, sent_at_s=sent_at_s)


def test_a_worker_counts_as_idle_from_its_announcement() -> None:
    registry = Registry()
    registry.join(info("d"), 0.0)
    worker = only_decode(registry)
    assert (worker.requests, worker.queued_prefill_tokens, worker.free_blocks) == (0, 0, 64)


def test_a_heartbeat_replaces_the_load_and_the_draining_flag() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    load = WorkerLoad(
        running_requests=2,
        waiting_requests=1,
        queued_prefill_tokens=9,
        free_blocks=5,
        cached_blocks=3,
    )
    assert registry.heartbeat(WorkerId("d"), session, load, NOTHING, draining=True, now_s=0.5)
    worker = only_decode(registry)
    assert (worker.requests, worker.queued_prefill_tokens) == (3, 9)
    assert (worker.free_blocks, worker.reclaimable_blocks) == (5, 3)
    assert worker.draining


def test_what_an_older_session_still_says_is_ignored() -> None:
    registry = Registry()
    old = registry.join(info("d"), 0.0)
    new = registry.join(info("d"), 1.0)
    load = WorkerLoad(running_requests=9)
    assert not registry.heartbeat(WorkerId("d"), old, load, NOTHING, draining=True, now_s=2.0)
    assert not registry.leave(WorkerId("d"), old)
    assert only_decode(registry).requests == 0
    assert registry.leave(WorkerId("d"), new)
    assert not registry.leave(WorkerId("d"), new)
    assert registry.infos() == ()


def test_cached_tokens_are_the_leading_blocks_that_the_worker_holds() -> None:
    registry = Registry()
    session = registry.join(info("d", block_size=4), 0.0)
    tokens = list(range(18))
    hashes = block_hashes(tokens, 4)

    def beat(delta: PrefixDelta) -> int:
        registry.heartbeat(WorkerId("d"), session, WorkerLoad(), delta, draining=False, now_s=1.0)
        return registry.view({4: hashes}, 1.0).cached.get(WorkerId("d"), 0)

    assert beat(PrefixDelta(stored=(hashes[0], hashes[1]))) == 8
    assert beat(PrefixDelta(stored=(hashes[2], hashes[3]))) == 16
    assert beat(PrefixDelta(evicted=(hashes[3], hashes[2], hashes[1]))) == 4
    assert beat(PrefixDelta(evicted=(hashes[0],))) == 0


def test_hashes_are_looked_up_by_each_workers_block_size() -> None:
    registry = Registry()
    tokens = list(range(16))
    for worker_id, size in (("d4", 4), ("d8", 8)):
        session = registry.join(info(worker_id, block_size=size), 0.0)
        stored = PrefixDelta(stored=tuple(block_hashes(tokens[:8], size)))
        registry.heartbeat(
            WorkerId(worker_id), session, WorkerLoad(), stored, draining=False, now_s=1.0
        )
    assert registry.block_sizes() == {4, 8}
    view = registry.view({size: block_hashes(tokens, size) for size in (4, 8)}, 1.0)
    assert view.cached == {"d4": 8, "d8": 8}


def test_a_claim_weighs_at_once_and_its_release_takes_it_off() -> None:
    registry = Registry()
    registry.join(info("d"), 0.0)
    held = claim()
    registry.claim(held)
    worker = only_decode(registry)
    assert (worker.requests, worker.queued_prefill_tokens, worker.free_blocks) == (1, 100, 57)
    registry.release(held)
    registry.release(held)
    assert only_decode(registry).requests == 0
    assert registry.claimed_tokens() == 0


def test_a_claim_gives_way_to_a_heartbeat_that_must_include_it() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)

    def beat(now_s: float) -> int:
        registry.heartbeat(
            WorkerId("d"), session, WorkerLoad(), NOTHING, draining=False, now_s=now_s
        )
        return only_decode(registry).requests

    registry.claim(claim(sent_at_s=0.2))
    assert beat(0.5) == 1, "this report may have left before the call came"
    assert beat(1.0) == 0


def test_a_claim_that_is_not_sent_yet_outlasts_every_heartbeat() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    registry.claim(claim(sent_at_s=None))
    for now_s in (0.5, 1.0, 1.5):
        registry.heartbeat(
            WorkerId("d"), session, WorkerLoad(), NOTHING, draining=False, now_s=now_s
        )
    assert only_decode(registry).requests == 1


def test_a_claim_on_a_worker_that_left_is_nothing() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    held = claim()
    registry.claim(held)
    registry.leave(WorkerId("d"), session)
    registry.join(info("d"), 1.0)
    registry.claim(claim("gone"))
    registry.release(held)
    assert only_decode(registry).requests == 0


def test_suspicion_ends_with_the_second_later_heartbeat() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    registry.suspect(WorkerId("d"), 0.2)
    for now_s, suspect in ((0.5, True), (1.0, False)):
        registry.heartbeat(
            WorkerId("d"), session, WorkerLoad(), NOTHING, draining=False, now_s=now_s
        )
        assert only_decode(registry, now_s).suspect is suspect


def test_suspicion_ends_with_time() -> None:
    registry = Registry(suspicion_s=3.0)
    registry.join(info("d"), 0.0)
    registry.suspect(WorkerId("d"), 1.0)
    registry.suspect(WorkerId("unknown"), 1.0)
    assert only_decode(registry, 3.9).suspect
    assert not only_decode(registry, 4.0).suspect


def test_a_view_does_not_change_with_the_registry() -> None:
    registry = Registry()
    registry.join(info("p", Role.PREFILL), 0.0)
    view = registry.view({}, 0.0)
    registry.claim(claim("p"))
    registry.join(info("d"), 0.0)
    assert [w.requests for w in view.prefill] == [0]
    assert view.decode == ()


def test_a_queue_shrinks_by_the_workers_speed_and_grows_by_each_claim() -> None:
    """Between two heartbeats, a view tells what the worker still has to compute at any instant."""
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    load = WorkerLoad(queued_prefill_tokens=500, prefill_tokens_per_s=1000.0)
    registry.heartbeat(WorkerId("d"), session, load, NOTHING, draining=False, now_s=1.0)
    assert [only_decode(registry).queued_at(now_s) for now_s in (1.0, 1.25, 2.0)] == [500, 250, 0]
    registry.claim(replace(claim(), made_at_s=2.0))
    assert [only_decode(registry).queued_at(now_s) for now_s in (2.0, 2.25)] == [100, 0]


def test_claimed_blocks_are_taken_from_the_free_ones_first() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    load = WorkerLoad(free_blocks=10, cached_blocks=5)
    registry.heartbeat(WorkerId("d"), session, load, NOTHING, draining=False, now_s=1.0)
    found = []
    for _ in range(3):
        registry.claim(claim())
        worker = only_decode(registry)
        found.append((worker.free_blocks, worker.reclaimable_blocks))
    assert found == [(3, 5), (0, 1), (0, 0)]


def test_a_worker_that_has_measured_nothing_counts_as_typical() -> None:
    """Of its role, or of the fleet; where nobody has measured anything, nothing is known."""
    registry = Registry()
    names = (("d", Role.DECODE), ("new", Role.DECODE), ("p", Role.PREFILL))
    sessions = {name: registry.join(info(name, role), 0.0) for name, role in names}
    assert {w.prefill_tokens_per_s for w in registry.view({}, 0.0).decode} == {0.0}

    def measured(name: str, tokens_per_s: float, step_s: float) -> None:
        load = WorkerLoad(prefill_tokens_per_s=tokens_per_s, decode_step_s=step_s)
        key = WorkerId(name)
        registry.heartbeat(key, sessions[name], load, NOTHING, draining=False, now_s=1.0)

    measured("p", 800.0, 0.0)
    measured("d", 0.0, 0.02)
    measured("new", 0.0, 0.0)
    view = registry.view({}, 1.0)
    assert [w.prefill_tokens_per_s for w in (*view.decode, *view.prefill)] == [800.0] * 3
    assert [w.decode_step_s for w in view.decode] == [0.02, 0.02]
    measured("d", 300.0, 0.02)
    measured("new", 0.0, 0.0)
    assert [w.prefill_tokens_per_s for w in registry.view({}, 1.0).decode] == [300.0, 300.0]


@hypothesis_settings(deadline=None)
@given(st.data())
def test_the_index_finds_what_a_search_of_every_cache_would_find(data: st.DataObject) -> None:
    """Whatever is stored, evicted, joins and leaves, in whatever order. Two sequences share their first three blocks."""
    one = [BlockHash(n) for n in range(10)]
    sequences = [one, one[:3] + [BlockHash(100 + n) for n in range(6)]]
    index, caches = PrefixIndex(4), dict[WorkerId, set[BlockHash]]()
    for _ in range(data.draw(st.integers(1, 30))):
        worker_id = WorkerId(data.draw(st.sampled_from("abcd")))
        if worker_id not in caches:
            index.add(worker_id)
            caches[worker_id] = set()
        elif data.draw(st.integers(0, 4)) == 0:
            index.remove(worker_id)
            del caches[worker_id]
        else:
            kept = set[BlockHash]()
            for sequence in sequences:
                kept.update(sequence[: data.draw(st.integers(0, len(sequence)))])
            before, caches[worker_id] = caches[worker_id], kept
            delta = PrefixDelta(stored=tuple(kept - before), evicted=tuple(before - kept))
            index.update(worker_id, delta)
        index.check_integrity()
        for sequence in [*sequences, []]:
            depths = {
                worker: next((i for i, h in enumerate(sequence) if h not in cache), len(sequence))
                for worker, cache in caches.items()
            }
            assert index.cached_tokens(sequence) == {w: 4 * d for w, d in depths.items() if d}


class RegistryMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the books balance, and without claims nothing is claimed."""

    names = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.now_s = 0.0
        self.sessions: dict[str, int] = {}
        self.claims: list[Claim] = []

    @rule(name=names)
    def join(self, name: str) -> None:
        self.sessions[name] = self.registry.join(info(name), self.now_s)

    @rule(name=names)
    def leave(self, name: str) -> None:
        session = self.sessions.pop(name, 0)
        assert self.registry.leave(WorkerId(name), session) == (session > 0)

    @rule(name=names, draining=st.booleans())
    def heartbeat(self, name: str, draining: bool) -> None:  # noqa: FBT001
        self.now_s += 0.5
        session = self.sessions.get(name, 0)
        known = self.registry.heartbeat(
            WorkerId(name), session, WorkerLoad(), NOTHING, draining=draining, now_s=self.now_s
        )
        assert known == (session > 0)

    @rule(name=names, sent=st.booleans())
    def claim(self, name: str, sent: bool) -> None:  # noqa: FBT001
        held = claim(name, sent_at_s=self.now_s if sent else None)
        self.registry.claim(held)
        self.claims.append(held)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.claims:
            self.registry.release(self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1))))

    @rule()
    def look(self) -> None:
        view = self.registry.view({}, self.now_s)
        assert {w.info.worker_id for w in view.decode} == set(self.sessions)
        for worker in view.decode:
            mine = [c for c in self.claims if c.worker_id == worker.info.worker_id]
            assert worker.requests <= len(mine)

    @rule(name=names)
    def suspect(self, name: str) -> None:
        self.registry.suspect(WorkerId(name), self.now_s)

    @invariant()
    def books_balance(self) -> None:
        self.registry.check_integrity()
        assert {i.worker_id for i in self.registry.infos()} == set(self.sessions)
        most = sum(c.prefill_tokens + c.blocks for c in self.claims)
        assert 0 <= self.registry.claimed_tokens() <= most

    def teardown(self) -> None:
        for held in self.claims:
            self.registry.release(held)
        assert self.registry.claimed_tokens() == 0


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = hypothesis_settings(max_examples=40, stateful_step_count=30)


def test_a_silent_worker_is_avoided_until_it_is_heard() -> None:
    registry = Registry(silence_s=1.0)
    session = registry.join(info("d"), 0.0)
    other = registry.join(info("p", Role.PREFILL), 0.0)
    for now_s, silent in ((0.9, False), (1.0, True)):
        registry.heartbeat(WorkerId("p"), other, WorkerLoad(), NOTHING, draining=False, now_s=now_s)
        assert only_decode(registry, now_s).suspect == silent
        registry.check_integrity()
    registry.heartbeat(WorkerId("d"), session, WorkerLoad(), NOTHING, draining=False, now_s=5.0)
    assert not only_decode(registry, 5.9).suspect


def test_a_router_that_did_not_listen_takes_nobody_for_silent() -> None:
    registry = Registry(silence_s=1.0)
    registry.join(info("d"), 0.0)
    registry.join(info("p", Role.PREFILL), 0.5)
    view = registry.view({}, 60.0)
    assert not any(worker.suspect for worker in (*view.prefill, *view.decode))


def test_a_change_of_role_keeps_load_cache_and_claims() -> None:
    registry = Registry()
    session = registry.join(info("d"), 0.0)
    hashes = {4: block_hashes(tuple(range(8)), 4)}
    stored = PrefixDelta(stored=tuple(hashes[4]))
    load = WorkerLoad(free_blocks=60, running_requests=1)
    registry.heartbeat(WorkerId("d"), session, load, stored, draining=False, now_s=0.5)
    registry.claim(claim())
    assert registry.change_role(WorkerId("d"), session, Role.PREFILL)
    assert not registry.change_role(WorkerId("d"), session - 1, Role.DECODE)
    view = registry.view(hashes, 0.6)
    assert view.decode == ()
    (worker,) = view.prefill
    assert (worker.requests, worker.info.role) == (2, Role.PREFILL)
    assert view.cached == {"d": 8}
    registry.check_integrity()


def test_autoscaling_sees_what_prefill_was_sent_and_what_decode_computes() -> None:
    """A request that waits for another phase is no sign that this one lacks workers."""
    registry = Registry()
    registry.join(info("p", Role.PREFILL), 0.0)
    session = registry.join(info("d"), 0.0)
    to_prefill, to_decode = claim("p"), claim("d")
    for each in (to_prefill, to_decode):
        registry.claim(each)
    assert [w.queued_prefill_tokens for w in registry.sample(0.0).workers] == [0, 0]
    registry.sent(to_prefill, 0.1)
    registry.sent(to_decode, 0.1)
    load = WorkerLoad(running_requests=6, waiting_requests=2, used_blocks=16, reserved_blocks=48)
    registry.heartbeat(WorkerId("d"), session, load, NOTHING, draining=False, now_s=0.5)
    sample = registry.sample(0.5)
    prefill, decode = sample.workers
    assert (prefill.queued_prefill_tokens, sample.sent_prefill_tokens) == (100, 100)
    assert (decode.requests, decode.used_share) == (2.0, 0.25)
