"""Launches the attention kernels: one token of many sequences, and many tokens of a few.

Legend: R rows, T tokens, H heads, G KV heads, D head size, S tokens in a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.cuda.kernels.attention import combine_kernel, decode_kernel, prefill_kernel
from baton.kv.pool import LayerKV

LOG2_E = 1.4426950408889634
MIN_SPLIT_TOKENS = 128
"""Fewer tokens do not repay the program that reads them."""
MAX_SPLITS = 32
"""Of a row; enough for one long row to fill a device, together with its KV heads."""
_DECODE_TILE = 64
_SMALLEST_DOT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What the kernels are compiled for, besides the tensors' type."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int


def split_tokens(num_tokens: int) -> int:
    """Tokens of each split of a row that sees so many: as the kernels compute it."""
    even = -(-num_tokens // MAX_SPLITS)
    return max(MIN_SPLIT_TOKENS, -(-even // _DECODE_TILE) * _DECODE_TILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeScratch:
    """Partial results, overwritten by every layer; allocated once, since captured graphs know their addresses."""

    partials: Tensor
    """[R, MAX_SPLITS, H, D] float32."""
    weights: Tensor
    """[R, MAX_SPLITS, H] float32."""
    num_programs: int
    """Of the decode kernel."""

    @staticmethod
    def allocate(shape: HeadShape, *, rows: int, device: torch.device) -> "DecodeScratch":
        """For batches of at most `rows`."""
        partials = (rows, MAX_SPLITS, shape.num_heads, shape.head_dim)
        programs = 2
        if device.type == "cuda":
            # As many as are resident at once; each loops.
            programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        return DecodeScratch(
            partials=torch.empty(partials, dtype=torch.float32, device=device),
            weights=torch.empty(partials[:-1], dtype=torch.float32, device=device),
            num_programs=programs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """One token of each of R sequences."""

    lengths: Tensor
    """[R], the new token included; 0 pads the batch."""
    tables: Tensor
    """[>= R, blocks of the longest sequence] int32."""
    scratch: DecodeScratch

    def attend(
        self, qkv: Tensor, kv: LayerKV, *, shape: HeadShape, window: int | None, scale: float
    ) -> Tensor:
        """Attends the queries in `qkv`, whose keys and values are in the pool already."""
        # qkv: [R, H + 2 * G, D] -> [R, H, D]
        rows, _, head_dim = qkv.shape
        out = qkv.new_empty(rows, shape.num_heads, head_dim)
        scratch = self.scratch
        fixed = {
            "WINDOW": window or 0,
            "H": shape.num_heads,
            "D": head_dim,
            "DIM_PAD": _padded(head_dim),
            "TILE": _DECODE_TILE,
            "MIN_SPLIT": MIN_SPLIT_TOKENS,
            "MAX_SPLITS": MAX_SPLITS,
        }
        decode_kernel[(scratch.num_programs,)](
            qkv,
            kv.keys,
            kv.values,
            scratch.partials,
            scratch.weights,
            self.lengths,
            self.tables,
            scale * LOG2_E,
            rows,
            self.tables.stride(0),
            qkv.stride(0),
            G=shape.num_kv_heads,
            S=shape.block_size_tokens,
            ROWS_PAD=_power_of_two(len(self.tables)),
            GROUP_PAD=max(_SMALLEST_DOT, _power_of_two(shape.num_heads // shape.num_kv_heads)),
            PRECISION=_precision(qkv.dtype),
            num_warps=4,
            num_stages=2,
            **fixed,
        )
        combine_kernel[(rows, shape.num_heads)](
            scratch.partials, scratch.weights, self.lengths, out, num_warps=4, **fixed
        )
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """Many tokens of a few sequences."""

    tiles: Tensor
    """[4, tiles]: first query, queries, position of the first, where in `tables` the sequence's begins."""
    tables: Tensor
    """[blocks] int32: of one sequence after another."""

    def attend(
        self, qkv: Tensor, kv: LayerKV, *, shape: HeadShape, window: int | None, scale: float
    ) -> Tensor:
        """As `DecodeRows.attend`."""
        # qkv: [T, H + 2 * G, D] -> [T, H, D]
        tokens, _, head_dim = qkv.shape
        out = qkv.new_empty(tokens, shape.num_heads, head_dim)
        tile = prefill_tile(qkv.dtype, head_dim)
        num_tiles = self.tiles.shape[1]
        # Heads of one KV head run together and share what the cache holds.
        prefill_kernel[(shape.num_heads, num_tiles)](
            qkv,
            kv.keys,
            kv.values,
            out,
            self.tiles,
            self.tables,
            scale * LOG2_E,
            num_tiles,
            qkv.stride(0),
            WINDOW=window or 0,
            H=shape.num_heads,
            G=shape.num_kv_heads,
            D=head_dim,
            S=shape.block_size_tokens,
            DIM_PAD=_padded(head_dim),
            TILE_M=tile.queries,
            TILE_N=tile.keys,
            PRECISION=_precision(qkv.dtype),
            num_warps=tile.warps,
            num_stages=2,
        )
        return out


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """What a program of the prefill kernel takes."""

    queries: int
    keys: int
    warps: int


def prefill_tile(dtype: torch.dtype, head_dim: int) -> PrefillTile:
    """The largest whose two stages of keys and values fit shared memory, with its sums in registers."""
    if dtype.itemsize > 2:
        return PrefillTile(32, 32, 4)
    return PrefillTile(128, 128, 8) if _padded(head_dim) <= 128 else PrefillTile(64, 64, 8)


def _precision(dtype: torch.dtype) -> str:
    # float32 means float32, not the 10 bits of TF32.
    return "ieee" if dtype == torch.float32 else "tf32"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(head_dim: int) -> int:
    return max(_SMALLEST_DOT, _power_of_two(head_dim))
