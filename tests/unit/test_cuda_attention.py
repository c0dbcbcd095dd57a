"""Attention kernels on the paged pool against attention written out; in Triton's interpreter where there is no CUDA device."""

import pytest
import torch

from tests.cuda_rig import DEVICE  # isort: skip - first: it chooses the interpreter

from baton.engine.cuda.attention import (
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    DecodeRows,
    DecodeScratch,
    HeadShape,
    PrefillRows,
    prefill_tile,
    split_tokens,
)
from baton.engine.cuda.plan import query_tiles
from baton.kv.pool import LayerKV

NUM_BLOCKS, BLOCK_SIZE, SCALE = 120, 4, 0.3
# The interpreter has no products of bfloat16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
HALF_TOLERANCE = 4e-2 if DEVICE.type == "cuda" else 4e-3
SHAPES = {
    "grouped": HeadShape(num_heads=6, num_kv_heads=2, head_dim=16, block_size_tokens=4),
    "odd-size": HeadShape(num_heads=2, num_kv_heads=2, head_dim=24, block_size_tokens=4),
}


def filled_pool(shape: HeadShape, dtype: torch.dtype) -> LayerKV:
    """Slots that belong to nobody hold what would show in any result."""
    size = (NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    keys, values = 1e4 * torch.ones(size), 1e4 * torch.ones(size)
    return LayerKV(keys.to(DEVICE, dtype), values.to(DEVICE, dtype))


def table_of(num_tokens: int, free: list[int], kv: LayerKV) -> list[int]:
    """Random KV for a sequence, in blocks taken from `free`."""
    table = [free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE))]
    slots = slots_of(table, num_tokens)
    for plane in (kv.keys, kv.values):
        flat = plane.flatten(0, 1)
        flat[slots] = torch.randn(num_tokens, *flat.shape[1:]).to(DEVICE, flat.dtype)
    return table


def slots_of(table: list[int], num_tokens: int) -> torch.Tensor:
    token = torch.arange(num_tokens)
    slots = (
        torch.tensor(table, dtype=torch.int64)[token // BLOCK_SIZE] * BLOCK_SIZE
        + token % BLOCK_SIZE
    )
    return slots.to(DEVICE)


def written_out(
    query: torch.Tensor, kv: LayerKV, slots: torch.Tensor, window: int | None
) -> torch.Tensor:
    # query: [H, D], at the last of the slots -> [H, D]
    seen = slots if window is None else slots[-window:]
    keys, values = (x.flatten(0, 1)[seen].double() for x in (kv.keys, kv.values))
    group = len(query) // keys.shape[1]
    scores = torch.einsum("hd,khd->hk", query.double(), keys.repeat_interleave(group, 1))
    return torch.einsum(
        "hk,khd->hd", (SCALE * scores).softmax(-1), values.repeat_interleave(group, 1)
    )


def decode(
    qkv: torch.Tensor,
    kv: LayerKV,
    tables: list[list[int]],
    lengths: list[int],
    shape: HeadShape = SHAPES["grouped"],
    *,
    window: int | None = None,
) -> torch.Tensor:
    padded = torch.zeros(8, NUM_BLOCKS, dtype=torch.int32)
    for at, table in enumerate(tables):
        padded[at, : len(table)] = torch.tensor(table)
    rows = DecodeRows(
        lengths=torch.tensor(lengths, device=DEVICE),
        tables=padded.to(DEVICE),
        scratch=DecodeScratch.allocate(shape, rows=8, device=DEVICE),
    )
    return rows.attend(qkv, kv, shape=shape, window=window, scale=SCALE)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("name", SHAPES)
def test_a_decode_row_attends_to_its_sequence_in_the_pool(name: str, window: int | None) -> None:
    torch.manual_seed(3)
    shape = SHAPES[name]
    kv = filled_pool(shape, torch.float32)
    lengths = [5, 0, 2 * MIN_SPLIT_TOKENS + 3, 1, MIN_SPLIT_TOKENS]
    free = torch.randperm(NUM_BLOCKS).tolist()
    tables = [table_of(length, free, kv) for length in lengths]
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(len(lengths), heads, shape.head_dim, device=DEVICE)
    out = decode(qkv, kv, tables, lengths, shape, window=window)
    for at, length in enumerate(lengths):
        if length == 0:
            assert not out[at].any(), "a row that is none gives zeros"
            continue
        expected = written_out(qkv[at, : shape.num_heads], kv, slots_of(tables[at], length), window)
        torch.testing.assert_close(out[at].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_decode_row_has_the_same_bits_in_every_batch() -> None:
    torch.manual_seed(4)
    shape = SHAPES["grouped"]
    kv = filled_pool(shape, HALF)
    lengths = [MIN_SPLIT_TOKENS + 20, 7, 60]
    free = torch.randperm(NUM_BLOCKS).tolist()
    tables = [table_of(length, free, kv) for length in lengths]
    qkv = torch.randn(3, 10, 16).to(DEVICE, HALF)
    together = decode(qkv, kv, tables, lengths)
    for at in range(3):
        one = slice(at, at + 1)
        alone = decode(qkv[one], kv, tables[one], lengths[one])
        assert torch.equal(alone[0], together[at])


@pytest.mark.parametrize(
    ("window", "dtype", "tolerance"),
    [(None, torch.float32, 1e-5), (10, torch.float32, 1e-5), (None, HALF, HALF_TOLERANCE)],
)
def test_every_token_of_a_chunk_attends_to_what_is_before_it(
    window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Chunks that start a sequence and chunks that continue one, cut into several tiles."""
    torch.manual_seed(5)
    shape = SHAPES["grouped"]
    kv = filled_pool(shape, dtype)
    spans = [(0, 5), (37, 40), (3, 2)]
    free = torch.randperm(NUM_BLOCKS).tolist()
    tables = [table_of(start + count, free, kv) for start, count in spans]
    begins = [0, len(tables[0]), len(tables[0]) + len(tables[1])]
    tiles = query_tiles(spans, begins, prefill_tile(dtype, shape.head_dim).queries)
    flat = [block for table in tables for block in table]
    qkv = torch.randn(sum(count for _, count in spans), 10, 16).to(DEVICE, dtype)
    out = PrefillRows(
        tiles=torch.from_numpy(tiles).to(DEVICE),
        tables=torch.tensor(flat, dtype=torch.int32, device=DEVICE),
    ).attend(qkv, kv, shape=shape, window=window, scale=SCALE)
    at = 0
    for (start, count), table in zip(spans, tables, strict=True):
        for token in range(start, start + count):
            expected = written_out(qkv[at, :6], kv, slots_of(table, token + 1), window)
            torch.testing.assert_close(out[at].double(), expected, atol=tolerance, rtol=tolerance)
            at += 1


def test_no_row_has_more_splits_than_there_is_room_for() -> None:
    for length in (1, 127, 128, 129, 4096, 4097, 10_000, 131_072, 1_000_001):
        size = split_tokens(length)
        assert -(-length // size) <= MAX_SPLITS
        assert size >= MIN_SPLIT_TOKENS
        assert size % 64 == 0
