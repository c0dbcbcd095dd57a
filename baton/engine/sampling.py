"""Chooses tokens from logits: a pure function of (logits, parameters, history, seed, choice, output position).

Order: logit bias; penalties (repetition, presence, frequency); ends masked before min_tokens; then the most likely token where
temperature is 0, else temperature, top-k, top-p, min-p and one draw. The draw inverts the cumulative distribution over the kept
tokens in token-id order, at the one number that `baton.engine.noise` gives for the position.

Who is kept among equals, so that a tie depends on neither batch nor device:
    greedy       the lowest id
    top-k        every token as likely as the k-th
    top-p        lowest ids first, until the probability before a token reaches top_p; the first always
    min-p        by value alone; the most likely always
    logprobs     most likely first, then lowest ids

Called from the engine thread. Each row is computed from itself alone, in float64 where more than an argmax is asked of it: on a
CPU row after row (`baton.engine.rows`), elsewhere all rows of a stage together. A row whose logits are NaN or +inf anywhere, or all
-inf, raises `InternalError` for the whole call; the engine then runs the rows one by one, so that only the broken one fails.

Shapes: B rows of the batch, V tokens of the vocabulary, R rows that a stage concerns, E (row, token) entries.
Parameters cross to the device per stage; results cross back once.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from baton.engine import rows as one_row
from baton.engine.batch import Sampled, SampleInput
from baton.engine.noise import uniform
from baton.errors import InternalError
from baton.types import PositionLogprobs, SamplingParams, TokenLogprob

_LARGEST = torch.finfo(torch.float64).max


def sample(
    logits: Tensor, inputs: Sequence[SampleInput], eos_token_ids: tuple[int, ...]
) -> list[Sampled]:
    """The next token of each row; result i belongs to row i. `logits` is not changed."""
    # logits: [B, V] float32
    assert logits.dtype == torch.float32
    assert logits.ndim == 2
    assert logits.shape[0] == len(inputs)
    if not inputs:
        return []
    alternatives = min(max(row.params.logprobs or 0 for row in inputs), logits.shape[1])
    complete = _row_after_row if logits.device.type == "cpu" else _together
    table = complete(logits, inputs, eos_token_ids, alternatives)
    broken = [i for i, entry in enumerate(table) if not math.isfinite(entry[0])]
    if broken:
        raise InternalError(f"no token can be chosen from the logits of batch rows {broken}")
    return [
        Sampled(int(entry[1]), _position(row, entry[1:], alternatives))
        for row, entry in zip(inputs, table, strict=True)
    ]


def _row_after_row(
    logits: Tensor,
    inputs: Sequence[SampleInput],
    eos_token_ids: tuple[int, ...],
    alternatives: int,
) -> list[list[float]]:
    """Of each row: a number that is finite where a token could be chosen, the token, and its log-probabilities where any row asks
    for them.
    """
    # A NaN is the maximum of its row; the first of equals wins. numpy finds it ten times as fast as torch.
    values = logits.numpy()
    chosen = values.argmax(axis=-1)  # [B]
    table = []
    for i, (row, token) in enumerate(zip(inputs, chosen.tolist(), strict=True)):
        health = float(values[i, token])
        entry: list[float] = [health, token]
        if math.isfinite(health) and not _is_plain(row, eos_token_ids):
            scores = logits[i : i + 1].double()
            _adjust(scores, [row], eos_token_ids)
            likeliest = int(scores[0].numpy().argmax())
            best = scores[0, likeliest]
            entry = [float(best), likeliest]
            if row.params.temperature > 0 and math.isfinite(entry[0]):
                noise = uniform(row.params.seed, row.params.choice, len(row.output))
                entry[1] = one_row.draw((scores[0] - best).numpy(), row.params, noise)
        if math.isfinite(entry[0]) and row.params.logprobs is not None:
            own, top, others = one_row.logprobs(values[i], int(entry[1]), alternatives)
            entry += [own, *top.tolist(), *others]
        table.append(entry)
    return table


def _together(
    logits: Tensor,
    inputs: Sequence[SampleInput],
    eos_token_ids: tuple[int, ...],
    alternatives: int,
) -> list[list[float]]:
    """As `_row_after_row`."""
    peak, chosen = logits.max(dim=-1)  # [B], [B]
    health = peak.double()
    shaped = [i for i, row in enumerate(inputs) if not _is_plain(row, eos_token_ids)]
    if shaped:
        rows = torch.tensor(shaped, device=logits.device)
        shaped_inputs = [inputs[i] for i in shaped]
        scores = logits[rows].double()
        _adjust(scores, shaped_inputs, eos_token_ids)
        best, tokens = _choose(scores, shaped_inputs)
        health[rows] = torch.where(best.isfinite(), health[rows], best)
        chosen[rows] = tokens
    columns = [health[:, None], chosen.double()[:, None]]  # ids are exact in float64
    asked = [i for i, row in enumerate(inputs) if row.params.logprobs is not None]
    if asked:
        rows = torch.tensor(asked, device=logits.device)
        reported = _logprobs(logits[rows], chosen[rows], alternatives)
        columns.append(reported.new_zeros(len(inputs), reported.shape[1]))
        columns[-1][rows] = reported
    table: list[list[float]] = torch.cat(columns, dim=1).tolist()
    return table


def is_adjusted(row: SampleInput, eos_token_ids: tuple[int, ...]) -> bool:
    """Whether bias, penalties or masks change the row's scores."""
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or _masked_ends(row, eos_token_ids)
    )


