"""From the tensors of a checkpoint, by their Hugging Face names, to a `Decoder`.

Projections that read the same input are packed into one matrix: query, key and value; gate and up. Building takes one tensor at
a time from its source and keeps none that it packed, so a model never stands in memory twice.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.config import ModelConfig
from baton.engine.layers import FloatRows, LayerNorm, Linear, RMSNorm, Rope, activation
from baton.engine.model import MLP, Attention, Block, Decoder, Embedding, GatedMLP, Projection
from baton.engine.quantize import Int8Linear, Int8Rows
from baton.kv.pool import TORCH_DTYPES
from baton.kv.spec import KVDtype, WeightFormat


class TensorSource(Protocol):
    """A tensor of the checkpoint by name, on the engine's device, in that dtype or as it is stored, of the expected shape."""

    def __call__(self, name: str, dtype: torch.dtype | None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Matrices:
    """How a format keeps matrices, beside activations of a dtype. What narrower matrices lose is lost before they are packed; all are
    multiplied in the wider dtype of the two.
    """

    format: WeightFormat
    dtype: torch.dtype
    """Of activations, norms, biases and learned positions."""

    @property
    def loads(self) -> torch.dtype:
        """What a matrix is to be read as."""
        if self.format is WeightFormat.INT8:
            return torch.float32
        return TORCH_DTYPES[KVDtype(self.format.value)]

    def projection(self, weight: Tensor, bias: Tensor | None) -> Projection:
        # weight: [out, in]  bias: [out]
        if self.format is WeightFormat.INT8:
            return Int8Linear(weight, bias)
        return Linear(weight.to(torch.promote_types(weight.dtype, self.dtype)), bias)

    def embedding(self, weight: Tensor, head: Tensor | None) -> tuple[Embedding, Projection]:
        """The rows of a matrix, and the projection to logits; they are of one matrix where there is no `head`."""
        # weight: [V, E]  head: [V, E]
        if self.format is not WeightFormat.INT8:
            return FloatRows(weight, self.dtype), self.projection(
                weight if head is None else head, None
            )
        quantized = Int8Linear(weight, None)
        projection = quantized if head is None else Int8Linear(head, None)
        return Int8Rows(quantized, self.dtype), projection


def tensor_prefix(config: ModelConfig, names: Container[str]) -> str:
    """What the names of the decoder's tensors begin with. GPT-2 checkpoints exist with and without."""
    if not config.is_gpt2:
        return "model."
    return "" if "wte.weight" in names else "transformer."


def expected_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint must hold."""
    hidden, vocab = config.hidden_size, config.vocab_size
    if config.is_gpt2:
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (vocab, hidden),
            "wpe.weight": (config.max_position_tokens, hidden),
            "ln_f.weight": (hidden,),
            "ln_f.bias": (hidden,),
        }
        layer_shapes, layers = _gpt2_layer_shapes(config), "h"
    else:
        shapes = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
        layer_shapes, layers = _llama_layer_shapes(config), "layers"
    for layer in range(config.num_layers):
        shapes |= {f"{layers}.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    named = {prefix + name: shape for name, shape in shapes.items()}
    return named if config.tied_embeddings else named | {"lm_head.weight": (vocab, hidden)}


def _llama_layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.attention_out_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms}
    shapes |= {f"{name}.weight": (rows, columns) for name, rows, columns, _ in linears}
    shapes |= {f"{name}.bias": (rows,) for name, rows, _, bias in linears if bias}
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def _gpt2_layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    linears = (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    )
    shapes: dict[str, tuple[int, ...]] = {
        f"{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")
    }
    # GPT-2 writes its matrices as [in, out].
    shapes |= {f"{name}.weight": (columns, rows) for name, columns, rows in linears}
    return shapes | {f"{name}.bias": (rows,) for name, _, rows in linears}


def build_decoder(
    config: ModelConfig,
    tensor: TensorSource,
    matrices: Matrices,
    *,
    prefix: str,
    context_tokens: int,
) -> Decoder:
    """Takes every tensor of `expected_shapes` once."""
    build_layer = _gpt2_layer if config.is_gpt2 else _llama_layer
    layers = "h" if config.is_gpt2 else "layers"
    embedding = tensor(
        prefix + ("wte.weight" if config.is_gpt2 else "embed_tokens.weight"), matrices.loads
    )
    if config.rope is None:
        positions: Tensor | Rope = tensor(prefix + "wpe.weight", matrices.dtype)
    else:
        positions = Rope(
            config.rope,
            head_dim=config.head_dim,
            context_tokens=context_tokens,
            device=embedding.device,
        )
    blocks = tuple(
        build_layer(config, layer, _Named(tensor, matrices, f"{prefix}{layers}.{layer}."))
        for layer in range(config.num_layers)
    )
    named = _Named(tensor, matrices, prefix)
    rows, head = matrices.embedding(
        embedding, None if config.tied_embeddings else tensor("lm_head.weight", matrices.loads)
    )
    return Decoder(
        embedding=rows,
        positions=positions,
        blocks=blocks,
        norm=named.layer_norm(config, "ln_f") if config.is_gpt2 else named.rms_norm(config, "norm"),
        head=head,
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """The tensors under a prefix."""

    tensor: TensorSource
    matrices: Matrices
    prefix: str

    def __call__(self, name: str) -> Tensor:
        return self.tensor(self.prefix + name, self.matrices.dtype)

    def matrix(self, name: str) -> Tensor:
        return self.tensor(f"{self.prefix}{name}.weight", self.matrices.loads)

    def linear(self, *names: str, bias: bool) -> Projection:
        """Several projections of one input, packed."""
        weight = torch.cat([self.matrix(name) for name in names])
        biases = torch.cat([self(f"{n}.bias") for n in names]) if bias else None
        return self.matrices.projection(weight, biases)

    def conv1d(self, name: str) -> Projection:
        """GPT-2's [in, out] spelling of a projection."""
        return self.matrices.projection(self.matrix(name).t().contiguous(), self(f"{name}.bias"))

    def rms_norm(self, config: ModelConfig, name: str) -> RMSNorm:
        return RMSNorm(self(f"{name}.weight"), config.norm_eps)

    def layer_norm(self, config: ModelConfig, name: str) -> LayerNorm:
        return LayerNorm(self(f"{name}.weight"), self(f"{name}.bias"), config.norm_eps)


def _llama_layer(config: ModelConfig, layer: int, named: _Named) -> Block:
    qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
    qk_norm = None
    if config.qk_norm:
        per_head = (
            named("self_attn.q_norm.weight").expand(config.num_heads, -1),
            named("self_attn.k_norm.weight").expand(config.num_kv_heads, -1),
        )
        qk_norm = RMSNorm(torch.cat(per_head), config.norm_eps)
    return Block(
        attention_norm=named.rms_norm(config, "input_layernorm"),
        attention=Attention(
            qkv=named.linear(*qkv, bias=config.qkv_bias),
            qk_norm=qk_norm,
            out=named.linear("self_attn.o_proj", bias=config.attention_out_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            window=config.windows[layer],
            scale=config.attention_scales[layer],
        ),
        mlp_norm=named.rms_norm(config, "post_attention_layernorm"),
        mlp=GatedMLP(
            gate_up=named.linear("mlp.gate_proj", "mlp.up_proj", bias=config.mlp_bias),
            down=named.linear("mlp.down_proj", bias=config.mlp_bias),
            activation=activation(config.activation),
        ),
    )


def _gpt2_layer(config: ModelConfig, layer: int, named: _Named) -> Block:
    return Block(
        attention_norm=named.layer_norm(config, "ln_1"),
        attention=Attention(
            qkv=named.conv1d("attn.c_attn"),
            qk_norm=None,
            out=named.conv1d("attn.c_proj"),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            window=config.windows[layer],
            scale=config.attention_scales[layer],
        ),
        mlp_norm=named.layer_norm(config, "ln_2"),
        mlp=MLP(
            up=named.conv1d("mlp.c_fc"),
            down=named.conv1d("mlp.c_proj"),
            activation=activation(config.activation),
        ),
    )
