"""The fused layer kernels against the decoder's own parts; in Triton's interpreter where there is no CUDA device."""

import pytest
import torch
from torch.nn import functional

from tests.cuda_rig import DEVICE  # isort: skip - first: it chooses the interpreter

from baton.engine.cuda.attention import HeadShape
from baton.engine.cuda.layers import add_rms_norm, rotate_and_store, swiglu
from baton.engine.layers import RMSNorm, Rope
from baton.engine.rope import RopeConfig
from baton.kv.pool import LayerKV

SHAPE = HeadShape(num_heads=3, num_kv_heads=1, head_dim=12, block_size_tokens=4)


def test_norm_adds_the_branch_and_normalizes_the_sum() -> None:
    torch.manual_seed(0)
    residual, branch = torch.randn(2, 3, 40, device=DEVICE)
    norm = RMSNorm(torch.randn(40, device=DEVICE), 1e-5)
    total = residual + branch
    out = add_rms_norm(norm, residual, branch)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(out, norm(total))
    torch.testing.assert_close(add_rms_norm(norm, residual, None), norm(total))
    torch.testing.assert_close(residual, total)


def test_swiglu_is_silu_of_gate_times_up() -> None:
    torch.manual_seed(1)
    gate_up = torch.randn(2, 2 * 1030, device=DEVICE)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(swiglu(gate_up), functional.silu(gate) * up)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_heads_are_normalized_rotated_and_stored(*, normalize: bool, rotate: bool) -> None:
    torch.manual_seed(2)
    qkv = torch.randn(3, 5, 12, device=DEVICE)
    slots = torch.tensor([6, -1, 1], device=DEVICE)
    kv = LayerKV(*torch.zeros(2, 2, 4, 1, 12, device=DEVICE))
    norm = RMSNorm(torch.randn(4, 12, device=DEVICE), 1e-5) if normalize else None
    rope = Rope(
        RopeConfig(theta=100.0, scaling=None), head_dim=12, context_tokens=64, device=DEVICE
    )
    rotation = rope(torch.tensor([9, 0, 40], device=DEVICE), torch.float32) if rotate else None
    qk = qkv[:, :4].clone()
    qk = norm(qk) if norm else qk
    qk = rotation(qk) if rotation else qk
    values = qkv[:, 4:].clone()

    rotate_and_store(qkv, kv, slots, shape=SHAPE, rotation=rotation, norm=norm)
    torch.testing.assert_close(qkv[:, :3], qk[:, :3])
    keys, stored = kv.keys.flatten(0, 1), kv.values.flatten(0, 1)
    for token, slot in ((0, 6), (2, 1)):
        torch.testing.assert_close(keys[slot], qk[token, 3:])
        torch.testing.assert_close(stored[slot], values[token])
    others = [slot for slot in range(8) if slot not in {6, 1}]
    assert not keys[others].any(), "a token without a slot is stored nowhere"
    assert not stored[others].any()


def test_what_overflows_half_precision_is_stored_as_finite_numbers() -> None:
    qkv = torch.zeros(1, 5, 12, dtype=torch.float16, device=DEVICE)
    qkv[0, 3:, 0], qkv[0, 3:, 1], qkv[0, 3:, 2] = float("inf"), float("-inf"), float("nan")
    kv = LayerKV(*torch.zeros(2, 2, 4, 1, 12, dtype=torch.float16, device=DEVICE))
    slot = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rotate_and_store(qkv, kv, slot, shape=SHAPE, rotation=None, norm=None)
    for plane in (kv.keys, kv.values):
        assert plane[0, 0, 0, :3].tolist() == [65504.0, -65504.0, 0.0]
