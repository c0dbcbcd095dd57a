"""The engine over the simulated runner, whose tokens are wrong as soon as one KV entry is lost, stale or misplaced."""

import itertools
import math
import random
from collections.abc import Sequence as Rows
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.base import (
    EngineEvent,
    EngineRequest,
    Exported,
    Failed,
    Mode,
    Preempted,
    Progress,
    Reserved,
    Started,
    Token,
)
from baton.engine.batch import BatchRow, Sampled
from baton.engine.engine import PagedEngine
from baton.engine.sim import SimConfig, SimRunner, build_sim_engine
from baton.errors import (
    AlreadyExistsError,
    CorruptKVError,
    InternalError,
    InvalidRequestError,
    PreconditionError,
)
from baton.kv.spec import SealedKV
from baton.types import AttemptKey, FinishReason, RequestId, SamplingParams, Sequence

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
BIG = SimConfig(num_blocks=512)


def key(name: str = "r", attempt: int = 0) -> AttemptKey:
    return AttemptKey(RequestId(name), attempt)


def request(
    prompt: list[int],
    *,
    name: str = "r",
    mode: Mode = Mode.LOCAL,
    generated: tuple[int, ...] = (),
    params: SamplingParams = GREEDY,
) -> EngineRequest:
    return EngineRequest(key(name), Sequence(tuple(prompt), generated, params), mode)


def run(engine: PagedEngine) -> list[EngineEvent]:
    """Steps until there is no work, checking the books after every step."""
    events: list[EngineEvent] = []
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    return events


def tokens_of(events: list[EngineEvent], name: str = "r") -> list[int]:
    tokens = [e for e in events if isinstance(e, Token) and e.key.request_id == name]
    assert [t.index for t in tokens] == list(range(tokens[0].index, tokens[0].index + len(tokens)))
    return [t.token_id for t in tokens]


def reference(
    prompt: list[int], params: SamplingParams = GREEDY, generated: tuple[int, ...] = ()
) -> list[int]:
    """What an undisturbed engine says, alone, with everything in one chunk and no prefix cache."""
    engine = build_sim_engine(replace(BIG, prefix_cache=False, max_batch_tokens=10_000))
    engine.add(request(prompt, params=params, generated=generated))
    return tokens_of(run(engine))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def hand_over(prefill: PagedEngine, decode: PagedEngine, req: EngineRequest, pieces: int) -> int:
    """One handoff, as the workers do it; returns the first token."""
    decode.add(replace(req, mode=Mode.DECODE))
    reserved = next(e for _ in range(9) for e in decode.step() if isinstance(e, Reserved))
    return deliver(prefill, decode, req, reserved, pieces)


