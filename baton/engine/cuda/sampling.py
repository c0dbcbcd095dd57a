"""Sampling that needs no word from the host: each row's parameters cross with the step's other inputs, and its token is chosen by the
same kernels whatever they are.

Rows that ask for more than temperature, top-k, top-p and min-p are chosen for by `baton.engine.sampling`. So are the tokens of
every other engine, and both choose alike: `tests/unit/test_cuda_sampling.py`.

Legend: R rows, V tokens of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.batch import SampleInput
from baton.engine.cuda.kernels.sampling import choose_kernel, peaks_kernel
from baton.engine.cuda.plan import LIKELIEST, Wish
from baton.engine.noise import uniform
from baton.engine.sampling import is_adjusted

_STRETCH = 8192
_TILE = 4096


def wish_of(row: SampleInput | None, eos_token_ids: tuple[int, ...]) -> Wish | None:
    """None where the kernels cannot choose the row's token."""
    if row is None:
        return LIKELIEST
    params = row.params
    if params.logprobs is not None or is_adjusted(row, eos_token_ids):
        return None
    if params.temperature == 0:
        return LIKELIEST
    noise = uniform(params.seed, params.choice, len(row.output))
    return Wish(params.top_k, params.temperature, params.top_p, params.min_p, noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The rows' wishes, on the device."""

    top_k: Tensor
    """[R] int64."""
    temperature: Tensor
    """[R] float64, as are those that follow."""
    top_p: Tensor
    min_p: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingScratch:
    """Overwritten by every call; allocated once, since captured graphs know its addresses."""

    peaks: Tensor
    """[R, stretches] float32."""
    places: Tensor
    """[R, stretches] int32."""
    weights: Tensor
    """[R, V] float64."""

    @staticmethod
    def allocate(*, rows: int, vocab_size: int, device: torch.device) -> "SamplingScratch":
        """For calls of at most `rows`."""
        stretches = -(-vocab_size // _STRETCH)
        return SamplingScratch(
            peaks=torch.empty(rows, stretches, dtype=torch.float32, device=device),
            places=torch.empty(rows, stretches, dtype=torch.int32, device=device),
            weights=torch.empty(rows, vocab_size, dtype=torch.float64, device=device),
        )


def choose(logits: Tensor, wishes: Wishes, scratch: SamplingScratch) -> Tensor:
    """Each row's token, or -1 where its logits are NaN or +inf anywhere, or all -inf."""
    # logits: [R, V], contiguous -> [R] int64
    rows, vocab_size = logits.shape
    stretches = scratch.peaks.shape[1]
    chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
    peaks_kernel[(rows, stretches)](
        logits,
        scratch.peaks,
        scratch.places,
        V=vocab_size,
        P=stretches,
        STRETCH=_STRETCH,
        num_warps=8,
    )
    choose_kernel[(rows,)](
        logits,
        scratch.peaks,
        scratch.places,
        wishes.temperature,
        wishes.top_k,
        wishes.top_p,
        wishes.min_p,
        wishes.noise,
        scratch.weights,
        chosen,
        V=vocab_size,
        P=stretches,
        P_PAD=1 << (stretches - 1).bit_length(),
        TILE=_TILE,
        num_warps=16,
    )
    return chosen
