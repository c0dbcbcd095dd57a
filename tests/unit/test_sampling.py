"""The sampler draws from the distribution that the parameters define, reproducibly and row by row."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.engine.batch import Sampled, SampleInput
from baton.engine.noise import uniform
from baton.engine.rows import kept
from baton.engine.sampling import _adjust, _row_after_row, _together, _weights, sample
from baton.errors import InternalError
from baton.types import SamplingParams, TokenLogprob


def _input(
    params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> SampleInput:
    return SampleInput(params, prompt, output)


def _params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=100, **changes)  # type: ignore[arg-type]  # field values by name


def _greedy(**changes: object) -> SamplingParams:
    return _params(temperature=0.0, **changes)


def _logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _tokens(
    logits: Tensor, inputs: Sequence[SampleInput], eos_token_ids: tuple[int, ...] = ()
) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, inputs, eos_token_ids)]


def _draws(logits: Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """Tokens drawn from one row of logits at output positions [0, count)."""
    output = [0] * count
    inputs = [_input(params, output=output[:position]) for position in range(count)]
    return Counter(_tokens(logits.expand(count, -1).contiguous(), inputs))


def test_an_empty_batch_gives_nothing() -> None:
    assert sample(torch.empty(0, 5), [], ()) == []


def test_greedy_takes_the_most_likely_token_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-4.0, -3.0, -2.0, -1.0]])
    assert _tokens(logits, [_input(_greedy())] * 3) == [1, 0, 3]


def test_greedy_ties_are_the_same_beside_rows_that_need_processing() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]] * 2)
    rows = [_input(_greedy()), _input(_greedy(presence_penalty=0.0, logit_bias=((0, 5.0),)))]
    assert _tokens(logits, rows) == [1, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(changes: dict[str, object]) -> None:
    """Chi-square against the probabilities by the definition; the seed is fixed, so the test is deterministic."""
    logits, count = _logits(1, 12, seed=3, scale=1.5), 8_000
    params = _params(seed=11, **changes)
    found = _draws(logits, params, count)
    expected = _definition(logits[0].double(), params)
    likely = [token for token in range(12) if expected[token] > 0]
    assert set(found) <= set(likely)
    chi_square = sum((found[t] - count * expected[t]) ** 2 / (count * expected[t]) for t in likely)
    degrees = max(len(likely) - 1, 1)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def _definition(logits: Tensor, params: SamplingParams) -> list[float]:
    """Probabilities after the warpers, written as their definitions read."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(logits.tolist())}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ranked = ranked[: params.top_k or len(ranked)]
    total, reached, kept = sum(weights[t] for t in ranked), 0.0, []
    for token in ranked:
        if reached < params.top_p * total:
            kept.append(token)
        reached += weights[token]
    kept = [t for t in kept if weights[t] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(logits))]


def test_the_draw_inverts_the_cumulative_distribution_in_token_order() -> None:
    logits = _logits(1, 40, seed=5)
    cumulative = logits[0].double().softmax(-1).cumsum(-1).tolist()
    for seed in range(200):
        output = [1] * (seed % 7)
        expected = next(t for t, c in enumerate(cumulative) if c > uniform(seed, 2, len(output)))
        row = _input(_params(seed=seed, choice=2), output=output)
        assert _tokens(logits, [row]) == [expected]


_WARPED = [
    _params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, 1000)
    for top_p in (1.0, 0.9, 0.4, 1e-9)
    for min_p in (0.0, 0.05, 1.0)
]


def test_every_mix_of_warpers_gives_the_probabilities_of_transformers() -> None:
    logits = _logits(len(_WARPED), 60, seed=8).double()
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = _weights(shifted, _WARPED)
    for row, params, found in zip(logits, _WARPED, weights, strict=True):
        expected = _by_transformers(row[None], params)[0]
        for weights_of_row in (found, _weights_alone(row - row.amax(), params)):
            assert torch.equal(weights_of_row > 0, expected > 0)
            own = weights_of_row / weights_of_row.sum()
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=0)