def deliver(
    prefill: PagedEngine,
    decode: PagedEngine,
    req: EngineRequest,
    reserved: Reserved,
    pieces: int = 1,
) -> int:
    """The handoff of what was reserved; returns the first token."""
    prefill.add(replace(req, mode=Mode.PREFILL))
    first = [e for e in run(prefill) if isinstance(e, Token)][-1]
    length = len(req.sequence)
    cuts = sorted(
        {
            reserved.cached_tokens,
            length,
            *range(reserved.cached_tokens, length, max(1, length // pieces)),
        }
    )
    for start, end in itertools.pairwise(cuts):
        decode.import_kv(req.key, start, prefill.export_kv(req.key, start, end))
        decode.check_integrity()
    decode.start_decode(req.key, first.token_id)
    assert prefill.release(req.key)
    prefill.check_integrity()
    return first.token_id


def test_events_come_in_order_and_the_request_is_gone_at_the_end() -> None:
    engine = build_sim_engine(replace(BIG, max_batch_tokens=16))
    engine.add(request(prompt_of(40)))
    events = run(engine)
    assert events[0] == Started(key(), 0)
    assert events[1:3] == [Progress(key(), 16), Progress(key(), 32)]
    last = events[-1]
    assert isinstance(last, Token)
    assert (last.index, last.finish) == (23, FinishReason.LENGTH)
    assert not engine.release(key())
    load = engine.load()
    assert load.free_blocks + load.cached_blocks == BIG.num_blocks


@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("chunk", [8, 64, 512])
def test_tokens_depend_on_neither_block_size_nor_chunk_size_nor_batch(
    block_size: int, chunk: int
) -> None:
    engine = build_sim_engine(replace(BIG, block_size_tokens=block_size, max_batch_tokens=chunk))
    prompts = {f"r{n}": prompt_of(n, seed=n) for n in (1, 3, 17, 64, 65, 200)}
    for name, prompt in prompts.items():
        engine.add(request(prompt, name=name))
    events = run(engine)
    for name, prompt in prompts.items():
        assert tokens_of(events, name) == reference(prompt)


def test_a_prefix_hit_skips_computing_and_changes_nothing() -> None:
    engine = build_sim_engine(BIG)
    prompt = prompt_of(100)
    engine.add(request(prompt, name="a"))
    run(engine)
    engine.add(request(prompt, name="b"))
    events = run(engine)
    assert events[0] == Started(key("b"), 96)
    assert tokens_of(events, "b") == reference(prompt)


def test_a_salt_hides_a_prefix_from_other_salts_and_changes_no_token() -> None:
    """Promise: not one block is shared between two salts, and the same salt finds its own."""
    engine = build_sim_engine(BIG)
    prompt = prompt_of(100)
    hits = []
    for index, salt in enumerate(["", "acme/", "rival/", "acme/x", "acme/", ""]):
        plain = request(prompt, name=f"r{index}")
        engine.add(replace(plain, sequence=replace(plain.sequence, cache_salt=salt)))
        events = run(engine)
        assert isinstance(events[0], Started)
        hits.append(events[0].cached_tokens)
        assert tokens_of(events, f"r{index}") == reference(prompt)
    assert hits == [0, 0, 0, 0, 96, 96]


def test_preempted_requests_say_the_same_tokens() -> None:
    config = replace(BIG, num_blocks=16, block_size_tokens=4)
    engine = build_sim_engine(config)
    prompts = {f"r{n}": prompt_of(10, seed=n) for n in range(5)}
    for name, prompt in prompts.items():
        engine.add(request(prompt, name=name))
    events = run(engine)
    assert any(isinstance(e, Preempted) for e in events), "the pool is too small for all five"
    for name, prompt in prompts.items():
        assert tokens_of(events, name) == reference(prompt)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("decode_block_size", [4, 16, 64])
def test_the_split_says_what_one_engine_says(pieces: int, decode_block_size: int) -> None:
    prefill = build_sim_engine(BIG)
    decode = build_sim_engine(replace(BIG, block_size_tokens=decode_block_size))
    prompt = prompt_of(150)
    first = hand_over(prefill, decode, request(prompt), pieces)
    assert [first, *tokens_of(run(decode))] == reference(prompt)
    assert prefill.load().in_flight_blocks == 0


def test_decode_needs_only_the_blocks_that_its_cache_lacks() -> None:
    prefill, decode = build_sim_engine(BIG), build_sim_engine(BIG)
    prompt = prompt_of(100)
    hand_over(prefill, decode, request(prompt), 1)
    run(decode)
    longer = prompt + prompt_of(30, seed=9)
    decode.add(request(longer, name="b", mode=Mode.DECODE))
    assert decode.step() == (Reserved(key("b"), 96),)
    decode.release(key("b"))
    decode.check_integrity()
    first = hand_over(prefill, decode, request(longer, name="c"), 1)
    assert [first, *tokens_of(run(decode), "c")] == reference(longer)


def test_a_new_attempt_continues_where_the_last_one_stopped() -> None:
    prompt = prompt_of(50)
    params = replace(GREEDY, temperature=1.0, seed=7)
    whole = reference(prompt, params)
    for sent in range(1, len(whole)):
        engine = build_sim_engine(BIG)
        engine.add(request(prompt, generated=tuple(whole[:sent]), params=params))
        events = run(engine)
        assert next(e for e in events if isinstance(e, Token)).index == sent
        assert tokens_of(events) == whole[sent:]


@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_a_request_that_is_stopped_goes_on_elsewhere_from_its_kv(block_size: int) -> None:
    prompt = prompt_of(50)
    params = replace(GREEDY, temperature=1.0, seed=7)
    whole = reference(prompt, params)
    for steps in range(3, len(whole) + 1):
        here = build_sim_engine(BIG)
        there = build_sim_engine(replace(BIG, block_size_tokens=block_size))
        here.add(request(prompt, params=params))
        said = [e.token_id for _ in range(steps) for e in here.step() if isinstance(e, Token)]
        held = here.hold(key())
        assert (held.end_index, held.newest_token) == (len(said), said[-1])
        assert not here.has_work()
        moved = request(prompt, generated=tuple(said[:-1]), params=params, mode=Mode.DECODE)
        there.add(moved)
        length = len(moved.sequence)
        there.step()
        there.import_kv(key(), 0, here.export_kv(key(), 0, length))
        there.start_decode(key(), held.newest_token)
        assert here.release(key())
        here.check_integrity()
        assert said + tokens_of(run(there)) == whole


def test_only_a_request_that_generates_can_be_stopped() -> None:
    engine = build_sim_engine(replace(BIG, max_batch_tokens=16))
    with pytest.raises(PreconditionError):
        engine.hold(key())
    engine.add(request(prompt_of(50)))
    while not any(isinstance(event, Token) for event in engine.step()):
        with pytest.raises(PreconditionError):
            engine.hold(key())
    held = engine.hold(key())
    assert engine.hold(key()) == held, "who was not told may ask again"
    engine.release(key())
    engine.check_integrity()


def test_a_prompt_that_is_held_for_its_handoff_does_not_generate() -> None:
    engine = build_sim_engine(BIG)
    engine.add(request(prompt_of(50), mode=Mode.PREFILL))
    run(engine)
    with pytest.raises(PreconditionError):
        engine.hold(key())
    engine.release(key())


def test_without_a_kv_cache_the_tokens_are_the_same() -> None:
    engine = PagedEngine(SimRunner(BIG), max_batch_tokens=8, max_running=8, kv_cache=False)
    prompt = prompt_of(40)
    engine.add(request(prompt))
    assert tokens_of(run(engine)) == reference(prompt)


def test_without_a_kv_cache_a_full_pool_preempts_rather_than_stalls() -> None:
    config = replace(BIG, num_blocks=8, block_size_tokens=4)
    engine = PagedEngine(SimRunner(config), max_batch_tokens=8, max_running=8, kv_cache=False)
    params = replace(GREEDY, max_tokens=14)
    for name in ("a", "b"):
        engine.add(request(prompt_of(10, seed=ord(name)), name=name, params=params))
    events: list[EngineEvent] = []
    for _ in range(200):
        events += engine.step()
    assert not engine.has_work()
    for name in ("a", "b"):
        assert tokens_of(events, name) == reference(prompt_of(10, seed=ord(name)), params)


def test_reservations_that_wait_for_their_kv_do_not_hold_back_others() -> None:
    engine = build_sim_engine(replace(BIG, max_running=4))
    for number in range(6):
        engine.add(request(prompt_of(20, seed=number), name=f"far{number}", mode=Mode.DECODE))
    engine.add(request(prompt_of(3), name="near"))
    assert tokens_of(run(engine), "near") == reference(prompt_of(3))


@pytest.mark.parametrize("narrow", [replace(BIG, max_batch_tokens=2), replace(BIG, max_running=2)])
def test_more_generating_requests_than_a_step_computes_take_turns(narrow: SimConfig) -> None:
    engine = build_sim_engine(narrow)
    prefill = build_sim_engine(BIG)
    asked = {key(name): request(prompt_of(9, seed=ord(name)), name=name) for name in "abcd"}
    for req in asked.values():
        engine.add(replace(req, mode=Mode.DECODE))
    reserved = [e for _ in range(2) for e in engine.step() if isinstance(e, Reserved)]
    for each in reserved:
        deliver(prefill, engine, asked[each.key], each)
    steps = [[e.key.request_id for e in engine.step() if isinstance(e, Token)] for _ in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == ["a", "b", "c", "d"]
    assert [len(step) for step in steps] == [2] * 4


def test_a_request_that_was_held_in_vain_goes_on_as_if_it_had_not_been() -> None:
    engine = build_sim_engine(BIG)
    prompt = prompt_of(20)
    engine.add(request(prompt))
    events = [e for _ in range(6) for e in engine.step()]
    engine.hold(key())
    assert not any(isinstance(e, Token) for _ in range(3) for e in engine.step())
    engine.resume(key())
    engine.resume(key("nobody"))
    engine.check_integrity()
    assert tokens_of([*events, *run(engine)]) == reference(prompt)


def test_blocks_that_nobody_owns_are_counted() -> None:
    engine = build_sim_engine(BIG)
    for name in ("a", "b"):
        engine.add(request(prompt_of(40, seed=ord(name)), name=name))
    while engine.load().used_blocks < 6:
        engine.step()
    assert engine.orphaned_blocks({key("a"), key("b")}) == 0
    assert engine.orphaned_blocks({key("a")}) == 3
    assert engine.orphaned_blocks(set()) == 6
    engine.release(key("b"))
    assert engine.orphaned_blocks({key("a")}) == 0


def test_a_copy_that_fails_fails_its_pull_only() -> None:
    class FullRunner(SimRunner):
        def read_kv(self, block_table: Rows[int], first: int, last: int) -> SealedKV:  # noqa: ARG002
            raise MemoryError

    engine = PagedEngine(FullRunner(BIG), max_batch_tokens=512, max_running=8)
    asked = replace(request(prompt_of(20), mode=Mode.PREFILL), export=((0, 20),))
    engine.add(asked)
    engine.add(request(prompt_of(20), name="other"))
    assert tokens_of(run(engine), "other") == reference(prompt_of(20))
    with pytest.raises(MemoryError):
        engine.export_kv(asked.key, 0, 20)


def test_a_pool_too_small_for_the_prompt_refuses_it_and_one_too_small_for_the_batch_queues() -> (
    None
):
    engine = build_sim_engine(replace(BIG, num_blocks=4, block_size_tokens=4))
    with pytest.raises(InvalidRequestError, match="context is 16 tokens"):
        engine.add(request(prompt_of(16)))
    for name in ("a", "b", "c"):
        engine.add(request(prompt_of(9), name=name, params=replace(GREEDY, max_tokens=3)))
    assert engine.step() == (Started(key("a"), 0),)
    assert engine.load().waiting_requests == 2
    events = run(engine)
    assert sum(isinstance(e, Token) and e.finish is not None for e in events) == 3


def test_bad_requests_are_refused_and_hold_nothing() -> None:
    engine = build_sim_engine(BIG)
    with pytest.raises(InvalidRequestError, match="token id"):
        engine.add(request([256]))
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.add(request([]))
    engine.add(request([1]))
    with pytest.raises(AlreadyExistsError):
        engine.add(request([1]))


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((10**6, 1.0),)},
        {"logit_bias": ((3, math.nan),)},
        {"stop_token_ids": (10**6,), "min_tokens": 2},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_sampling_that_would_break_a_step_is_refused_before_it_shares_one(
    params: dict[str, object],
) -> None:
    """Promise: whoever calls a worker, its mistake is told to it, and no other request is harmed."""
    engine = build_sim_engine(BIG)
    bad = replace(GREEDY, **params)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=f"sampling.{next(iter(params))}"):
        engine.add(request([1, 2, 3], params=bad))
    assert not engine.has_work()


def test_stop_tokens_and_eos_end_a_request_and_min_tokens_delays_them() -> None:
    prompt = prompt_of(20)
    said = reference(prompt)
    stop = replace(GREEDY, stop_token_ids=(said[5],))
    assert reference(prompt, stop) == said[: said.index(said[5]) + 1]
    held_back = replace(stop, min_tokens=10, ignore_eos=False)
    assert len(reference(prompt, held_back)) >= 10


def test_transfers_out_of_turn_are_refused() -> None:
    prefill, decode = build_sim_engine(BIG), build_sim_engine(BIG)
    with pytest.raises(PreconditionError):
        prefill.export_kv(key(), 0, 1)
    prefill.add(request(prompt_of(20), mode=Mode.PREFILL))
    run(prefill)
    kv = prefill.export_kv(key(), 0, 20)
    with pytest.raises(PreconditionError):
        prefill.export_kv(key(), 0, 21)
    with pytest.raises(PreconditionError):
        decode.import_kv(key(), 0, kv)
    decode.add(request(prompt_of(20), mode=Mode.DECODE))
    decode.step()
    with pytest.raises(PreconditionError, match="do not continue"):
        decode.import_kv(key(), 4, kv)
    with pytest.raises(PreconditionError, match="has arrived"):
        decode.start_decode(key(), 1)


def test_kv_that_is_not_what_was_sealed_is_neither_counted_nor_cached_nor_generated_from() -> None:
    prefill, decode = build_sim_engine(BIG), build_sim_engine(BIG)
    prefill.add(request(prompt_of(40), mode=Mode.PREFILL))
    first = next(e for e in run(prefill) if isinstance(e, Token))
    kv = prefill.export_kv(key(), 0, 40)
    decode.add(request(prompt_of(40), mode=Mode.DECODE))
    decode.step()
    flipped = kv.data.copy()
    flipped[1, 0, 7, 0, 1] += 1
    with pytest.raises(CorruptKVError):
        decode.import_kv(key(), 0, SealedKV(flipped, kv.checksum))
    assert not decode.take_prefix_delta().stored
    with pytest.raises(PreconditionError, match="KV of 0 of 40"):
        decode.start_decode(key(), first.token_id)
    decode.check_integrity()
    decode.import_kv(key(), 0, kv)
    decode.start_decode(key(), first.token_id)
    assert [first.token_id, *tokens_of(run(decode))] == reference(prompt_of(40))


def test_a_copy_is_a_step_of_its_own_before_all_others() -> None:
    """The first token does not wait for its copies, nor do they wait for the prompts that are computed next."""
    engine = build_sim_engine(replace(BIG, max_batch_tokens=32))
    engine.add(
        replace(request(prompt_of(32), mode=Mode.PREFILL), export=((0, 16), (16, 32), (0, 32)))
    )
    engine.add(request(prompt_of(64, seed=2), name="next"))
    events: list[tuple[EngineEvent, ...]] = []
    while not events or not isinstance(events[-1][0], Exported):
        events.append(engine.step())
    assert any(isinstance(e, Token) for e in events[-2])
    assert len(events[-1]) == 1
    (second,) = engine.step()
    assert isinstance(second, Exported)
    assert (second.first, second.last) == (16, 32)
    engine.release(key())
    assert engine.has_work()
    assert engine.step() == ()
    engine.check_integrity()


def test_asked_for_kv_comes_right_after_it_is_computed_and_equals_a_later_export() -> None:
    engine = build_sim_engine(replace(BIG, max_batch_tokens=32))
    base = request(prompt_of(70), mode=Mode.PREFILL)
    engine.add(replace(base, export=((16, 40), (40, 70))))
    events = run(engine)
    progress, first, token, second = events[-4:]
    assert progress == Progress(key(), 64)
    assert isinstance(first, Exported)
    assert isinstance(second, Exported)
    assert isinstance(token, Token)
    assert (first.first, first.last, second.first, second.last) == (16, 40, 40, 70)
    assert first.kv is not None
    assert second.kv is not None
    copies = np.concatenate([first.kv.data, second.kv.data], axis=2)
    assert np.array_equal(copies, engine.export_kv(key(), 16, 70).data)
    assert engine.load().in_flight_blocks == 5, "the blocks stay held"


def test_a_prompt_that_is_preempted_between_its_copies_makes_each_of_them_once() -> None:
    engine = build_sim_engine(
        replace(BIG, num_blocks=11, block_size_tokens=4, max_batch_tokens=5, prefix_cache=False)
    )
    engine.add(request(prompt_of(7), name="generates"))
    while not engine.load().running_requests or engine.load().queued_prefill_tokens:
        engine.step()
    prompt = prompt_of(32, seed=2)
    asked = ((0, 12), (12, 24), (24, 32))
    engine.add(replace(request(prompt, mode=Mode.PREFILL), export=asked))
    events = run(engine)
    first_preempted = next(i for i, e in enumerate(events) if isinstance(e, Preempted))
    copies = [e for e in events if isinstance(e, Exported)]
    assert isinstance(
        next(e for e in events[:first_preempted] if isinstance(e, Exported)), Exported
    )
    assert [(e.first, e.last) for e in copies] == list(asked)
    assert all(e.kv is not None for e in copies)
    kept = np.concatenate([e.kv.data for e in copies if e.kv is not None], axis=2)
    assert np.array_equal(kept, engine.export_kv(key(), 0, 32).data)


class FailingRunner(SimRunner):
    """Fails for a token id, as a model does whose logits are not finite."""

    def run(self, rows: Rows[BatchRow]) -> list[Sampled | None]:
        if any(13 in row.token_ids for row in rows):
            raise InternalError("logits are not finite")
        return super().run(rows)


def test_one_request_that_fails_harms_no_other_in_its_batch() -> None:
    engine = PagedEngine(FailingRunner(BIG), max_batch_tokens=512, max_running=8)
    engine.add(request([1, 2, 3], name="good"))
    engine.add(request([1, 13, 3], name="bad"))
    events: list[EngineEvent] = []
    while not any(isinstance(e, Failed) for e in events):
        events += engine.step()
        engine.check_integrity()
    assert [e.key for e in events if isinstance(e, Failed)] == [key("bad")]
    assert engine.load().running_requests == 1
    said = [e.token_id for e in events if isinstance(e, Token) and e.key == key("good")]
    assert said == reference([1, 2, 3])[: len(said)]
    assert said


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_pool_is_whole_after_releases_at_random_instants(data: st.DataObject) -> None:
    """Promise: no stranded KV block at any instant of cancellation."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    config = replace(BIG, num_blocks=24, block_size_tokens=4, max_batch_tokens=8, max_running=6)
    engine = build_sim_engine(config)
    live: list[AttemptKey] = []
    for turn in range(60):
        if rng.random() < 0.4:
            req = request(
                prompt_of(rng.randrange(1, 60), seed=rng.randrange(4)),
                name=f"r{turn}",
                mode=rng.choice(list(Mode)),
            )
            engine.add(req)
            live.append(req.key)
        if live and rng.random() < 0.3:
            engine.release(live.pop(rng.randrange(len(live))))
        if engine.has_work():
            engine.step()
        engine.check_integrity()
    for k in live:
        engine.release(k)
    engine.check_integrity()
    load = engine.load()
    assert load.free_blocks + load.cached_blocks == config.num_blocks
    assert load.running_requests == load.waiting_requests == load.queued_prefill_tokens == 0
