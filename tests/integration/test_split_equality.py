"""The gate: the split system's tokens equal one engine's, token for token, with real attention over a real KV cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.engine.base import EngineRequest, Mode, Preempted, Reserved, Token
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.engine.native.library import NEEDED, processor_flags
from baton.kv.checksum import sealed
from baton.kv.spec import WeightFormat
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from tests.oracle import llama, save

GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
LACKING = NEEDED - processor_flags()
NATIVE = pytest.mark.skipif(bool(LACKING), reason=f"this processor lacks {LACKING}")
FORMATS = [
    pytest.param(("float32", None), id="float32"),
    pytest.param(("bfloat16", None), id="bfloat16", marks=NATIVE),
    pytest.param(("bfloat16", WeightFormat.INT8), id="int8", marks=NATIVE),
]
"""Torch's sums in lower precision depend on the batch; those of the native kernels do not."""
LENGTHS = (1, 3, 16, 17, 63, 130, 300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with grouped heads whose logits are well apart."""
    return save(lambda: llama(max_position_embeddings=1024), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=FORMATS)
def build(checkpoint: Path, request: pytest.FixtureRequest) -> Callable[..., PagedEngine]:
    dtype, weights = request.param
    native = dtype != "float32"

    def build(
        block_size: int = 16,
        chunk: int = 512,
        kv_tokens: int = 4096,
        *,
        prefix_cache: bool = True,
        kv_cache: bool = True,
    ) -> PagedEngine:
        return build_torch_engine(
            EngineConfig(
                model=str(checkpoint),
                dtype=dtype,
                weights=weights,
                kernels="native" if native else None,
                block_size_tokens=max(16, block_size) if native else block_size,
                max_batch_tokens=chunk,
                kv_pool_tokens=kv_tokens,
                prefix_cache=prefix_cache,
                kv_cache=kv_cache,
                threads=1,
            )
        )

    return build


def prompt_of(length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=64,
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias=((7, 2.0),),
        seed=seed,
        ignore_eos=True,
    )


def request(
    name: str, prompt: tuple[int, ...], params: SamplingParams, mode: Mode
) -> EngineRequest:
    return EngineRequest(AttemptKey(RequestId(name)), Sequence(prompt, (), params), mode)


def drain(engine: PagedEngine) -> dict[str, list[int]]:
    """Steps until idle; tokens by request."""
    said: dict[str, list[int]] = {}
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Token):
                said.setdefault(event.key.request_id, []).append(event.token_id)
        engine.check_integrity()
    return said


@pytest.fixture(scope="module")
def reference(
    build: Callable[..., PagedEngine],
) -> Callable[[tuple[int, ...], SamplingParams], list[int]]:
    """One engine, one request at a time, the prompt in one chunk, no prefix cache."""
    engine = build(prefix_cache=False)
    known: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}

    def reference(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
        if (prompt, params) not in known:
            engine.add(request("reference", prompt, params, Mode.LOCAL))
            known[prompt, params] = drain(engine)["reference"]
        return known[prompt, params]

    return reference


def split(
    prefill: PagedEngine,
    decode: PagedEngine,
    prompts: dict[str, tuple[int, ...]],
    params: SamplingParams,
) -> dict[str, list[int]]:
    """All prompts at once: prefilled in one batch, handed over, decoded in one batch."""
    cached: dict[AttemptKey, int] = {}
    for name, prompt in prompts.items():
        decode.add(request(name, prompt, params, Mode.DECODE))
        prefill.add(request(name, prompt, params, Mode.PREFILL))
    for event in decode.step():
        assert isinstance(event, Reserved)
        cached[event.key] = event.cached_tokens
    first = drain(prefill)
    for name, prompt in prompts.items():
        key = AttemptKey(RequestId(name))
        decode.import_kv(key, cached[key], prefill.export_kv(key, cached[key], len(prompt)))
        decode.start_decode(key, first[name][0])
        prefill.release(key)
    rest = drain(decode)
    return {name: first[name] + rest[name] for name in prompts}


@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("chunk", [8, 64, 512])
def test_split_equals_single_over_block_and_chunk_sizes_in_mixed_batches(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
    block_size: int,
    chunk: int,
) -> None:
    prefill, decode = build(block_size, chunk), build(16, 512)
    prompts = {f"r{n}": prompt_of(n) for n in LENGTHS}
    for params in (GREEDY, sampled(11)):
        said = split(prefill, decode, prompts, params)
        for name, prompt in prompts.items():
            assert said[name] == reference(prompt, params), (name, params.seed)


def test_split_equals_single_with_prefix_hits_on_both_sides(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
) -> None:
    prefill, decode = build(), build()
    base = prompt_of(200)
    split(prefill, decode, {"warm": base}, GREEDY)
    prompts = {f"r{n}": base + prompt_of(n) for n in (1, 20, 50)}
    said = split(prefill, decode, prompts, sampled(5))
    assert prefill.load().cached_blocks
    for name, prompt in prompts.items():
        assert said[name] == reference(prompt, sampled(5))


def test_preemption_changes_no_token(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
) -> None:
    engine = build(4, 64, 256)
    prompts = {f"r{n}": prompt_of(n) for n in (30, 40, 50, 60)}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, sampled(2), Mode.LOCAL))
    said: dict[str, list[int]] = {}
    preempted = 0
    while engine.has_work():
        for event in engine.step():
            preempted += isinstance(event, Preempted)
            if isinstance(event, Token):
                said.setdefault(event.key.request_id, []).append(event.token_id)
    assert preempted
    for name, prompt in prompts.items():
        assert said[name] == reference(prompt, sampled(2))


def test_a_resumed_request_goes_on_with_the_same_tokens(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
) -> None:
    """Promise: a new attempt with the prompt and the sent tokens continues the stream exactly."""
    prompt, params = prompt_of(63), sampled(21)
    whole = reference(prompt, params)
    engine = build()
    for sent in range(1, len(whole), 7):
        sequence = Sequence(prompt, tuple(whole[:sent]), params)
        engine.add(EngineRequest(AttemptKey(RequestId(f"r{sent}")), sequence, Mode.LOCAL))
    for name, tokens in drain(engine).items():
        assert tokens == whole[int(name[1:]) :]


def test_one_flipped_value_in_the_kv_changes_what_is_said(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
) -> None:
    """The gate can fail: it sees KV of the right shape with the tokens in the wrong place."""
    prefill, decode = build(), build()
    prompt = prompt_of(130)
    decode.add(request("r", prompt, GREEDY, Mode.DECODE))
    decode.step()
    prefill.add(request("r", prompt, GREEDY, Mode.PREFILL))
    first = drain(prefill)["r"][0]
    key = AttemptKey(RequestId("r"))
    kv = prefill.export_kv(key, 0, len(prompt)).data.copy()
    kv[:, :, [10, 90]] = kv[:, :, [90, 10]]
    kv[:, :, 40:60] = 0
    decode.import_kv(key, 0, sealed(kv))
    decode.start_decode(key, first)
    assert [first, *drain(decode)["r"]] != reference(prompt, GREEDY)


def test_without_a_kv_cache_the_tokens_are_the_same(
    build: Callable[..., PagedEngine],
    reference: Callable[[tuple[int, ...], SamplingParams], list[int]],
) -> None:
    engine = build(chunk=1, kv_tokens=1024, kv_cache=False)
    engine.add(request("r", prompt_of(63), GREEDY, Mode.LOCAL))
    assert drain(engine)["r"] == reference(prompt_of(63), GREEDY)
