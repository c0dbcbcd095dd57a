"""Owns the first weights: a random Llama with the circuit for "what followed this before" in place.

Answering means to find where the last few tokens stood before and to go on as there. That takes
two layers, of which neither is of use without the other, so small models find it late. Here both
are laid out at the start, and training is free to change all of it. Called by `train`.

The residual stream is cut into blocks of C dimensions, [from, to) -> content:
    [0, 1)                    a constant, the same for every token
    [1, 1 + C)                the token itself
    [1 + k C, 1 + (k + 1) C)  the token k places before, written by head k - 1 of layer 0
Layer 0 turns the constant, through the rotary embedding, into attention to a fixed offset. Layer 1
compares the blocks k of the past with the blocks k - 1 of the present, in rotary dimensions that
turn too slowly to notice distance, and writes the token found over the token itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_OFFSETS: Final = 5
_EMBEDDING_NORM: Final = 0.8
_SHARP_FREQUENCIES: Final = 8
_OFFSET_GAP: Final = 10.0
_MATCH_LOGIT: Final = 5.0
_COPY_GAIN: Final = 0.15
_COMPARED: Final = ((1, 2, 3), (1, 3, 4, 5))
"""Offsets that the heads of each key/value group of layer 1 compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The widths that the circuit is laid out in."""

    hidden_size: int
    """Width of the residual stream."""
    head_size: int
    """Width of a head."""
    groups: int
    """Key/value heads."""
    heads_per_group: int
    """Query heads per key/value head."""
    rope_theta: float
    """Base of the rotary embedding."""

    def block(self, number: int) -> slice:
        """Residual dimensions of the token `number` places before."""
        width = (self.hidden_size - 1) // (_OFFSETS + 1)
        return slice(1 + number * width, 1 + (number + 1) * width)

    @property
    def block_size(self) -> int:
        """Width of a block."""
        return (self.hidden_size - 1) // (_OFFSETS + 1)


def initial_model(config: LlamaConfig, shape: Shape, *, seed: int) -> LlamaForCausalLM:
    """A fresh model of `config`, which has the widths of `shape`, with the circuit laid out."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # What a layer adds starts at nothing, or random heads would drown the circuit.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        _lay_out_embeddings(model, shape)
        _lay_out_offsets(model, shape)
        _lay_out_matching(model, shape)
    return model


def _lay_out_embeddings(model: LlamaForCausalLM, shape: Shape) -> None:
    """Random content in the first block, beside the constant."""
    embeddings = model.model.embed_tokens.weight
    block = shape.block(0)
    embeddings.normal_(std=0.002)
    embeddings[:, block].normal_(std=_EMBEDDING_NORM / math.sqrt(shape.block_size))
    embeddings[:, 0] = _EMBEDDING_NORM


def _lay_out_offsets(model: LlamaForCausalLM, shape: Shape) -> None:
    """Head k - 1 of layer 0 copies the token k places before into block k."""
    attention = model.model.layers[0].self_attn
    head, group = shape.head_size, shape.heads_per_group
    frequencies = [shape.rope_theta ** (-2.0 * f / head) for f in range(_SHARP_FREQUENCIES)]
    # One token beside the offset the score falls by `drop` times the product of the amplitudes.
    drop = sum(1.0 - math.cos(f) for f in frequencies) / math.sqrt(head)
    # After RMSNorm the constant is sqrt(width / 2): it has half of the embedding's square norm.
    amplitude = math.sqrt(_OFFSET_GAP / drop) / math.sqrt(shape.hidden_size / 2)
    source, width = shape.block(0), shape.block_size
    eye = torch.eye(width)
    for number in range(_OFFSETS):
        query, key = number * head, number // group * head
        attention.q_proj.weight[query : query + head].zero_()
        attention.k_proj.weight[key : key + head].zero_()
        for f, frequency in enumerate(frequencies):
            # Rotary pairs are (f, f + head / 2); the score is the sum of cos((d - offset) w).
            turn = (number + 1) * frequency
            attention.q_proj.weight[query + f, 0] = amplitude * math.cos(turn)
            attention.q_proj.weight[query + f + head // 2, 0] = -amplitude * math.sin(turn)
            attention.k_proj.weight[key + f, 0] = amplitude
        attention.v_proj.weight[key : key + width, source] = eye
        # Undo the gain of RMSNorm, so that all blocks have the embedding's norm.
        gain = _EMBEDDING_NORM * math.sqrt(2.0 / shape.hidden_size)
        attention.o_proj.weight[shape.block(number + 1), query : query + width] = gain * eye


def _lay_out_matching(model: LlamaForCausalLM, shape: Shape) -> None:
    """The first two heads of each group of layer 1 match phrases and copy what followed."""
    attention = model.model.layers[1].self_attn
    head, group = shape.head_size, shape.heads_per_group
    source, width = shape.block(0), shape.block_size
    slow = torch.cat((torch.arange(head // 4, head // 2), torch.arange(3 * head // 4, head)))
    # Square norm of one block after RMSNorm: all blocks and the constant are alike.
    square = shape.hidden_size / (_OFFSETS + 2)
    gain = math.sqrt(_MATCH_LOGIT * math.sqrt(head) / square)
    for number, offsets in enumerate(_COMPARED[: shape.groups]):
        key = number * head
        for offset in offsets:
            # Random projection that keeps norms on average.
            projection = gain * torch.randn(len(slow), width) / math.sqrt(len(slow))
            attention.k_proj.weight[key + slow, shape.block(offset)] += projection
            for query in (number * group * head, (number * group + 1) * head):
                attention.q_proj.weight[query + slow, shape.block(offset - 1)] += projection
        attention.v_proj.weight[key : key + width, source] = torch.eye(width)
        for query in (number * group * head, (number * group + 1) * head):
            copy = _COPY_GAIN * torch.eye(width)
            attention.o_proj.weight[source, query : query + width] = copy
