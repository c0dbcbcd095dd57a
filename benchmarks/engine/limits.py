"""What the machine can do, and how long a cell takes at least on such a machine.

A decode step reads every weight and every stream's KV once; a prompt multiplies every weight with every token. Whichever takes longer is
the limit. Activations, norms and sampling count nothing. Pure.
"""

from dataclasses import dataclass

from baton.engine.config import ModelConfig
from benchmarks.engine.protocol import Cell

WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "f32": 4.0}
KV_BYTES = {"bf16": 2, "int8": 2, "f32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Measured at one moment: bandwidth flips between regimes within minutes."""

    memory_bytes_per_s: float
    memory_bytes_per_s_one_thread: float
    cache_bytes_per_s: float
    """From the last-level cache."""
    cache_bytes: int
    gemm_per_s: dict[str, float]
    """Multiplications and additions, by format."""
    gemm_per_s_one_thread: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a repetition of a cell cannot do without."""

    bytes: float
    flops: float
    working_set_bytes: float
    """Read again in every step."""

    def least_s(self, limits: Limits, weight_format: str) -> float:
        """At the machine's limit."""
        in_cache = self.working_set_bytes < 0.75 * limits.cache_bytes
        bandwidth = limits.cache_bytes_per_s if in_cache else limits.memory_bytes_per_s
        return max(self.bytes / bandwidth, self.flops / limits.gemm_per_s[weight_format])


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Of all layers, and of the head: what multiplies. Looking an embedding up reads next to nothing."""
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * model.hidden_size
    mlp = (3 if model.gated_mlp else 2) * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + mlp), model.vocab_size * model.hidden_size


def flops_per_token(model: ModelConfig) -> float:
    """Of a prompt's, without attention."""
    return 2.0 * parameters(model)[0]


def work(cell: Cell, model: ModelConfig, weight_format: str) -> Work | None:
    """None where no limit is known: loads and starts."""
    layers, head = parameters(model)
    weight_bytes = (layers + head) * WEIGHT_BYTES[weight_format]
    kv_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    attention_flops = 4 * model.num_layers * model.num_heads * model.head_dim
    tokens = cell.context
    match cell.kind:
        case "prefill":
            # A token sees the half of the prompt, on average; only the last one meets the head.
            flops = 2 * layers * tokens + attention_flops * tokens * tokens / 2 + 2 * head
            return Work(bytes=weight_bytes, flops=flops, working_set_bytes=weight_bytes)
        case "decode":
            seen = tokens + cell.steps * cell.repetitions / 2
            step_bytes = weight_bytes + cell.batch * seen * kv_values * KV_BYTES[weight_format]
            step_flops = cell.batch * (2 * (layers + head) + attention_flops * seen)
            return Work(
                bytes=cell.steps * step_bytes,
                flops=cell.steps * step_flops,
                working_set_bytes=step_bytes,
            )
        case _:
            return None
