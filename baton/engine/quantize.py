"""Symmetric int8 arithmetic in groups of 128 along the input dimension: the definition, and a torch implementation of it.

A weight [N, K] is zero-padded to whole groups and kept as int8, with one float16 scale for each (row, group). Activations are
quantized as they come, one float32 scale for each (token, group). A product is, in float32 and in the order of the groups,

    acc = fma(float32(dot of int8), scale_w * scale_a, acc)

so that it depends on nothing but its row and its token: every implementation that follows this gives the same bits, whatever the
batch. A group's dot product is below 2^24, so float32 holds it exactly. Here exactness counts, not speed.

Called from the engine thread. Legend: T tokens, N outputs, K inputs padded to G groups of 128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from baton.errors import ModelLoadError

GROUP = 128
LARGEST = 127


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [N, inputs] as int8 [N, K], and its scales, float16 [N, K / 128]. Each element is off by half of its group's scale
    at most, or, where float16 is too coarse for the scale, by what that loses. Raises `ModelLoadError` where it cannot hold one.
    """
    groups = _groups(weight.to(torch.float32))  # [N, G, 128]
    scales = (groups.abs().amax(-1) / LARGEST).to(torch.float16)
    if not scales.isfinite().all():
        raise ModelLoadError("weights", "are too large for int8 in groups with float16 scales")
    return _rounded(groups, scales.to(torch.float32)).flatten(1), scales


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, inputs] as int8 [T, K], and their scales, float32 [T, K / 128], 0 for a group of zeros. What is not finite
    makes a scale that is not either.
    """
    groups = _groups(x.to(torch.float32))
    scales = groups.abs().amax(-1) / LARGEST
    return _rounded(groups, scales).flatten(1), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """float32 [N, K]."""
    groups = _groups(values.to(torch.float32))
    return (groups * scales.to(torch.float32).unsqueeze(-1)).flatten(1)


def _groups(x: Tensor) -> Tensor:
    # [M, inputs] -> [M, G, 128]
    groups = -(-x.shape[1] // GROUP)
    return functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), groups, GROUP)


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    """Half to even; zeros where the scale is 0, infinite or no number."""
    quotients = (groups / scales.unsqueeze(-1)).nan_to_num(0.0)
    usable = (scales > 0) & scales.isfinite()
    values = quotients.round().clamp(-LARGEST, LARGEST) * usable.unsqueeze(-1)
    return values.to(torch.int8)


class Int8Linear:
    """x Wᵀ + b, by the module's definition; the bias is added in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # weight: [N, inputs]  bias: [N]
        self.values, self.scales = quantize_weight(weight)
        self._inputs = weight.shape[1]
        self._bias = None if bias is None else bias.to(torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        # x: [T, inputs] -> [T, N]
        values, scales = quantize_activation(x)
        product = int8_product(values, scales, self.values, self.scales)
        if self._bias is not None:
            product += self._bias
        return product.to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """The weight's rows at `index`, in float32: an embedding's."""
        # index: [T] -> [T, inputs]
        return dequantize(self.values[index], self.scales[index])[:, : self._inputs]


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows of a quantized matrix, in the dtype of activations."""

    matrix: Int8Linear
    dtype: torch.dtype

    def __call__(self, index: Tensor) -> Tensor:
        # index: [T] -> [T, inputs]
        return self.matrix.rows(index).to(self.dtype)


def int8_product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """float32 [T, N]."""
    # x: [T, K]  x_scales: [T, G]  weight: [N, K]  weight_scales: [N, G]
    product = torch.zeros(len(x), len(weight), device=x.device)
    for group in range(weight_scales.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        dots = functional.linear(x[:, columns].float(), weight[:, columns].float())
        scales = x_scales[:, group, None] * weight_scales[:, group].float()
        product = fma(dots, scales, product)
    return product


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c of float32 tensors, rounded once.

    In float64 the product is exact. The sum is rounded to odd there, which keeps the second rounding, to float32, from being led
    astray by the first.
    """
    exact, c = a.double() * b.double(), c.double()
    total = exact + c
    # What the sum lost, by Knuth.
    part = total - exact
    lost = (exact - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    outward = (lost > 0) == (total > 0)
    step = torch.where(outward, 1, -1) * ((lost != 0) & lost.isfinite() & (bits & 1 == 0))
    return (bits + step).view(torch.float64).float()
