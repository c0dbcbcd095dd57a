"""From a checkpoint's tensors to packed weights. Each tensor is packed as it is read and not kept, so a model never stands in memory
twice. See `src/gemm.h` for the order.
"""

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.config import ModelConfig
from baton.engine.layers import rope_frequencies
from baton.engine.native.library import PANEL, Format, Layer, Library, Matrix, Model
from baton.engine.quantize import GROUP, quantize_weight
from baton.engine.weights import TensorSource

SLICE = 128 * PANEL
"""Rows that are packed at once: what quantizing takes on the way stays small."""
GATES = 16
"""Gates that stand side by side, before the values that they gate."""
_DTYPES = {Format.FLOAT32: torch.float32, Format.BFLOAT16: torch.bfloat16, Format.INT8: torch.int8}
_UNIT = 16


def unsupported(config: ModelConfig, block_size_tokens: int) -> str | None:
    """What of the model the kernels can't compute; None where they can."""
    if not config.rms_norm or not config.gated_mlp or config.rope is None:
        return f"architecture {config.architecture}"
    if config.activation not in {"silu", "swish"}:
        return f"activation {config.activation}"
    for name, value in (
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
        ("head size", config.head_dim),
        ("block size", block_size_tokens),
    ):
        if value % _UNIT:
            return f"{name} {value}, which is no multiple of {_UNIT}"
    if config.num_heads // config.num_kv_heads > 64:
        return f"{config.num_heads // config.num_kv_heads} heads to a KV head"
    return None


class Packed:
    """A matrix in the kernels' order; its memory goes with it."""

    def __init__(self, library: Library, form: Format, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is [N, K]."""
        self._n, self._k = weight.shape
        num_rows = -(-self._n // PANEL) * PANEL
        num_bytes = library.packed_bytes(form, self._n, self._k)
        self._address = library.allocate(num_bytes)
        # At exit the process frees all, and the engine's thread may still compute.
        weakref.finalize(self, library.free, self._address, num_bytes).atexit = False
        self._scales: Tensor | None = None
        if form is Format.INT8:
            self._scales = torch.empty((num_rows, -(-self._k // GROUP)), dtype=torch.float16)
        for first in range(0, self._n, SLICE):
            self._pack(library, form, weight[first : first + SLICE], first)
        self._bias = None
        if bias is not None:
            # The kernels read whole panels.
            self._bias = torch.zeros(num_rows, dtype=torch.float32)
            self._bias[: self._n] = bias

    def _pack(self, library: Library, form: Format, weight: Tensor, first: int) -> None:
        """Rows from `first` on, a multiple of a panel's."""
        scales: Tensor | None = None
        if form is Format.INT8:
            weight, scales = quantize_weight(weight)
        rows = weight[:, : self._k].to(_DTYPES[form]).contiguous()
        library.pack(
            form,
            rows.data_ptr(),
            _address(scales),
            len(rows),
            rows.shape[1],
            self._address + library.packed_bytes(form, first, self._k),
            None if self._scales is None else self._scales[first:].data_ptr(),
        )

    @property
    def matrix(self) -> Matrix:
        return Matrix(self._address, _address(self._scales), _address(self._bias), self._n, self._k)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model, and what keeps its memory alive."""

    model: Model
    owners: tuple[object, ...]


class WeightPacker:
    """Builds a `Weights`; takes every tensor of `expected_shapes` once."""

    def __init__(
        self, library: Library, config: ModelConfig, form: Format, tensor: TensorSource
    ) -> None:
        self._library, self._config, self._form, self._source = library, config, form, tensor
        self._owners: list[object] = []

    def build(self, *, prefix: str, context_tokens: int, kv: Format) -> Weights:
        """`kv`: the format of keys, values and queries."""
        config = self._config
        assert config.rope is not None
        frequencies, scale = rope_frequencies(config.rope, config.head_dim, context_tokens)
        embedding = self._packed(self._tensor(prefix + "embed_tokens.weight"), None)
        layers = (Layer * config.num_layers)(
            *(self._layer(f"{prefix}layers.{i}.", i) for i in range(config.num_layers))
        )
        model = Model(
            layers=ctypes.cast(layers, ctypes.POINTER(Layer)),
            embedding=embedding,
            norm=self._floats(self._tensor(prefix + "norm.weight")),
            head=embedding
            if config.tied_embeddings
            else self._packed(self._tensor("lm_head.weight"), None),
            frequencies=self._floats(frequencies),
            rope_scale=scale,
            norm_eps=config.norm_eps,
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            weights=self._form,
            kv=kv,
        )
        return Weights(model, (layers, *self._owners))

    def _layer(self, name: str, index: int) -> Layer:
        config = self._config
        qk_norm = config.qk_norm
        return Layer(
            attention_norm=self._floats(self._tensor(f"{name}input_layernorm.weight")),
            qkv=self._linear(
                *(f"{name}self_attn.{part}_proj" for part in "qkv"), bias=config.qkv_bias
            ),
            q_norm=self._floats(self._tensor(f"{name}self_attn.q_norm.weight"))
            if qk_norm
            else None,
            k_norm=self._floats(self._tensor(f"{name}self_attn.k_norm.weight"))
            if qk_norm
            else None,
            out=self._linear(f"{name}self_attn.o_proj", bias=config.attention_out_bias),
            mlp_norm=self._floats(self._tensor(f"{name}post_attention_layernorm.weight")),
            gate_up=self._gate_up(f"{name}mlp."),
            down=self._linear(f"{name}mlp.down_proj", bias=config.mlp_bias),
            scale=config.attention_scales[index],
            window=config.windows[index] or 0,
        )

    def _linear(self, *names: str, bias: bool) -> Matrix:
        """Several projections of one input."""
        weight = torch.cat([self._tensor(f"{name}.weight") for name in names])
        biases = torch.cat([self._tensor(f"{name}.bias") for name in names]) if bias else None
        return self._packed(weight, biases)

    def _tensor(self, name: str) -> Tensor:
        # Quantizing takes float32, but a slice at a time.
        return self._source(name, None if self._form is Format.INT8 else _DTYPES[self._form])

    def _gate_up(self, name: str) -> Matrix:
        parts = [f"{name}{part}_proj" for part in ("gate", "up")]
        weight = _interleaved([self._tensor(f"{part}.weight") for part in parts])
        bias = None
        if self._config.mlp_bias:
            bias = _interleaved([self._tensor(f"{part}.bias") for part in parts])
        return self._packed(weight, bias)

    def _packed(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        packed = Packed(self._library, self._form, weight, bias)
        self._owners.append(packed)
        return packed.matrix

    def _floats(self, values: Tensor) -> int:
        kept = values.to(torch.float32).contiguous()
        self._owners.append(kept)
        return kept.data_ptr()


def _interleaved(parts: list[Tensor]) -> Tensor:
    # [F, …] twice -> [2 * F, …]: gates, what they gate, gates, …
    blocks = [part.view(-1, GATES, *part.shape[1:]) for part in parts]
    return torch.stack(blocks, 1).flatten(0, 2)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
