"""Chooses the token of one row on a CPU: what `baton.engine.sampling` does for a whole batch on an accelerator, by the same definitions.

A row's vocabulary fits the cache, a batch's does not; and most tokens are dropped before anything is computed for them. Selection
and sorting are numpy's, which are many times as fast as torch's here. A row is computed from itself alone.

Called from the engine thread. Shapes: scores and logits are [V], a vocabulary; K tokens of it are kept.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from baton.types import SamplingParams

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

_ROUNDING = 1e-9
"""Far more than what sums of weights may be off by, relative to their total."""


def draw(scores: Floats, params: SamplingParams, noise: float) -> int:
    """The token at `noise`, in [0, 1), of the cumulative distribution over the kept tokens. Precondition: the best score is 0."""
    ids, weights = kept(scores, params)
    cumulative = _cumulative(weights)
    total = cumulative[-1]
    # Strictly below the total and strictly exceeded: a token of no weight is never found.
    target = min(noise * total, np.nextafter(total, 0.0))
    found = min(int(np.searchsorted(cumulative, target, side="right")), len(weights) - 1)
    return found if ids is None else int(ids[found])


def kept(scores: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """Tokens that temperature, top-k, top-p and min-p leave, ascending, None where it is all of them; and their probabilities
    relative to the likeliest one's.
    """
    # -> [K], [K]; the best score is 0
    with np.errstate(over="ignore"):
        scores = scores / params.temperature
    ids: Ids | None = None
    if 0 < params.top_k < len(scores):
        border = len(scores) - params.top_k
        ids = np.flatnonzero(scores >= np.partition(scores, border)[border])
        scores = scores[ids]
    weights = np.exp(scores)
    if params.top_p < 1:
        chosen = _reaching(scores, weights, params.top_p)
        ids = chosen if ids is None else ids[chosen]
        weights = weights[chosen]
    if params.min_p > 0:
        chosen = np.flatnonzero(weights >= params.min_p)
        ids = chosen if ids is None else ids[chosen]
        weights = weights[chosen]
    return ids, weights


def _reaching(scores: Floats, weights: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the best scores up to the one whose weight reaches the share of all; at the border the lowest."""
    total = float(_cumulative(weights)[-1])
    # Those below the floor weigh, all together, less than what may be left out.
    spare = 0.5 * (1 - top_p) if 1 - top_p > _ROUNDING else 0.0
    ranked = np.sort(scores[weights >= spare * total / len(scores)])[::-1]
    reached = _cumulative(np.exp(ranked))
    count = 1 + int(np.count_nonzero(reached[:-1] < top_p * total))
    last = ranked[count - 1]
    chosen = np.flatnonzero(scores >= last)
    beyond = len(chosen) - count
    if beyond > 0:
        equal = np.flatnonzero(scores[chosen] == last)
        chosen = np.delete(chosen, equal[len(equal) - beyond :])
    return chosen


def logprobs(
    logits: npt.NDArray[np.float32], token: int, count: int
) -> tuple[float, Ids, list[float]]:
    """By the raw logits: the token's log-probability; the `count` likeliest tokens, lowest ids first among equals; theirs.
    Precondition: the largest is finite.
    """
    peak = np.float64(logits.max())
    log_total = math.log(np.exp(logits.astype(np.float64) - peak).sum())
    top = _likeliest(logits, count)
    shifted = logits[top].astype(np.float64) - peak
    return float(logits[token] - peak) - log_total, top, (shifted - log_total).tolist()


def _likeliest(logits: npt.NDArray[np.float32], count: int) -> Ids:
    if count == 0:
        return np.empty(0, np.intp)
    border = len(logits) - count
    found = np.flatnonzero(logits >= np.partition(logits, border)[border])
    return found[np.argsort(-logits[found], kind="stable")[:count]]


def _cumulative(weights: Floats) -> Floats:
    # torch's running sum is several times as fast as numpy's
    return torch.from_numpy(weights).cumsum(0).numpy()
