"""What crosses to a CUDA device for a step: batch sizes, headers, and the layout of chunks."""

import random

import numpy as np
import pytest

from baton.engine.batch import BatchRow, SampleInput
from baton.engine.cuda.plan import (
    HEADER,
    INTEGERS,
    LIKELIEST,
    Wish,
    bucket_of,
    decode_header,
    graph_buckets,
    prefill_layout,
    query_tiles,
)
from baton.types import SamplingParams

WANTED = SampleInput(SamplingParams(max_tokens=1), (), ())


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 64, 100, 256, 300])
def test_every_batch_has_a_bucket_and_little_padding(most: int) -> None:
    buckets = graph_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    for rows in range(1, most + 1):
        bucket = bucket_of(rows, buckets)
        assert rows <= bucket <= max(rows + 31, 2 * rows - 1)
        assert bucket <= 2 * rows


def test_a_decode_header_says_where_each_token_goes_and_pads_with_rows_that_are_none() -> None:
    rows = [BatchRow([7], 5, [3, 9], WANTED), BatchRow([8], 0, [4], WANTED)]
    wishes = [Wish(top_k=3, temperature=0.5, top_p=0.25, min_p=0.125, noise=0.75), None]
    header = decode_header(rows, wishes, width=4, block_size=4)
    fields = dict(zip(HEADER, header, strict=True))
    assert fields["token_ids"].tolist() == [7, 8, 0, 0]
    assert fields["positions"].tolist() == [5, 0, 0, 0]
    assert fields["slots"].tolist() == [9 * 4 + 1, 4 * 4, -1, -1]
    assert fields["lengths"].tolist() == [6, 1, 0, 0]
    assert fields["top_k"].tolist() == [3, LIKELIEST.top_k, 0, 0]
    floats = header[len(INTEGERS) :].view(np.float64)
    assert floats[:, 0].tolist() == [0.5, 0.25, 0.125, 0.75]
    assert floats[0].tolist() == [0.5, 0, 0, 0], "all others are greedy"


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_laid_out_flat_and_every_query_is_in_one_tile(seed: int) -> None:
    rng = random.Random(seed)
    size, tile = rng.choice((1, 4, 16)), rng.choice((4, 32))
    rows = []
    for _ in range(rng.randint(1, 5)):
        start, count = rng.choice((0, rng.randint(1, 50))), rng.randint(2, 90)
        table = rng.sample(range(500), -(-(start + count) // size) + rng.randint(0, 2))
        sample = WANTED if rng.random() < 0.5 else None
        rows.append(
            BatchRow([rng.randrange(99) for _ in range(count)], start, tuple(table), sample)
        )
    layout = prefill_layout(rows, block_size=size, tile=tile)
    ids, positions, slots = (layout.packed[part].tolist() for part in layout.tokens)
    tables = layout.packed[layout.tables]
    owner = [(row, at) for row in rows for at in range(len(row.token_ids))]
    assert ids == [row.token_ids[at] for row, at in owner]
    assert positions == [row.start + at for row, at in owner]
    assert slots == [
        row.block_table[(row.start + at) // size] * size + (row.start + at) % size
        for row, at in owner
    ]
    wanted = layout.packed[layout.wanted].tolist()
    ends = [row for row in rows if row.sample]
    assert [owner[flat] for flat in wanted] == [(row, len(row.token_ids) - 1) for row in ends]
    seen: list[int] = []
    for begin, queries, position, where in layout.packed[layout.tiles].reshape(4, -1).T.tolist():
        assert 1 <= queries <= tile
        row, at = owner[begin]
        assert position == row.start + at
        assert at + queries <= len(row.token_ids), "a tile is of one row"
        used = -(-(position + queries) // size)
        assert tables[where : where + used].tolist() == list(row.block_table[:used])
        seen += range(begin, begin + queries)
    assert sorted(seen) == list(range(len(owner)))


def test_tiles_with_most_keys_come_first() -> None:
    last_key = [sum(tile) for tile in query_tiles([(0, 300), (500, 70)], [0, 9], 64)[1:3].T]
    assert last_key == sorted(last_key, reverse=True)
