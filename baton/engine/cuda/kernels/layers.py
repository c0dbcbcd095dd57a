"""A layer's element-wise work, fused so that each activation crosses device memory once. All arithmetic is in float32.

Legend: T tokens, E hidden size, F intermediate size, H heads, G KV heads, D head size.
"""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    branch,  # [T, E]; what the layer adds
    residual,  # [T, E]; the sum replaces it
    weight,  # [E]
    out,  # [T, E]
    eps,
    ADD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
):
    column = tl.arange(0, E_PAD)
    there = column < E
    at = tl.program_id(0).to(tl.int64) * E + column
    x = tl.load(residual + at, mask=there, other=0.0)
    if ADD:
        # Rounded as it is stored: what is normalized is what later layers read.
        total = x.to(tl.float32) + tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
        tl.store(residual + at, x, mask=there)
    x = x.to(tl.float32)
    rms = tl.sqrt(tl.sum(x * x, 0) / E + eps)
    scaled = x / rms * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=there)


@triton.jit
def swiglu_kernel(
    gate_up,  # [T, 2 * F]
    out,  # [T, F]
    F: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < F
    gate = tl.load(gate_up + token * 2 * F + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * F + F + column, mask=there, other=0.0)
    # Rounded between the two factors, as two operations would.
    active = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    product = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out + token * F + column, product.to(up.dtype), mask=there)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rotate_and_store_kernel(
    heads,  # [T, H + 2 * G, D]: queries, keys, values; the queries are rotated in place
    cosines,  # [T, D] float32
    sines,  # [T, D] float32; the first half negated
    norm_weight,  # [H + G, D]
    slots,  # [T]; negative: the token has no place in the pool
    keys,  # [blocks * S, G, D]
    values,
    eps,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    CLAMP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    half: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head, dim = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, HALF_PAD)[None, :]
    there = (head < H + 2 * G) & (dim < half)
    turned = there & (head < H + G)
    at = heads + (token * (H + 2 * G) + head) * D + dim
    stored_a = tl.load(at, mask=there, other=0.0)
    stored_b = tl.load(at + half, mask=there, other=0.0)
    a, b = stored_a.to(tl.float32), stored_b.to(tl.float32)
    if NORM:
        rms = tl.sqrt(tl.sum(a * a + b * b, 1) / D + eps)[:, None]
        scale_a = tl.load(norm_weight + head * D + dim, mask=turned, other=0.0).to(tl.float32)
        scale_b = tl.load(norm_weight + head * D + half + dim, mask=turned, other=0.0).to(
            tl.float32
        )
        a = tl.where(head < H + G, a / rms * scale_a, a)
        b = tl.where(head < H + G, b / rms * scale_b, b)
    if ROTATE:
        cosine = tl.load(cosines + token * D + dim, mask=dim < half, other=0.0)
        sine = tl.load(sines + token * D + half + dim, mask=dim < half, other=0.0)
        rotated_a = a * cosine - b * sine
        rotated_b = b * cosine + a * sine
        a = tl.where(head < H + G, rotated_a, a)
        b = tl.where(head < H + G, rotated_b, b)
    if ROTATE or NORM:
        tl.store(at, a.to(stored_a.dtype), mask=there & (head < H))
        tl.store(at + half, b.to(stored_b.dtype), mask=there & (head < H))
    if CLAMP:
        # What overflows float16 must not outlive its sequence in the pool.
        a = tl.where(a != a, 0.0, tl.minimum(tl.maximum(a, -65504.0), 65504.0))
        b = tl.where(b != b, 0.0, tl.minimum(tl.maximum(b, -65504.0), 65504.0))
    slot = tl.load(slots + token).to(tl.int64)
    is_key = there & (head >= H) & (head < H + G) & (slot >= 0)
    to_key = keys + (slot * G + head - H) * D + dim
    tl.store(to_key, a.to(stored_a.dtype), mask=is_key)
    tl.store(to_key + half, b.to(stored_b.dtype), mask=is_key)
    is_value = there & (head >= H + G) & (slot >= 0)
    to_value = values + (slot * G + head - H - G) * D + dim
    tl.store(to_value, a.to(stored_a.dtype), mask=is_value)
    tl.store(to_value + half, b.to(stored_b.dtype), mask=is_value)
