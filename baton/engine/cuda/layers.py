"""Launches the layer kernels. See `baton.engine.cuda.kernels.layers`.

Legend: T tokens, E hidden size, F intermediate size, H heads, G KV heads, D head size.
"""

import torch
from torch import Tensor

from baton.engine.cuda.attention import HeadShape
from baton.engine.cuda.kernels.layers import (
    add_rms_norm_kernel,
    rotate_and_store_kernel,
    swiglu_kernel,
)
from baton.engine.layers import RMSNorm, Rotation
from baton.kv.pool import LayerKV

_SWIGLU_TILE = 1024


def add_rms_norm(norm: RMSNorm, residual: Tensor, branch: Tensor | None) -> Tensor:
    """Adds the branch to the residual, in place, and returns the sum normalized."""
    # residual, branch: [T, E], contiguous -> [T, E]
    tokens, width = residual.shape
    out = torch.empty_like(residual)
    add_rms_norm_kernel[(tokens,)](
        residual if branch is None else branch,
        residual,
        norm.weight,
        out,
        norm.eps,
        ADD=branch is not None,
        E=width,
        E_PAD=1 << (width - 1).bit_length(),
        num_warps=8 if width > 2048 else 4,
    )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    # [T, 2 * F] -> [T, F]
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    grid = (tokens, -(-width // _SWIGLU_TILE))
    swiglu_kernel[grid](gate_up, out, F=width, TILE=_SWIGLU_TILE, num_warps=4)
    return out


def rotate_and_store(
    qkv: Tensor,
    kv: LayerKV,
    slots: Tensor,
    *,
    shape: HeadShape,
    rotation: Rotation | None,
    norm: RMSNorm | None,
) -> None:
    """Normalizes and rotates the queries, in place, and the keys; stores keys and values in the pool. A negative slot stores nothing."""
    # qkv: [T, H + 2 * G, D], contiguous  slots: [T]
    tokens, heads, head_dim = qkv.shape
    rotate_and_store_kernel[(tokens,)](
        qkv,
        qkv if rotation is None else rotation.cos,
        qkv if rotation is None else rotation.sin,
        qkv if norm is None else norm.weight,
        slots,
        kv.keys,
        kv.values,
        0.0 if norm is None else norm.eps,
        ROTATE=rotation is not None,
        NORM=norm is not None,
        CLAMP=qkv.dtype == torch.float16,
        H=shape.num_heads,
        G=shape.num_kv_heads,
        D=head_dim,
        HEADS_PAD=1 << (heads - 1).bit_length(),
        HALF_PAD=1 << (head_dim // 2 - 1).bit_length(),
        num_warps=4 if heads * head_dim <= 4096 else 8,
    )