def _is_plain(row: SampleInput, eos_token_ids: tuple[int, ...]) -> bool:
    """Whether the row's token is simply the most likely one."""
    return row.params.temperature == 0 and not is_adjusted(row, eos_token_ids)


def _masked_ends(row: SampleInput, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that would end the output too early."""
    params = row.params
    if len(row.output) >= params.min_tokens:
        return ()
    return params.stop_token_ids + (() if params.ignore_eos else eos_token_ids)


def _adjust(scores: Tensor, inputs: Sequence[SampleInput], eos_token_ids: tuple[int, ...]) -> None:
    """Applies bias, penalties and masks in place."""
    # scores: [R, V] float64
    numbered = [(i, row, row.params) for i, row in enumerate(inputs)]
    bias = [(i, token, value) for i, _, params in numbered for token, value in params.logit_bias]
    if bias:
        at, value = _entries(bias, scores)
        scores[at] += value
    repeated = [
        (i, token, params.repetition_penalty)
        for i, row, params in numbered
        if params.repetition_penalty != 1
        for token in {*row.prompt, *row.output}
    ]
    if repeated:
        at, penalty = _entries(repeated, scores)
        changed = torch.where(scores[at] < 0, scores[at] * penalty, scores[at] / penalty)
        # An extreme penalty overflows; it must not break the row.
        scores[at] = changed.clamp(-_LARGEST, _LARGEST)
    counted = [
        (i, token, params.presence_penalty + params.frequency_penalty * count)
        for i, row, params in numbered
        if params.presence_penalty or params.frequency_penalty
        for token, count in Counter(row.output).items()
    ]
    if counted:
        at, value = _entries(counted, scores)
        scores[at] -= value
    ends = [(i, token, 0.0) for i, row, _ in numbered for token in _masked_ends(row, eos_token_ids)]
    if ends:
        at, _ = _entries(ends, scores)
        scores[at] = -math.inf


def _entries(
    entries: list[tuple[int, int, float]], like: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, token, value) triples as an index of [E] entries and their values."""
    rows, tokens, values = zip(*entries, strict=True)
    index = (torch.tensor(rows, device=like.device), torch.tensor(tokens, device=like.device))
    return index, torch.tensor(values, dtype=like.dtype, device=like.device)


def _choose(scores: Tensor, inputs: Sequence[SampleInput]) -> tuple[Tensor, Tensor]:
    """Each row's best score [R] and chosen token [R]."""
    # scores: [R, V] float64
    best, chosen = scores.max(dim=-1)
    drawn = [i for i, row in enumerate(inputs) if row.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=scores.device)
        chosen[rows] = _draw((scores - best[:, None])[rows], [inputs[i] for i in drawn])
    return best, chosen


def _draw(scores: Tensor, inputs: Sequence[SampleInput]) -> Tensor:
    """One token per row [R]. Precondition: each row's best score is 0."""
    # scores: [R, V] float64
    cumulative = _weights(scores, [row.params for row in inputs]).cumsum(dim=-1)
    total = cumulative[:, -1:]  # [R, 1]
    noise = [uniform(row.params.seed, row.params.choice, len(row.output)) for row in inputs]
    # Strictly below the total and strictly exceeded: a token of no weight is never found.
    below_total = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(_column(noise, scores) * total, below_total)
    return torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[1] - 1)[:, 0]