def _weights_alone(scores: Tensor, params: SamplingParams) -> Tensor:
    """What the path for CPUs keeps of a row, over the whole vocabulary."""
    ids, weights = kept(scores.numpy(), params)
    if ids is None:
        return torch.from_numpy(weights)
    full = torch.zeros_like(scores)
    full[torch.from_numpy(ids)] = torch.from_numpy(weights)
    return full


def _by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores: Tensor = LogitsProcessorList(warpers)(torch.LongTensor([[0]]), logits)
    return scores.softmax(-1)


@pytest.mark.parametrize("scale", [0.0, 0.1, 4.0])
def test_top_p_over_a_large_vocabulary_is_the_one_of_transformers(scale: float) -> None:
    """Flat rows need more candidates than are tried first; beside them, peaked rows keep what they keep alone."""
    logits = _logits(3, 5_000, seed=1, scale=1.0).double() * torch.tensor([[scale], [4.0], [9.0]])
    shifted = logits - logits.amax(-1, keepdim=True)
    params = [_params(top_p=p) for p in (0.7, 0.5, 0.95)]
    for row in range(3):
        found = _weights(shifted, params)[row]
        assert torch.equal(found, _weights(shifted[row : row + 1], params[row : row + 1])[0])
        alone = _weights_alone(shifted[row], params[row])
        assert torch.equal(found > 0, alone > 0)
        torch.testing.assert_close(alone, found, rtol=1e-12, atol=0)
        expected = _by_transformers(logits[row][None], params[row])[0]
        assert int((found > 0).sum()) == int((expected > 0).sum())
        if row or scale:
            assert torch.equal(found > 0, expected > 0)
        else:
            assert (found > 0).tolist() == [token < 3_500 for token in range(5_000)]


def test_ties_at_the_border_are_kept_by_top_k_and_cut_by_top_p_at_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert set(_draws(logits, _params(top_k=2), 2_000)) == {1, 2, 3, 4}
    even = torch.zeros(1, 8)
    assert set(_draws(even, _params(top_p=0.25), 2_000)) == {0, 1}


def test_repetition_penalty_is_the_one_of_transformers() -> None:
    logits, prompt, output = _logits(1, 30, seed=2), [3, 3, 17], [4, 9, 4]
    for penalty in (0.5, 1.3, 5.0):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([prompt + output]), logits.double())
        row = _input(_params(repetition_penalty=penalty), prompt, output)
        torch.testing.assert_close(_adjusted(logits, row), expected, rtol=1e-12, atol=0)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits, output = _logits(1, 30, seed=2), [4, 9, 4, 4]
    row = _input(_params(presence_penalty=0.7, frequency_penalty=-0.3), [1, 2, 4], output)
    expected = logits.double()
    expected[0, 4] -= 0.7 - 0.3 * 3
    expected[0, 9] -= 0.7 - 0.3
    torch.testing.assert_close(_adjusted(logits, row), expected, rtol=1e-12, atol=0)


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    changes = _params(
        logit_bias=((0, -4.0), (2, 1.0)), repetition_penalty=2.0, presence_penalty=0.25
    )
    found = _adjusted(logits, _input(changes, [0], [2]))
    assert found.tolist() == [[(1.0 - 4.0) * 2, -2.0, (0.5 + 1.0) / 2 - 0.25]]


def _adjusted(logits: Tensor, row: SampleInput) -> Tensor:
    scores = logits.double()
    _adjust(scores, [row], ())
    return scores


def test_a_bias_of_100_forces_a_token_and_minus_100_forbids_it() -> None:
    logits = _logits(1, 20)
    best = int(logits.argmax())
    worst = int(logits.argmin())
    for params in (_greedy, _params):
        assert _tokens(logits, [_input(params(logit_bias=((worst, 100.0),)))]) == [worst]
        assert _tokens(logits, [_input(params(logit_bias=((best, -100.0),), seed=5))]) != [best]


