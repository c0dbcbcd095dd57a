"""The decoder: one for the Llama family and GPT-2, which differ in the parts that they are built of (`baton.engine.weights`).

Legend: T tokens of the flat batch, R sampled rows, E hidden size, H heads, G KV heads, D head size, F intermediate size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from baton.engine.attention import BatchPlan, attend
from baton.engine.layers import Activation, Norm, RMSNorm, Rope, Rotation
from baton.kv.pool import KVPool, LayerKV


class Projection(Protocol):
    """x Wᵀ + b."""

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, in] -> [T, out]
        ...


class Embedding(Protocol):
    """Rows of a matrix, in the dtype of activations."""

    def __call__(self, index: Tensor) -> Tensor:
        # index: [T] -> [T, E]
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Multi-head attention; each group of H / G query heads shares one KV head."""

    qkv: Projection
    """E -> (H + G + G) * D."""
    qk_norm: RMSNorm | None
    """[H + G, D]."""
    out: Projection
    """H * D -> E."""
    num_heads: int
    num_kv_heads: int
    window: int | None
    scale: float

    def __call__(
        self, x: Tensor, *, rotation: Rotation | None, plan: BatchPlan, kv: LayerKV
    ) -> Tensor:
        # x: [T, E] -> [T, E]
        values = self.num_heads + self.num_kv_heads
        heads = self.qkv(x).view(len(x), values + self.num_kv_heads, -1)
        qk, v = heads[:, :values], heads[:, values:]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rotation is not None:
            qk = rotation(qk)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        y = attend(q, k, v, plan=plan, kv=kv, window=self.window, scale=self.scale)
        return self.out(y.view(len(x), -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    gate_up: Projection
    """E -> 2 * F."""
    down: Projection
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, E] -> [T, E]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """down(act(up(x)))."""

    up: Projection
    """E -> F."""
    down: Projection
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, E] -> [T, E]
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: GatedMLP | MLP

    def __call__(
        self, x: Tensor, *, rotation: Rotation | None, plan: BatchPlan, kv: LayerKV
    ) -> Tensor:
        # x: [T, E] -> [T, E]
        x = x + self.attention(self.attention_norm(x), rotation=rotation, plan=plan, kv=kv)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Tokens to logits, over paged KV."""

    embedding: Embedding
    positions: Tensor | Rope
    """Learned, [positions, E], or rotary."""
    blocks: tuple[Block, ...]
    norm: Norm
    head: Projection
    """E -> V."""

    def __call__(self, plan: BatchPlan, pool: KVPool) -> Tensor:
        """Computes a step: writes its KV to the pool; returns the logits of the sampled rows."""
        # -> [R, V], float32
        x = self.embedding(plan.token_ids)
        rotation = None
        if isinstance(self.positions, Rope):
            rotation = self.positions(plan.positions, x.dtype)
        else:
            x = x + functional.embedding(plan.positions, self.positions)
        for block, kv in zip(self.blocks, pool.layers, strict=True):
            x = block(x, rotation=rotation, plan=plan, kv=kv)
        return self.head(self.norm(x[plan.sampled])).to(torch.float32)