def _weights(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """Each token's probability relative to its row's likeliest, by temperature, top-k, top-p and min-p; 0 where dropped."""
    # scores: [R, V] float64; the best of a row is 0, so that a tiny temperature makes no NaN
    scores = scores / _column([p.temperature for p in params], scores)
    top_k = [i for i, p in enumerate(params) if 0 < p.top_k < scores.shape[1]]
    if top_k:
        rows = torch.tensor(top_k, device=scores.device)
        scores[rows] = _keep_top_k(scores[rows], [params[i].top_k for i in top_k])
    top_p = [i for i, p in enumerate(params) if p.top_p < 1]
    if top_p:
        rows = torch.tensor(top_p, device=scores.device)
        scores[rows] = _keep_top_p(scores[rows], [params[i].top_p for i in top_p])
    weights = scores.exp()
    return weights.masked_fill(weights < _column([p.min_p for p in params], scores), 0)


def _keep_top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    # scores: [R, V] float64
    best = scores.topk(max(top_k)).values  # [R, max k], descending
    kth = best.gather(1, torch.tensor(top_k, device=scores.device)[:, None] - 1)  # [R, 1]
    return scores.masked_fill(scores < kth, -math.inf)


def _keep_top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    # scores: [R, V] float64
    limit = _column(top_p, scores) * scores.exp().cumsum(dim=-1)[:, -1:]  # [R, 1]
    best = scores.sort(dim=-1, descending=True).values  # [R, V]
    before = F.pad(best.exp().cumsum(dim=-1)[:, :-1], (1, 0))
    count = (before < limit).sum(dim=-1, keepdim=True).clamp(min=1)  # [R, 1]
    last = best.gather(1, count - 1)  # [R, 1]
    above, equal = scores > last, scores == last
    room = count - above.sum(dim=-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=-1) <= room))
    return scores.masked_fill(~kept, -math.inf)


def _column(values: list[float], like: Tensor) -> Tensor:
    """[R, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprobs(logits: Tensor, chosen: Tensor, alternatives: int) -> Tensor:
    """By the raw logits: the chosen token's log-probability, the ids of the likeliest tokens, their log-probabilities."""
    # logits: [R, V] float32, chosen [R], result [R, 1 + 2 * alternatives] float64
    logprobs = logits.double().log_softmax(dim=-1)
    tokens = _likeliest(logits, alternatives)
    reported = logprobs.gather(1, torch.cat([chosen[:, None], tokens], dim=1))
    return torch.cat([reported[:, :1], tokens.double(), reported[:, 1:]], dim=1)


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Token ids [R, count], best first, lowest ids first among equals: a top-k over unique integers has but one answer."""
    # logits: [R, V] float32
    bits = (logits + 0.0).view(torch.int32).long()  # adding makes -0.0 the 0.0 that it equals
    ordered = torch.where(
        bits < 0, bits ^ 0x7FFF_FFFF, bits
    )  # as integers, in the order of the floats
    last = logits.shape[1] - 1
    keys = (ordered << 32) + last - torch.arange(last + 1, device=logits.device)
    return last - (keys.topk(count).values & 0xFFFF_FFFF)


def _position(row: SampleInput, entry: list[float], alternatives: int) -> PositionLogprobs | None:
    """Reads one row of [token, its log-probability, token ids, log-probabilities]."""
    wanted = row.params.logprobs
    if wanted is None:
        return None
    ids, logprobs = entry[2 : 2 + alternatives], entry[2 + alternatives :]
    top = tuple(
        TokenLogprob(int(token), logprob)
        for token, logprob in zip(ids[:wanted], logprobs[:wanted], strict=True)
    )
    return PositionLogprobs(TokenLogprob(int(entry[0]), entry[1]), top)