def test_ends_cannot_be_chosen_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    params = _greedy(min_tokens=2, stop_token_ids=(2,))
    found = [_tokens(logits, [_input(params, [1], [0] * n)], (1,))[0] for n in range(4)]
    assert found == [3, 3, 1, 1]


def test_an_ignored_end_of_sequence_is_an_ordinary_token_and_stop_tokens_stay_masked() -> None:
    logits = torch.tensor([[0.0, 8.0, 9.0, 1.0]])
    params = _greedy(min_tokens=2, stop_token_ids=(2,), ignore_eos=True)
    assert _tokens(logits, [_input(params)], (1,)) == [1]


def test_masked_ends_are_never_drawn_whatever_the_penalties_and_bias() -> None:
    logits = _logits(1, 5)
    params = _params(
        min_tokens=10_000, logit_bias=((1, 100.0),), repetition_penalty=1e-300, temperature=1e9
    )
    rows = [_input(params, [1, 2], [1] * n) for n in range(500)]
    assert 1 not in _tokens(logits.expand(500, -1).contiguous(), rows, (1,))


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    logits = _logits(3, 40, seed=4)
    rows = [
        _input(_params(logprobs=4, top_k=1, logit_bias=((7, 100.0),))),
        _input(_greedy()),
        _input(_greedy(logprobs=0)),
    ]
    shaped, silent, bare = sample(logits, rows, ())
    expected = logits.double().log_softmax(-1)
    assert silent.logprobs is None
    assert shaped.token_id == 7
    assert shaped.logprobs is not None
    assert shaped.logprobs.chosen.token_id == 7
    assert shaped.logprobs.chosen.logprob == pytest.approx(float(expected[0, 7]), rel=1e-12)
    values, ids = expected[0].topk(4)
    assert [t.token_id for t in shaped.logprobs.top] == ids.tolist()
    assert [t.logprob for t in shaped.logprobs.top] == pytest.approx(values.tolist(), rel=1e-12)
    assert bare.logprobs is not None
    assert bare.logprobs.top == ()
    assert bare.logprobs.chosen.logprob == pytest.approx(float(expected[2].max()), rel=1e-12)


def test_equally_likely_alternatives_come_lowest_ids_first() -> None:
    logits = torch.tensor([[-1.0, 0.0, -0.0, -3.0, 0.0, -1.0, -math.inf]])
    (sampled,) = sample(logits, [_input(_greedy(logprobs=20))], ())
    assert sampled.logprobs is not None
    assert [t.token_id for t in sampled.logprobs.top] == [1, 2, 4, 0, 5, 3, 6]
    assert sampled.logprobs.top[-1] == TokenLogprob(6, -math.inf)


