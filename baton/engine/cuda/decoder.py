"""The decoder of `baton.engine.model`, on the same weights, with its element-wise work fused and attention in the pool.

Legend: T tokens of the step, R wanted tokens, E hidden size, H heads, G KV heads, D head size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from baton.engine.cuda.attention import HeadShape
from baton.engine.cuda.layers import add_rms_norm, rotate_and_store, swiglu
from baton.engine.layers import Norm, RMSNorm, Rope
from baton.engine.model import MLP, Decoder, GatedMLP
from baton.kv.pool import LayerKV


class AttendedRows(Protocol):
    """How a step's tokens see the pool: `DecodeRows` or `PrefillRows`."""

    def attend(
        self, qkv: Tensor, kv: LayerKV, *, shape: HeadShape, window: int | None, scale: float
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is computed at once, as tensors on the device."""

    token_ids: Tensor
    """[T]."""
    positions: Tensor
    """[T]."""
    slots: Tensor
    """[T]; negative where a token pads the batch and has no place in the pool."""
    rows: AttendedRows
    wanted: Tensor | None
    """[R]: flat indices of the tokens whose logits are asked for; None: of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDecoder:
    """Tokens to logits. Holds no tensor of its own."""

    decoder: Decoder
    layers: tuple[LayerKV, ...]
    shape: HeadShape

    def __call__(self, step: Step) -> Tensor:
        """Writes the step's KV to the pool; returns logits in the model's type."""
        # -> [R, V]
        decoder = self.decoder
        residual = decoder.embedding(step.token_ids)
        rotation = None
        if isinstance(decoder.positions, Rope):
            rotation = decoder.positions(step.positions, torch.float32)
        else:
            residual = residual + functional.embedding(step.positions, decoder.positions)
        branch = None
        for block, kv in zip(decoder.blocks, self.layers, strict=True):
            attention = block.attention
            x, residual = _add_norm(block.attention_norm, residual, branch)
            qkv = attention.qkv(x).view(len(x), -1, self.shape.head_dim)
            rotate_and_store(
                qkv, kv, step.slots, shape=self.shape, rotation=rotation, norm=attention.qk_norm
            )
            mixed = step.rows.attend(
                qkv, kv, shape=self.shape, window=attention.window, scale=attention.scale
            )
            branch = attention.out(mixed.view(len(x), -1))
            x, residual = _add_norm(block.mlp_norm, residual, branch)
            branch = _mlp(block.mlp, x)
        if step.wanted is not None:
            residual = residual[step.wanted]
            branch = None if branch is None else branch[step.wanted]
        x, _ = _add_norm(decoder.norm, residual, branch)
        return decoder.head(x)


def _add_norm(norm: Norm, residual: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum, normalized, and the sum."""
    if isinstance(norm, RMSNorm):
        return add_rms_norm(norm, residual, branch), residual
    total = residual if branch is None else residual + branch
    return norm(total), total


def _mlp(mlp: GatedMLP | MLP, x: Tensor) -> Tensor:
    if isinstance(mlp, GatedMLP) and mlp.activation is functional.silu:
        return mlp.down(swiglu(mlp.gate_up(x)))
    return mlp(x)
