"""Int8 arithmetic: what the definition promises of its error, and that a product depends on nothing but its row and its token."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from baton.engine.quantize import (
    GROUP,
    Int8Linear,
    Int8Rows,
    dequantize,
    fma,
    int8_product,
    quantize_activation,
    quantize_weight,
)
from baton.errors import ModelLoadError

SHAPES = [(1, 1, 1), (3, 5, 128), (4, 7, 129), (2, 33, 200), (9, 16, 576)]


def _random(rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.02, 1.0, 3e4])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_a_weight_is_off_by_half_a_step_of_its_group(columns: int, scale: float) -> None:
    weight = _random(17, columns, seed=columns, scale=scale)
    values, scales = quantize_weight(weight)
    groups = -(-columns // GROUP)
    assert (values.dtype, values.shape) == (torch.int8, (17, groups * GROUP))
    assert (scales.dtype, scales.shape) == (torch.float16, (17, groups))
    assert values[:, columns:].eq(0).all()
    off = (dequantize(values, scales)[:, :columns] - weight).abs()
    steps = scales.float().repeat_interleave(GROUP, dim=1)[:, :columns]
    # Below float16's normal numbers a scale is off by up to 2^-25, and the largest value by 127 times that.
    coarse = 127 * 2.0**-25 * (steps < 2.0**-14)
    assert (off <= steps / 2 * (1 + 1e-6) + coarse).all()


def test_a_group_of_zeros_and_a_weight_beyond_float16_scales() -> None:
    values, scales = quantize_weight(torch.zeros(2, 64))
    assert values.eq(0).all()
    assert scales.eq(0).all()
    with pytest.raises(ModelLoadError):
        quantize_weight(torch.full((1, 64), 1e7))


def test_activations_are_rounded_half_to_even_with_float32_scales() -> None:
    x = torch.zeros(1, 2 * GROUP + 2)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5])
    x[0, -1] = 1e-30
    values, scales = quantize_activation(x)
    assert values[0, :6].tolist() == [127, 0, 2, 2, 0, -126]
    assert scales[0, :2].tolist() == [1.0, 0.0]
    assert values[0, GROUP : 2 * GROUP].eq(0).all()
    assert values[0, 2 * GROUP + 1] == 127
    assert math.isclose(float(scales[0, 2]), 1e-30 / 127, rel_tol=1e-6)


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
def test_a_product_is_within_what_the_roundings_allow(
    tokens: int, outputs: int, inputs: int
) -> None:
    """|error| <= sum of |x| * |error of w| + |w rounded| * |error of x|, and float32's own rounding."""
    x, weight = _random(tokens, inputs, seed=1, scale=2.0), _random(outputs, inputs, seed=2)
    bias = _random(1, outputs, seed=3)[0]
    found = Int8Linear(weight, bias)(x).double()
    exact = x.double() @ weight.double().t() + bias.double()
    (w, w_scales), (a, a_scales) = quantize_weight(weight), quantize_activation(x)
    rounded = dequantize(w, w_scales)[:, :inputs].double()
    w_off = w_scales.double().repeat_interleave(GROUP, dim=1)[:, :inputs] / 2
    a_off = a_scales.double().repeat_interleave(GROUP, dim=1)[:, :inputs] / 2
    bound = x.double().abs() @ w_off.t() + a_off @ rounded.abs().t()
    assert ((found - exact).abs() <= bound * (1 + 1e-5) + 1e-5).all()
    spread = (found - exact).abs().max() / exact.abs().max()
    assert spread < 0.05
    assert a.dtype == torch.int8


def _nearest_float32(value: Fraction) -> float:
    """Round half to even, exactly."""
    if value == 0:
        return 0.0
    sign, value = (-1 if value < 0 else 1), abs(value)
    exponent = -149
    while value >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return float(sign * round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_fma_rounds_once() -> None:
    """Against exact fractions; among the cases are sums that two roundings would get wrong."""
    generator = torch.Generator().manual_seed(5)
    dots = torch.randint(-(2**20), 2**20, (600,), generator=generator).float()
    scales = torch.rand(600, generator=generator) * 1e-4
    before = torch.randn(600, generator=generator) * torch.tensor([1e-6, 1.0, 1e6]).repeat(200)
    # 1 + 2^-24 is half-way; what is far below it decides, and is lost in a float64 sum.
    tie = torch.tensor([1.0, -1.0, 1.0])
    dots = torch.cat([dots, torch.tensor([1.0 + 2**-23, -1.0 - 2**-23, 1.0 - 2**-24])])
    scales = torch.cat([scales, torch.tensor([2.0**-24 - 2.0**-48] * 2 + [2.0**-24])])
    before = torch.cat([before, tie])
    found = fma(dots, scales, before).tolist()
    for a, b, c, result in zip(dots.tolist(), scales.tolist(), before.tolist(), found, strict=True):
        assert result == _nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


def test_products_follow_the_definition_to_the_bit() -> None:
    """Promise: whoever implements the definition gets these bits. Integers and fractions here, tensors there."""
    weight, x = _random(3, 300, seed=7), _random(2, 300, seed=8, scale=5.0)
    (w, w_scales), (a, a_scales) = quantize_weight(weight), quantize_activation(x)
    found = int8_product(a, a_scales, w, w_scales)
    for token in range(2):
        for row in range(3):
            total = 0.0
            for group in range(3):
                span = range(group * GROUP, (group + 1) * GROUP)
                dot = sum(int(a[token, k]) * int(w[row, k]) for k in span)
                scale = float(a_scales[token, group] * w_scales[row, group].float())
                total = _nearest_float32(Fraction(dot) * Fraction(scale) + Fraction(total))
            assert float(found[token, row]) == total


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    """Promise: what is computed for a token does not depend on what is computed beside it."""
    layer = Int8Linear(_random(40, 200, seed=9), _random(1, 40, seed=10)[0])
    x = _random(33, 200, seed=11)
    together = layer(x)
    for rows in (slice(0, 1), slice(3, 8), slice(32, 33)):
        assert torch.equal(layer(x[rows]), together[rows])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_do_not_pass_for_numbers(bad: float) -> None:
    """Promise: the sampler sees that something is wrong; rows beside are as they were."""
    layer, x = Int8Linear(_random(6, 64, seed=1), None), _random(2, 64, seed=2)
    expected = layer(x)[1]
    x[0, 5] = bad
    found = layer(x)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1], expected)


def test_embedding_rows_are_the_rows_that_the_projection_multiplies() -> None:
    layer = Int8Linear(_random(50, 70, seed=4), None)
    index = torch.tensor([3, 49, 3])
    rows = Int8Rows(layer, torch.bfloat16)(index)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, dequantize(layer.values, layer.scales)[index, :70].bfloat16())