@pytest.mark.parametrize("params", [_greedy(), _params(), _greedy(logprobs=2), _params(top_p=0.5)])
@pytest.mark.parametrize(
    "row",
    [[math.nan] * 4, [-math.inf] * 4, [0.0, math.nan, 1.0, 2.0], [0.0, math.inf, 1.0, 2.0]],
)
def test_broken_logits_name_their_row_instead_of_choosing_a_token(
    params: SamplingParams, row: list[float]
) -> None:
    """Promise: no token is made up from logits that mean nothing, and the rows beside lose nothing when run again."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], row])
    with pytest.raises(InternalError, match=r"\[1\]"):
        sample(logits, [_input(_greedy()), _input(params)], ())
    assert _tokens(logits[:1], [_input(_greedy())]) == [3]


def test_a_row_whose_every_token_is_masked_is_an_error() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    for params in (_greedy, _params):
        row = _input(params(min_tokens=1, stop_token_ids=(0, 1)))
        with pytest.raises(InternalError, match=r"\[0\]"):
            sample(logits, [row], ())


def test_some_impossible_tokens_do_not_break_a_row() -> None:
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 40]] = torch.tensor([1.0, 1.0])
    assert set(_draws(logits, _params(seed=1), 200)) == {3, 40}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30, 1e308])
def test_extreme_temperatures_are_the_limits_of_the_distribution(temperature: float) -> None:
    logits = _logits(1, 6, seed=9)
    found = _draws(logits, _params(temperature=temperature, seed=3), 600)
    if temperature < 1:
        assert found == {int(logits.argmax()): 600}
    else:
        assert set(found) == set(range(6))
        assert min(found.values()) > 60


@pytest.mark.parametrize("seed", range(6))
def test_rows_one_by_one_choose_what_the_whole_batch_chooses(seed: int) -> None:
    """Promise: the CPU's path and the accelerators' are one definition: equal tokens, also among ties and impossible tokens, and
    log-probabilities equal beyond float32.
    """
    warpers: list[dict[str, object]] = [
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for temperature in (0.0, 0.2, 1.0, 3.0)
        for top_k in (0, 1, 40, 5_000)
        for top_p in (1.0, 0.999, 0.6)
        for min_p in (0.0, 0.02)
    ]
    changes: list[dict[str, object]] = [
        {},
        {"logprobs": 20},
        {"repetition_penalty": 1.4, "logprobs": 0},
    ]
    inputs = [
        _input(_params(seed=seed + i, **mix, **changes[i % 3]), [1, 2, 3], [i, 7])
        for i, mix in enumerate(warpers)
    ]
    logits = _logits(len(inputs), 1_500, seed, scale=(0.05, 1.0, 6.0)[seed % 3])
    if seed % 2:
        logits = logits.round()
    logits[:, seed::3] = -math.inf
    for eos in ((), (0, 8)):
        together = _together(logits, inputs, eos, 20)
        alone = _row_after_row(logits, inputs, eos, 20)
        for row, (one, other) in zip(inputs, zip(alone, together, strict=True), strict=True):
            assert one[1] == other[1]
            if row.params.logprobs is not None:
                assert one[3:23] == other[3:23]
                assert one == pytest.approx(other, rel=1e-11)


def test_logits_are_left_as_they_were() -> None:
    logits = _logits(2, 10)
    before = logits.clone()
    params = _params(logit_bias=((1, 5.0),), min_tokens=3, top_p=0.5, repetition_penalty=2.0)
    sample(logits, [_input(params, [1], [2]), _input(_greedy(logprobs=3))], (4,))
    assert torch.equal(logits, before)


_PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((0, 3.0), (5, -100.0))]),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.sampled_from([(), (3, 4)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)
_HISTORY = st.lists(st.integers(0, 22), max_size=8)
_INPUTS = st.builds(SampleInput, _PARAMS, _HISTORY, _HISTORY)


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.lists(_INPUTS, min_size=1, max_size=7),
    seed=st.integers(0, 2**31),
    coarse=st.booleans(),
)
def test_a_row_is_sampled_as_if_it_were_alone(
    *, inputs: list[SampleInput], seed: int, coarse: bool
) -> None:
    """Promise: a request's tokens and log-probabilities do not depend on what shares its batch. Coarse logits have many ties."""
    logits = _logits(len(inputs), 23, seed)
    if coarse:
        logits = logits.round()
    together = sample(logits, inputs, (1, 2))
    alone = [sample(logits[i : i + 1], [row], (1, 2))[0] for i, row in enumerate(inputs)]
    assert [_rounded(sampled) for sampled in together] == [_rounded(sampled) for sampled in alone]
    assert sample(logits, inputs, (1, 2)) == together


def _rounded(sampled: Sampled) -> tuple[object, ...]:
    """Log-probabilities to far beyond float32: the last bit of a float64 may depend on where in memory a row begins."""
    if sampled.logprobs is None:
        return (sampled.token_id,)
    entries = (sampled.logprobs.chosen, *sampled.logprobs.top)
    return (sampled.token_id, *((t.token_id, round(t.logprob, 11)) for t in entries))
