"""The CUDA sampling kernels choose what the sampler of every other engine chooses; in Triton's interpreter where there is no device."""

import math
import random

import numpy as np
import pytest
import torch

from baton.engine.batch import SampleInput
from baton.engine.sampling import sample
from baton.types import SamplingParams

from tests.cuda_rig import DEVICE  # isort: skip - first: it chooses the interpreter

from baton.engine.cuda.plan import HEADER, INTEGERS, Wish, put_wishes
from baton.engine.cuda.sampling import SamplingScratch, Wishes, choose, wish_of

VOCAB = 700


def chosen_by_kernels(logits: torch.Tensor, wishes: list[Wish]) -> torch.Tensor:
    rows, vocab_size = logits.shape
    header = np.zeros((len(HEADER), rows), np.int64)
    put_wishes(header, wishes)
    sent = torch.from_numpy(header).to(DEVICE)
    temperature, top_p, min_p, noise = sent[len(INTEGERS) :].view(torch.float64)
    return choose(
        logits.to(DEVICE),
        Wishes(
            top_k=sent[HEADER.index("top_k")],
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            noise=noise,
        ),
        SamplingScratch.allocate(rows=rows, vocab_size=vocab_size, device=DEVICE),
    )


def chosen_by_both(
    logits: torch.Tensor, params: list[SamplingParams], position: int
) -> tuple[list[int], list[int]]:
    """By the kernels, and by the sampler."""
    rows = [SampleInput(one, (1,), [5] * position) for one in params]
    wishes = [wish_of(row, (2,)) for row in rows]
    ours = chosen_by_kernels(logits, [wish for wish in wishes if wish])
    expected = sample(logits.float(), rows, (2,))
    return ours.tolist(), [one.token_id for one in expected]


PARAMS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 20.0},
    "nearly-greedy": {"temperature": 1e-6},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-1": {"temperature": 1.0, "top_k": 1},
    "top-k-beyond-all": {"temperature": 2.0, "top_k": VOCAB + 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "narrow-top-p": {"temperature": 1.0, "top_p": 1e-9},
    "wide-top-p": {"temperature": 9.0, "top_p": 0.999},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 60, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("seed", range(2))
def test_kernels_choose_the_token_that_the_sampler_chooses(seed: int) -> None:
    """Whatever the rows of a batch ask for."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(PARAMS), VOCAB, generator=generator)
    params = [
        SamplingParams(max_tokens=9, seed=seed, ignore_eos=True, **kind)  # type: ignore[arg-type]
        for kind in PARAMS.values()
    ]
    ours, expected = chosen_by_both(logits, params, position=seed)
    assert ours == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_among_equals_the_same_are_kept(dtype: torch.dtype) -> None:
    """Half-precision logits of a large vocabulary are full of ties."""
    rng = random.Random(7)
    names = ("greedy", "top-k", "top-p", "all")
    logits = torch.tensor(
        [[rng.choice((0.0, -0.0, 1.0, 2.0, -3.0)) for _ in range(VOCAB)] for _ in names]
    )
    params = [
        SamplingParams(max_tokens=9, seed=5, ignore_eos=True, **PARAMS[name])  # type: ignore[arg-type]
        for name in names
    ]
    ours, expected = chosen_by_both(logits.to(dtype), params, position=0)
    assert ours == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_from_which_no_token_can_be_chosen_is_told_apart(temperature: float) -> None:
    logits = torch.randn(4, VOCAB)
    logits[0, 650] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, 100:] = -math.inf
    row = SampleInput(SamplingParams(max_tokens=1, temperature=temperature), (1,), ())
    wish = wish_of(row, ())
    assert wish is not None
    ours = chosen_by_kernels(logits, [wish] * 4).tolist()
    assert ours[:3] == [-1, -1, -1]
    assert 0 <= ours[3] < 100


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"logit_bias": ((3, 1.0),)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"min_tokens": 2},
    ],
)
def test_rows_that_ask_for_more_are_left_to_the_sampler(params: dict[str, object]) -> None:
    row = SampleInput(SamplingParams(max_tokens=9, **params), (1,), ())  # type: ignore[arg-type]
    assert wish_of(row, (2,)) is None
