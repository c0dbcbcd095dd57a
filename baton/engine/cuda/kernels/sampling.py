"""Chooses tokens on the device, as `baton.engine.sampling` does, without a sort.

`peaks_kernel` finds the likeliest token of each stretch of the vocabulary; `choose_kernel` takes the likeliest of those, or draws. What
top-k and top-p keep ends at one score, which is found digit by digit: scores are ordered as integers are.

Legend: R rows, V tokens of the vocabulary, P stretches of it. Sums are in float64.
"""

import triton
import triton.language as tl

_NOWHERE = tl.constexpr(2**31 - 1)
_LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def peaks_kernel(
    logits,  # [R, V]
    peaks,  # [R, P] float32; +inf stands for NaN as well
    places,  # [R, P] int32
    V: tl.constexpr,
    P: tl.constexpr,
    STRETCH: tl.constexpr,
):
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = stretch * STRETCH + tl.arange(0, STRETCH)
    there = token < V
    score = tl.load(logits + row * V + token, mask=there, other=float("-inf")).to(tl.float32)
    score = tl.where(score != score, float("inf"), score)
    peak = tl.max(score, 0)
    tl.store(peaks + row * P + stretch, peak)
    # Among equals, the lowest id.
    place = tl.min(tl.where((score == peak) & there, token, _NOWHERE), 0)
    tl.store(places + row * P + stretch, place)


@triton.jit
def _scores(logits, row, first, V: tl.constexpr, TILE: tl.constexpr):
    """A tile of a row's scores, as integers of the same order."""
    token = first + tl.arange(0, TILE)
    score = tl.load(logits + row * V + token, mask=token < V, other=float("-inf")).to(tl.float32)
    # Adding makes -0.0 the 0.0 that it equals.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return token, key


@triton.jit
def _last_kept(
    logits,
    weights,
    row,
    target,
    lowest,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
):
    """The greatest key such that the tokens at or above it, and at or above `lowest`, number `target` or weigh it."""
    last = tl.full([], _LOWEST_KEY, tl.int64)
    unit = tl.full([], 1 << 30, tl.int64)
    for _ in range(16):
        one = tl.zeros([TILE], tl.float64)
        two = tl.zeros([TILE], tl.float64)
        three = tl.zeros([TILE], tl.float64)
        for first in range(0, V, TILE):
            token, key = _scores(logits, row, first, V, TILE)
            there = (token < V) & (key >= lowest)
            if COUNT:
                share = there.to(tl.float64)
            else:
                share = tl.load(weights + row * V + token, mask=there, other=0.0)
            one += tl.where(key >= last + unit, share, 0.0)
            two += tl.where(key >= last + 2 * unit, share, 0.0)
            three += tl.where(key >= last + 3 * unit, share, 0.0)
        steps = (tl.sum(one, 0) >= target).to(tl.int64)
        steps += (tl.sum(two, 0) >= target).to(tl.int64)
        steps += (tl.sum(three, 0) >= target).to(tl.int64)
        last += steps * unit
        unit = unit >> 2
    return last


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps", "noise"])
def choose_kernel(
    logits,  # [R, V]
    peaks,  # [R, P]
    places,  # [R, P]
    temperatures,  # [R] float64; 0: the likeliest token
    top_ks,  # [R] int64; 0: all
    top_ps,  # [R] float64
    min_ps,  # [R] float64
    noise,  # [R] float64 in [0, 1)
    weights,  # [R, V] float64, scratch
    chosen,  # [R] int64; -1: no token can be chosen
    V: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, P_PAD)
    peak = tl.load(peaks + row * P + stretch, mask=stretch < P, other=float("-inf"))
    place = tl.load(places + row * P + stretch, mask=stretch < P, other=_NOWHERE)
    best = tl.max(peak, 0)
    token_id = tl.min(tl.where(peak == best, place, _NOWHERE), 0).to(tl.int64)
    healthy = (best > float("-inf")) & (best < float("inf"))
    temperature = tl.load(temperatures + row)
    if healthy & (temperature > 0):
        top = best.to(tl.float64)
        for first in range(0, V, TILE):
            token = first + tl.arange(0, TILE)
            score = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
            weight = tl.exp((score.to(tl.float32).to(tl.float64) - top) / temperature)
            tl.store(weights + row * V + token, weight, mask=token < V)
        # Programs of a row are one; its threads read what others of them have written.
        tl.debug_barrier()
        top_k = tl.load(top_ks + row)
        lowest = tl.full([], _LOWEST_KEY, tl.int64)
        if (top_k > 0) & (top_k < V):
            lowest = _last_kept(logits, weights, row, top_k.to(tl.float64), lowest, True, V, TILE)
        top_p = tl.load(top_ps + row)
        cut = lowest - 1
        room = tl.full([], V, tl.float64)
        if top_p < 1:
            above = tl.zeros([TILE], tl.float64)
            for first in range(0, V, TILE):
                token, key = _scores(logits, row, first, V, TILE)
                there = (token < V) & (key >= lowest)
                above += tl.load(weights + row * V + token, mask=there, other=0.0)
            limit = top_p * tl.sum(above, 0)
            cut = _last_kept(logits, weights, row, limit, lowest, False, V, TILE)
            # Of the tokens at the cut, the lowest ids are kept until the limit is reached.
            above = tl.zeros([TILE], tl.float64)
            equal = tl.zeros([TILE], tl.float64)
            for first in range(0, V, TILE):
                token, key = _scores(logits, row, first, V, TILE)
                there = (token < V) & (key >= lowest)
                weight = tl.load(weights + row * V + token, mask=there, other=0.0)
                above += tl.where(key > cut, weight, 0.0)
                equal = tl.maximum(equal, tl.where(key == cut, weight, 0.0))
            room = tl.ceil((limit - tl.sum(above, 0)) / tl.max(equal, 0))
            room = tl.maximum(room, 1.0)
        min_p = tl.load(min_ps + row)
        total = tl.zeros([], tl.float64)
        ties = tl.zeros([], tl.float64)
        for first in range(0, V, TILE):
            token, key = _scores(logits, row, first, V, TILE)
            tied = (key == cut).to(tl.float64)
            kept = (key > cut) | ((key == cut) & (ties + tl.cumsum(tied, 0) <= room))
            kept = kept & (key >= lowest) & (token < V)
            weight = tl.load(weights + row * V + token, mask=kept, other=0.0)
            weight = tl.where(weight >= min_p, weight, 0.0)
            tl.store(weights + row * V + token, weight, mask=token < V)
            total += tl.sum(weight, 0)
            ties += tl.sum(tied, 0)
        tl.debug_barrier()
        # Strictly below the total and strictly exceeded, so that a token of no weight is never found.
        target = tl.minimum(tl.load(noise + row) * total, total * (1.0 - 2.0**-53))
        before = tl.zeros([], tl.float64)
        found = tl.full([], _NOWHERE, tl.int32)
        last = tl.full([], 0, tl.int32)
        for first in range(0, V, TILE):
            token = first + tl.arange(0, TILE)
            weight = tl.load(weights + row * V + token, mask=token < V, other=0.0)
            reached = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
            found = tl.minimum(found, tl.min(tl.where(reached, token, _NOWHERE), 0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0), 0))
            before += tl.sum(weight, 0)
        # Sums of another order may end a rounding below the target.
        token_id = tl.minimum(found, last).to(tl.int64)
    tl.store(chosen + row, tl.where(healthy, token_id, -1))
