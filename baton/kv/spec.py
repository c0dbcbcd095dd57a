"""What KV cache bytes mean: the spec that two workers must share, and the wire layout of a token range. Torch-free.

Wire layout: one contiguous buffer `[2, L, T, H_kv, D]` (keys, then values), where T is the number of tokens shipped. 16-bit
dtypes travel as uint16, because numpy has no bfloat16. The layout has no blocks in it, so workers with different block sizes
can exchange KV.
"""

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt

WireKV = npt.NDArray[np.generic]
"""KV cache in wire layout."""


@dataclass(frozen=True, slots=True, eq=False)
class SealedKV:
    """KV as it leaves a pool and enters another; whoever writes it into a pool verifies it."""

    data: WireKV
    """Contiguous; may be read-only."""
    checksum: int
    """XXH3-64 of its bytes when they left their pool."""


class KVDtype(Enum):
    """Element type of the cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def item_bytes(self) -> int:
        return 4 if self is KVDtype.FLOAT32 else 2

    @property
    def wire_dtype(self) -> np.dtype[np.generic]:
        """The numpy type that carries it."""
        return np.dtype(np.float32) if self is KVDtype.FLOAT32 else np.dtype(np.uint16)


class WeightFormat(Enum):
    """How a worker keeps the model's matrices; what it computes with them differs by it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    """In groups, with 8-bit activations; see `baton.engine.quantize`."""


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Everything that must be equal for one worker's KV to be another's."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDtype
    position_scheme: str
    """How positions enter the keys, such as `rope:theta=10000` or `learned`."""
    model_fingerprint: str
    """Identifies the weights."""
    weights: WeightFormat | None = None
    """In which prompts are computed; None: the dtype's own. What a prompt's KV holds depends on it."""

    @property
    def weight_format(self) -> WeightFormat:
        """In which prompts are computed."""
        return self.weights or WeightFormat(self.dtype.value)

    @cached_property
    def digest(self) -> str:
        """Hex digest of all fields; block size is not among them."""
        fields: tuple[object, ...] = (
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.dtype.value,
            self.position_scheme,
            self.model_fingerprint,
        )
        if self.weight_format.value != self.dtype.value:
            fields = (*fields, self.weight_format.value)
        return hashlib.blake2b(repr(fields).encode(), digest_size=16).hexdigest()

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.item_bytes

    def wire_shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """[2, L, T, H_kv, D]."""
        return (2, self.num_layers, num_tokens, self.num_kv_heads, self.head_dim)
