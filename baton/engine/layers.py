"""The decoder's parts, as small callables that hold their weights. Inference only, CPU and CUDA by the same code.

Legend: T tokens of the flat batch, H heads, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from baton.engine.rope import Dynamic, Llama3, LongRope, RopeConfig, Yarn
from baton.engine.rope import Linear as LinearScaling

Activation = Callable[[Tensor], Tensor]


def activation(name: str) -> Activation:
    """By the name that checkpoints use."""
    match name:
        case "silu" | "swish":
            return functional.silu
        case "relu":
            return functional.relu
        case "gelu":
            return functional.gelu
        case _:
            return _gelu_tanh


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


class Linear:
    """x Wᵀ + b, computed in the weight's dtype. On CPU the weight is kept in oneDNN's own layout, which multiplies 1.7 to 3.4 times as
    fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # weight: [out, in]  bias: [out]
        self._dtype = weight.dtype
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._packed = _can_pack(weight)
        self._weight = _MKLDNN._reorder_linear_weight(weight) if self._packed else weight  # noqa: SLF001 torch has no other name

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, in] -> [T, out]
        inputs = x.to(self._dtype)
        if self._packed:
            product: Tensor = _linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        else:
            product = functional.linear(inputs, self._weight, self._bias)
        return product.to(x.dtype)


@dataclass(frozen=True, slots=True)
class FloatRows:
    """Rows of a matrix, in the dtype of activations."""

    weight: Tensor
    """[V, E]."""
    dtype: torch.dtype

    def __call__(self, index: Tensor) -> Tensor:
        # index: [T] -> [T, E]
        return functional.embedding(index, self.weight).to(self.dtype)


_MKLDNN = torch.ops.mkldnn
_linear_pointwise = _MKLDNN._linear_pointwise  # noqa: SLF001 torch has no other name


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_MKLDNN._is_mkldnn_bf16_supported())  # noqa: SLF001 torch has no other name
    return weight.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * w over the last axis."""

    weight: Tensor
    """[D], or [H, D] where every head has its own."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.rms_norm(x, self.weight.shape[-1:], None, self.eps) * self.weight


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * w + b over the last axis."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of one step's tokens: made once, used in every layer."""

    cos: Tensor
    """[T, 1, D]."""
    sin: Tensor
    """[T, 1, D]; the first half negated."""

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, H, D] -> [T, H, D]. The halves of a head are the two coordinates of its D / 2 planes.
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class Rope:
    """Rotary positions."""

    def __init__(
        self, config: RopeConfig, *, head_dim: int, context_tokens: int, device: torch.device
    ) -> None:
        frequencies, self._scale = rope_frequencies(config, head_dim, context_tokens)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        # positions: [T] -> cos, sin: [T, 1, D]
        angles = positions.unsqueeze(1).float() * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return Rotation(
            torch.cat((cos, cos), -1).unsqueeze(1).to(dtype),
            torch.cat((-sin, sin), -1).unsqueeze(1).to(dtype),
        )


def rope_frequencies(
    config: RopeConfig, head_dim: int, context_tokens: int
) -> tuple[Tensor, float]:
    """Radians per position, and the factor on cosine and sine."""
    # -> [D / 2]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / config.theta**exponents
    match config.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor=factor):
            return plain / factor, 1.0
        case Dynamic(factor=factor, original_tokens=original):
            stretch = factor * max(context_tokens, original) / original - (factor - 1)
            theta = config.theta * stretch ** (head_dim / (head_dim - 2))
            return 1.0 / theta**exponents, 1.0
        case Llama3():
            return _llama3_frequencies(config.scaling, plain), 1.0
        case Yarn():
            return _yarn_frequencies(config.scaling, config.theta, head_dim)
        case LongRope():
            return _longrope_frequencies(config.scaling, config.theta, exponents, context_tokens)


def _llama3_frequencies(scaling: Llama3, plain: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / plain
    longest = scaling.original_tokens / scaling.low_freq_factor
    shortest = scaling.original_tokens / scaling.high_freq_factor
    ramp = (scaling.original_tokens / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - ramp) * plain / scaling.factor + ramp * plain
    stretched = torch.where(wavelengths > longest, plain / scaling.factor, between)
    return torch.where(wavelengths < shortest, plain, stretched)


def _yarn_frequencies(scaling: Yarn, theta: float, head_dim: int) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        """At which dimension the context holds this many rotations."""
        turns = scaling.original_tokens / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    def attention(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # The ramp needs a width.
    width = high - low if high != low else 0.001
    periods = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    keep = 1 - ramp
    frequencies = (1.0 / (scaling.factor * periods)) * (1 - keep) + (1.0 / periods) * keep
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = attention(scaling.mscale) / attention(scaling.mscale_all_dim)
    return frequencies, attention(1.0) if factor is None else factor


def _longrope_frequencies(
    scaling: LongRope, theta: float, exponents: Tensor, context_tokens: int
) -> tuple[Tensor, float]:
    long = context_tokens > scaling.original_tokens
    divisors = torch.tensor(scaling.long_factor if long else scaling.short_factor)
    factor = scaling.attention_factor
    if factor is None:
        growth = math.log(scaling.factor) / math.log(scaling.original_tokens)
        factor = math.sqrt(1 + growth) if scaling.factor > 1 else 1.0
    return 1.0 / (divisors * theta**exponents), factor
