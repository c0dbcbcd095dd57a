"""Paged attention against attention written out, on random batches."""

import random
from collections.abc import Sequence

import pytest
import torch

from baton.engine.attention import attend, plan_batch
from baton.engine.batch import BatchRow, SampleInput
from baton.kv.pool import KVPool
from baton.kv.spec import KVDtype, KVSpec
from baton.types import SamplingParams

HEADS, KV_HEADS, HEAD_DIM, NUM_BLOCKS = 6, 2, 8, 600
WINDOW = 10
CPU = torch.device("cpu")


def random_rows(seed: int, block_size: int) -> list[BatchRow]:
    """Decode rows and chunks of many lengths, over scattered blocks."""
    rng = random.Random(seed)
    free = list(range(NUM_BLOCKS))
    rng.shuffle(free)
    rows = []
    for _ in range(rng.randint(1, 9)):
        count = rng.choice((1, 1, 1, rng.randint(2, 20)))
        start = rng.choice((0, rng.randint(0, 40)))
        used = -(-(start + count) // block_size)
        table = [free.pop() for _ in range(used + rng.randint(0, 1))]
        sample = SampleInput(SamplingParams(max_tokens=1), (), ()) if rng.random() < 0.6 else None
        rows.append(BatchRow([rng.randrange(99) for _ in range(count)], start, table, sample))
    return rows


def flat_order(
    rows: Sequence[BatchRow], positions: list[int], slots: list[int], size: int
) -> list[tuple[int, int]]:
    """Row, and token of the row, at each flat index; found by slot."""
    owner = {
        row.block_table[p // size] * size + p % size: (i, p - row.start)
        for i, row in enumerate(rows)
        for p in range(row.start, row.start + len(row.token_ids))
    }
    found = [owner[slot] for slot in slots]
    assert [rows[i].start + offset for i, offset in found] == positions
    return found


def pool_of(block_size: int) -> KVPool:
    spec = KVSpec(
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=KVDtype.FLOAT32,
        position_scheme="none",
        model_fingerprint="none",
    )
    pool = KVPool(spec, num_blocks=NUM_BLOCKS, block_size_tokens=block_size, device="cpu")
    pool.data.copy_(torch.randn_like(pool.data))
    return pool


def written_out(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    # q: [H, D]  keys, values: [K, G, D], the query's own position last  ->  [H, D]
    seen = slice(0 if window is None else max(0, len(keys) - window), None)
    out = []
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        scores = (keys[seen, kv_head].double() @ q[head].double()) * 0.3
        out.append(scores.softmax(0) @ values[seen, kv_head].double())
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_attends_to_exactly_what_is_before_it(
    seed: int, block_size: int, window: int | None
) -> None:
    torch.manual_seed(seed)
    rows = random_rows(seed, block_size)
    pool = pool_of(block_size)
    plan = plan_batch(
        rows,
        block_size=block_size,
        windows=frozenset({None, WINDOW}),
        dtype=torch.float32,
        device=CPU,
    )
    tokens = len(plan.token_ids)
    q = torch.randn(tokens, HEADS, HEAD_DIM)
    k, v = torch.randn(2, tokens, KV_HEADS, HEAD_DIM)
    out = attend(q, k, v, plan=plan, kv=pool.layers[0], window=window, scale=0.3)

    order = flat_order(rows, plan.positions.tolist(), plan.slots.tolist(), block_size)
    keys, values = pool.data.flatten(2, 3)[:, 0]
    assert torch.equal(keys[plan.slots], k)
    assert torch.equal(values[plan.slots], v)
    for flat, (index, offset) in enumerate(order):
        row = rows[index]
        assert plan.token_ids[flat] == row.token_ids[offset]
        slots = [
            row.block_table[p // block_size] * block_size + p % block_size
            for p in range(row.start + offset + 1)
        ]
        exact = written_out(q[flat], keys[slots], values[slots], window)
        torch.testing.assert_close(out[flat].double(), exact, atol=1e-5, rtol=1e-4)
    wanted = {i: len(row.token_ids) - 1 for i, row in enumerate(rows) if row.sample}
    assert {
        i: order[at][1] for i, at in zip(plan.sampled_rows, plan.sampled, strict=True)
    } == wanted
    assert [order[at][0] for at in plan.sampled] == list(plan.sampled_rows)


def test_padding_at_most_doubles_what_a_decode_row_reads() -> None:
    rng = random.Random(1)
    rows = [
        BatchRow((1,), rng.randint(0, 3000), tuple(range(3001 // 16 + 1)), None) for _ in range(64)
    ]
    plan = plan_batch(
        rows, block_size=16, windows=frozenset({None}), dtype=torch.float32, device=CPU
    )
    assert sum(group.last - group.first for group in plan.groups) == 64
    for group in plan.groups:
        per_row = len(group.blocks) // (group.last - group.first)
        for position in plan.positions[group.first : group.last].tolist():
            assert per_row <= 2 * (position // 16 + 1)
