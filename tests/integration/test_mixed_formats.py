"""Roles of different weight formats: what is said is what one rule says, wherever it is computed and whatever happens.

The rule: the KV of the prompt is computed in the prefill workers' format, and so is the first token; the KV of generated tokens in
the decode workers' format, and so are the tokens after the first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from baton.engine.base import EngineRequest, Exported, Failed, Mode, Reserved, Token
from baton.engine.batch import BatchRow, SampleInput
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.engine.runner import ModelRunner
from baton.errors import CapacityError, PreconditionError
from baton.kv.spec import WeightFormat
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from tests.oracle import llama, save

BLOCK = 8
TOKENS = 24
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=5)
PAIRS = [
    (WeightFormat.FLOAT32, WeightFormat.INT8),
    (WeightFormat.FLOAT32, WeightFormat.BFLOAT16),
    (WeightFormat.INT8, WeightFormat.FLOAT32),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokens differ by the format of its weights."""
    return save(
        lambda: llama(
            num_hidden_layers=2,
            hidden_size=72,
            intermediate_size=100,
            head_dim=16,
            tie_word_embeddings=True,
        ),
        tmp_path_factory.mktemp("llama"),
    )


@dataclass(frozen=True, slots=True)
class Formats:
    """Engines of a fleet of two formats, and what its clients are to get."""

    path: Path
    prompts: WeightFormat
    answers: WeightFormat

    def config(self, weights: WeightFormat, **changes: object) -> EngineConfig:
        fields: dict[str, object] = {
            "model": str(self.path),
            "dtype": "float32",
            "weights": weights,
            "block_size_tokens": BLOCK,
            "kv_pool_tokens": 2048,
            "threads": 1,
            "kernels": "torch",
        }
        return EngineConfig(**(fields | changes))  # type: ignore[arg-type]  # field values by name

    def prefill(self, **changes: object) -> PagedEngine:
        return build_torch_engine(self.config(self.prompts, **changes))

    def decode(self, **changes: object) -> PagedEngine:
        imports = {"imports_prompts": True, "prompt_weights": self.prompts}
        return build_torch_engine(self.config(self.answers, **imports, **changes))

    def expected(self, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
        """The rule, word by word: one runner of each format, one sequence, one token at a time, no cache."""
        first, later = (ModelRunner(self.config(each)) for each in (self.prompts, self.answers))
        table = list(range((len(prompt) + TOKENS) // BLOCK + 1))
        (chosen,) = first.run([BatchRow(prompt, 0, table, SampleInput(params, prompt, []))])
        assert chosen is not None
        output = [chosen.token_id]
        later.write_kv(table, 0, first.read_kv(table, 0, len(prompt)))
        while len(output) < params.max_tokens:
            start = len(prompt) + len(output) - 1
            row = BatchRow(output[-1:], start, table, SampleInput(params, prompt, output))
            (chosen,) = later.run([row])
            assert chosen is not None
            output.append(chosen.token_id)
        return output


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
def formats(request: pytest.FixtureRequest, checkpoint: Path) -> Formats:
    return Formats(checkpoint, *request.param)


@pytest.fixture(scope="module")
def oracle(formats: Formats) -> Callable[[tuple[int, ...], SamplingParams], list[int]]:
    known: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}

    def oracle(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
        if (prompt, params) not in known:
            known[prompt, params] = formats.expected(prompt, params)
        return known[prompt, params]

    return oracle


def prompt_of(length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def steps(engine: PagedEngine) -> Iterator[Token | Failed | Exported]:
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Token | Failed | Exported):
                yield event
        engine.check_integrity()


def said(engine: PagedEngine) -> dict[str, list[int]]:
    """Steps until idle; tokens by request."""
    tokens: dict[str, list[int]] = {}
    for event in steps(engine):
        if isinstance(event, Token):
            tokens.setdefault(event.key.request_id, []).append(event.token_id)
    return tokens


def handed_over(
    prefill: PagedEngine,
    decode: PagedEngine,
    prompts: dict[str, tuple[int, ...]],
    params: SamplingParams,
    sent: dict[str, list[int]] | None = None,
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """One attempt at each request, all in one batch, as the services make it: what each has then said in all, and how much of its prompt
    decode had cached.
    """
    sent = sent or {}
    cached: dict[str, int] = {}
    for name, prompt in prompts.items():
        key = AttemptKey(RequestId(name))
        sequence = Sequence(prompt, tuple(sent.get(name, ())), params)
        decode.add(EngineRequest(key, sequence, Mode.DECODE))
        prefill.add(EngineRequest(key, replace(sequence, generated=()), Mode.PREFILL))
    for event in decode.step():
        assert isinstance(event, Reserved)
        cached[event.key.request_id] = event.cached_tokens
    first = said(prefill)
    for name, prompt in prompts.items():
        key = AttemptKey(RequestId(name))
        decode.import_kv(key, cached[name], prefill.export_kv(key, cached[name], len(prompt)))
        decode.start_decode(key, None if name in sent else first[name][0])
        prefill.release(key)
    later = said(decode)
    return {
        name: [*(sent.get(name) or first[name]), *later.get(name, [])] for name in prompts
    }, cached


def test_the_formats_do_say_different_things(
    formats: Formats, oracle: Callable[[tuple[int, ...], SamplingParams], list[int]]
) -> None:
    """Without this, the tests below would prove nothing."""
    alone = [Formats(formats.path, each, each) for each in (formats.prompts, formats.answers)]
    for params in (GREEDY, DRAWN):
        mixed = [oracle(prompt_of(length), params) for length in (9, 40, 63)]
        for other in alone:
            assert mixed != [other.expected(prompt_of(length), params) for length in (9, 40, 63)]


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_says_what_the_rule_says(
    formats: Formats,
    oracle: Callable[[tuple[int, ...], SamplingParams], list[int]],
    params: SamplingParams,
    chunk: int,
) -> None:
    prompts = {f"r{n}": prompt_of(n) for n in (1, 8, 9, 40, 63)}
    prefill, decode = formats.prefill(max_batch_tokens=chunk), formats.decode()
    tokens, _ = handed_over(prefill, decode, prompts, params)
    assert tokens == {name: oracle(prompt, params) for name, prompt in prompts.items()}


@pytest.mark.parametrize("chunk", [6, 512])
def test_a_new_attempt_at_any_token_goes_on_as_if_nothing_had_happened(
    formats: Formats,
    oracle: Callable[[tuple[int, ...], SamplingParams], list[int]],
    chunk: int,
) -> None:
    """Promise: the KV of tokens that were sent is computed by decode, in its format, and the prompt's by prefill, also where either
    has the other's tokens in its cache from before.
    """
    prompt = prompt_of(40)
    whole = oracle(prompt, DRAWN)
    prefill, decode = formats.prefill(), formats.decode(max_batch_tokens=chunk)
    for sent in (1, 8, 9, TOKENS - 1):
        tokens, cached = handed_over(prefill, decode, {"r": prompt}, DRAWN, {"r": whole[:sent]})
        assert tokens["r"] == whole
        # The tokens of the answer, as a part of another prompt, are prefill's to compute.
        other = prompt + tuple(whole[:sent])
        tokens, _ = handed_over(prefill, decode, {"o": other}, DRAWN)
        assert tokens["o"] == oracle(other, DRAWN)
    assert cached["r"] == len(prompt) - BLOCK


def test_a_session_turns_as_if_each_turn_were_alone(
    formats: Formats, oracle: Callable[[tuple[int, ...], SamplingParams], list[int]]
) -> None:
    """Promise: of an answer, no later turn reuses decode's KV: prefill computes it with the next prompt. What is reused is the prompt."""
    prefill, decode = formats.prefill(), formats.decode()
    prompt, before = prompt_of(20), 0
    for turn in range(3):
        tokens, cached = handed_over(prefill, decode, {f"t{turn}": prompt}, GREEDY)
        assert tokens[f"t{turn}"] == oracle(prompt, GREEDY)
        assert cached[f"t{turn}"] == before // BLOCK * BLOCK
        before = len(prompt)
        prompt += tuple(tokens[f"t{turn}"]) + prompt_of(11 + turn)


def test_a_request_moves_between_decode_workers_with_its_kv(
    formats: Formats, oracle: Callable[[tuple[int, ...], SamplingParams], list[int]]
) -> None:
    """Promise: a drain changes no token, and what moved is not taken for a prompt's KV."""
    prefill, one, other = formats.prefill(), formats.decode(), formats.decode()
    prompt, key = prompt_of(40), AttemptKey(RequestId("r"))
    whole = oracle(prompt, GREEDY)
    one.add(EngineRequest(key, Sequence(prompt, (), GREEDY), Mode.DECODE))
    prefill.add(EngineRequest(key, Sequence(prompt, (), GREEDY), Mode.PREFILL))
    one.step()
    first = said(prefill)["r"][0]
    one.import_kv(key, 0, prefill.export_kv(key, 0, len(prompt)))
    one.start_decode(key, first)
    tokens = [first]
    while len(tokens) < 15:
        tokens += [event.token_id for event in one.step() if isinstance(event, Token)]
    held = one.hold(key)
    assert (held.end_index, held.newest_token) == (15, tokens[-1])
    other.add(EngineRequest(key, Sequence(prompt, tuple(tokens[:-1]), GREEDY), Mode.DECODE))
    other.step()
    length = len(prompt) + len(tokens) - 1
    other.import_kv(key, 0, one.export_kv(key, 0, length))
    other.start_decode(key, tokens[-1])
    assert tokens + said(other)["r"] == whole
    later = prompt + tuple(whole)
    again, cached = handed_over(prefill, other, {"next": later}, GREEDY)
    assert cached["next"] == len(prompt)
    assert again["next"] == oracle(later, GREEDY)


def test_one_that_loses_its_blocks_fails_and_a_new_attempt_goes_on(
    formats: Formats, oracle: Callable[[tuple[int, ...], SamplingParams], list[int]]
) -> None:
    """Promise: decode never computes a prompt again by itself; the router is told, and prefill does."""
    prefill, decode = formats.prefill(), formats.decode(kv_pool_tokens=96)
    prompts = {f"r{n}": prompt_of(n) for n in (30, 33)}
    lost: list[str] = []
    tokens: dict[str, list[int]] = {}
    for name, prompt in prompts.items():
        key = AttemptKey(RequestId(name))
        sequence = Sequence(prompt, (), GREEDY)
        decode.add(EngineRequest(key, sequence, Mode.DECODE))
        prefill.add(EngineRequest(key, sequence, Mode.PREFILL))
        decode.step()
        tokens[name] = said(prefill)[name]
        decode.import_kv(key, 0, prefill.export_kv(key, 0, len(prompt)))
        decode.start_decode(key, tokens[name][0])
        prefill.release(key)
    for event in steps(decode):
        if isinstance(event, Failed):
            assert isinstance(event.error, CapacityError)
            lost.append(event.key.request_id)
        elif isinstance(event, Token):
            tokens[event.key.request_id].append(event.token_id)
    assert lost == ["r33"]
    again, _ = handed_over(prefill, decode, {"r33": prompts["r33"]}, GREEDY, {"r33": tokens["r33"]})
    assert tokens | again == {name: oracle(prompt, GREEDY) for name, prompt in prompts.items()}


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.PREFILL])
def test_a_worker_of_another_format_than_prompts_computes_none(
    formats: Formats, mode: Mode
) -> None:
    decode = formats.decode()
    request = EngineRequest(AttemptKey(RequestId("r")), Sequence((1, 2), (), GREEDY), mode)
    with pytest.raises(PreconditionError, match=formats.prompts.value):
        decode.add(request)
    assert not decode.has_work()
    assert decode.load().free_blocks == decode.info.num_blocks


def test_a_start_before_the_kv_is_there_is_refused(formats: Formats) -> None:
    prefill, decode = formats.prefill(), formats.decode()
    prompt, key = prompt_of(20), AttemptKey(RequestId("r"))
    prefill.add(EngineRequest(key, Sequence(prompt, (), GREEDY), Mode.PREFILL))
    said(prefill)
    decode.add(EngineRequest(key, Sequence(prompt, (5,), GREEDY), Mode.DECODE))
    decode.step()
    decode.import_kv(key, 0, prefill.export_kv(key, 0, 19))
    for first_token in (None, 7):
        with pytest.raises(PreconditionError, match="19 of 2"):
            decode.start_decode(key, first_token)
    decode.import_kv(key, 19, prefill.export_kv(key, 19, 20))
    with pytest.raises(PreconditionError, match="20 of 21"):
        decode.start_decode(key, 7)
    decode.start_decode(key, None)
    assert len(said(decode)["r"]) == TOKENS - 1


def test_workers_of_one_format_share_a_digest_with_no_other(formats: Formats) -> None:
    prefill, decode = formats.prefill().info, formats.decode().info
    assert prefill.spec.digest == decode.spec.digest
    assert (prefill.weight_format, decode.weight_format) == (formats.prompts, formats.answers)
    assert prefill.computes_prompts
    assert not decode.computes_prompts
    alone = build_torch_engine(formats.config(formats.answers)).info
    assert alone.computes_prompts
    assert alone.spec.digest != decode.spec.digest
