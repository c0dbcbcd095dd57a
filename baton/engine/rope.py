"""Rotary position embedding: its parameters as checkpoints write them. Torch-free; `baton.engine.layers` does the arithmetic.

Two spellings are read: `rope_theta` with `rope_scaling` (key `type` or `rope_type`), and `rope_parameters`, which holds both.

`dynamic` and `longrope` frequencies depend on the sequence's length. A cached key cannot be rotated again when its sequence
grows, and a prefix is shared by sequences of any length, so an engine fixes them once, for the longest context that it serves.
"""

from dataclasses import dataclass

from baton.engine.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """NTK-aware: a larger base for contexts beyond `original_tokens`."""

    factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Interpolation of low frequencies, with attention scaled to match."""

    factor: float
    original_tokens: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """A divisor for each frequency: one set up to `original_tokens`, another for longer contexts."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_tokens: int
    factor: float
    attention_factor: float | None


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions rotate queries and keys."""

    theta: float
    scaling: Scaling | None

    def longest_context(self, max_position_tokens: int) -> int:
        """The longest context for which the scaling is made."""
        match self.scaling:
            case Linear(factor=factor) | Dynamic(factor=factor):
                return int(max_position_tokens * factor)
            case Yarn(factor=factor, original_tokens=original):
                return max(max_position_tokens, int(original * factor))
            case _:
                return max_position_tokens

    def describe(self, context_tokens: int) -> str:
        """A name that is equal exactly where the frequencies are."""
        length = (
            f",context={context_tokens}" if isinstance(self.scaling, Dynamic | LongRope) else ""
        )
        return f"rope:theta={self.theta},scaling={self.scaling}{length}"


def parse_rope(config: Fields, *, head_dim: int, max_position_tokens: int) -> RopeConfig:
    """Reads either spelling."""
    old = not config.nested("rope_parameters").values
    rope = config.nested("rope_scaling" if old else "rope_parameters")
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.fail("partial_rotary_factor", "other than 1 is not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if head_dim % 2:
        raise config.fail("head_dim", f"must be even for rotary positions, not {head_dim}")
    return RopeConfig(
        theta=theta,
        scaling=_parse_scaling(config, rope, head_dim // 2, max_position_tokens),
    )


def _parse_scaling(
    config: Fields, rope: Fields, frequencies: int, max_position_tokens: int
) -> Scaling | None:
    kind_field = "rope_type" if rope.has("rope_type") else "type"
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")
    kind = rope.choice(kind_field, kinds, "default")
    original = rope.integer("original_max_position_embeddings", max_position_tokens)
    if config.has("original_max_position_embeddings"):
        original = config.integer("original_max_position_embeddings")
    match kind:
        case "linear":
            return Linear(factor=rope.number("factor"))
        case "dynamic":
            return Dynamic(factor=rope.number("factor"), original_tokens=max_position_tokens)
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if high <= low:
                raise rope.fail("high_freq_factor", f"must be above low_freq_factor, not {high}")
            return Llama3(
                factor=rope.number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_tokens=original,
            )
        case "yarn":
            return Yarn(
                factor=rope.number("factor", max_position_tokens / original),
                original_tokens=original,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                truncate=rope.boolean("truncate", default=True),
                attention_factor=_optional(rope, "attention_factor"),
                mscale=_optional(rope, "mscale"),
                mscale_all_dim=_optional(rope, "mscale_all_dim"),
            )
        case "longrope" | "su":
            return LongRope(
                short_factor=rope.numbers("short_factor", frequencies),
                long_factor=rope.numbers("long_factor", frequencies),
                original_tokens=original,
                factor=rope.number("factor", max_position_tokens / original),
                attention_factor=_optional(rope, "attention_factor"),
            )
        case _:
            return None


def _optional(fields: Fields, name: str) -> float | None:
    return fields.number(name) if fields.has(name) else None
