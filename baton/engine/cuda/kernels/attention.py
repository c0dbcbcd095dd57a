"""Attention over the paged pool, which is read in place through the block tables.

Decode takes a fixed number of programs, which share out the rows' splits: the grid depends on no length, so a captured graph serves
all of them. How a row is split depends on its own length only, and so does its result: not on its batch, nor on the grid.

Where numbers and addresses change from step to step, the kernels are told to assume nothing of them, or they would be compiled anew.

Legend: R rows, T tokens, H heads, G KV heads, D head size, S tokens in a block, N keys of a tile. Scores are in powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def _split_tokens(visible, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, ROUND: tl.constexpr):
    """Tokens of a split: few enough of them, each a multiple of a tile."""
    even = tl.cdiv(visible, MAX_SPLITS)
    return tl.maximum(tl.cdiv(even, ROUND) * ROUND, MIN_SPLIT)


@triton.jit
def _load_tile(
    plane,
    slots,
    head,
    dims,
    wanted,
    MASKED: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """[N, D] of keys or values."""
    at = plane + (slots * G + head)[:, None] * D + dims[None, :]
    if MASKED:
        return tl.load(at, mask=wanted[:, None] & (dims < D)[None, :], other=0.0)
    elif DIM_PAD != D:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def decode_kernel(
    queries,  # [R, H, D], rows `query_stride` apart
    keys,  # [blocks, S, G, D]
    values,
    partials,  # [R, MAX_SPLITS, H, D] float32
    weights,  # [R, MAX_SPLITS, H] float32: each split's log2 of the sum
    lengths,  # [R]; 0 where there is no row
    tables,  # [R, table_stride]
    scale,
    num_rows,
    table_stride,
    query_stride,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group: tl.constexpr = H // G
    rows = tl.arange(0, ROWS_PAD)
    seen = tl.load(lengths + rows, mask=rows < num_rows, other=0).to(tl.int32)
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    splits = tl.cdiv(seen, _split_tokens(seen, MIN_SPLIT, MAX_SPLITS, TILE))
    ends = tl.cumsum(splits, 0)
    total = tl.sum(splits, 0) * G
    members = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        head = item % G
        row = tl.sum((ends <= item // G).to(tl.int32), 0)
        split = item // G - tl.sum(tl.where(rows < row, splits, 0), 0)
        length = tl.load(lengths + row).to(tl.int32)
        first = 0
        if WINDOW:
            first = tl.maximum(length - WINDOW, 0)
        size = _split_tokens(length - first, MIN_SPLIT, MAX_SPLITS, TILE)
        start = first + split * size
        end = tl.minimum(start + size, length)

        heads = head * group + members
        there = (members < group)[:, None] & (dims < D)[None, :]
        at = row.to(tl.int64) * query_stride + heads[:, None] * D + dims[None, :]
        query = tl.load(queries + at, mask=there, other=0.0)
        best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        mass = tl.zeros([GROUP_PAD], tl.float32)
        out = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
        for at_key in range(start, end, TILE):
            position = at_key + tl.arange(0, TILE)
            wanted = position < end
            block = tl.load(
                tables + row.to(tl.int64) * table_stride + position // S, mask=wanted, other=0
            )
            slots = block.to(tl.int64) * S + position % S
            key = _load_tile(keys, slots, head, dims, wanted, True, G, D, DIM_PAD)
            value = _load_tile(values, slots, head, dims, wanted, True, G, D, DIM_PAD)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            scores = tl.where(wanted[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            shrink = tl.exp2(best - higher)
            probability = tl.exp2(scores - higher[:, None])
            mass = mass * shrink + tl.sum(probability, 1)
            out = out * shrink[:, None]
            out = tl.dot(probability.to(value.dtype), value, out, input_precision=PRECISION)
            best = higher
        place = (row * MAX_SPLITS + split).to(tl.int64) * H + heads
        tl.store(partials + place[:, None] * D + dims[None, :], out / mass[:, None], mask=there)
        tl.store(weights + place, best + tl.log2(mass), mask=members < group)


@triton.jit
def combine_kernel(
    partials,  # [R, MAX_SPLITS, H, D] float32
    weights,  # [R, MAX_SPLITS, H] float32
    lengths,  # [R]
    out,  # [R, H, D]
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(lengths + row).to(tl.int32)
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    count = tl.cdiv(seen, _split_tokens(seen, MIN_SPLIT, MAX_SPLITS, TILE))
    splits, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, DIM_PAD)
    place = (row * MAX_SPLITS + splits).to(tl.int64) * H + head
    weight = tl.load(weights + place, mask=splits < count, other=float("-inf"))
    # A row that is none has no splits; its output is zero, not the quotient of zeros.
    best = tl.where(count > 0, tl.max(weight, 0), 0.0)
    weight = tl.exp2(weight - best)
    part = tl.load(
        partials + place[:, None] * D + dims[None, :],
        mask=(splits < count)[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    total = tl.where(count > 0, tl.sum(weight, 0), 1.0)
    mixed = tl.sum(part * weight[:, None], 0) / total
    at = (row * H + head).to(tl.int64) * D + dims
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=dims < D)


@triton.jit
def _attend_keys(
    query,
    positions,
    state,
    keys,
    values,
    table,
    head,
    first,
    last,
    end,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Folds the keys [first, last) into the state of a tile of queries."""
    best, mass, out = state
    dims = tl.arange(0, DIM_PAD)
    for at_key in range(first, last, TILE_N):
        position = at_key + tl.arange(0, TILE_N)
        wanted = position < end
        # Tiles that end before the first query need no mask.
        if MASKED:
            block = tl.load(table + position // S, mask=wanted, other=0)
        else:
            block = tl.load(table + position // S)
        slots = block.to(tl.int64) * S + position % S
        key = _load_tile(keys, slots, head, dims, wanted, MASKED, G, D, DIM_PAD)
        value = _load_tile(values, slots, head, dims, wanted, MASKED, G, D, DIM_PAD)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if MASKED:
            visible = position[None, :] <= positions[:, None]
            if WINDOW:
                visible = visible & (position[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A query that has seen no key yet has no best score to subtract.
        finite = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        shrink = tl.exp2(best - finite)
        probability = tl.exp2(scores - finite[:, None])
        mass = mass * shrink + tl.sum(probability, 1)
        out = out * shrink[:, None]
        out = tl.dot(probability.to(value.dtype), value, out, input_precision=PRECISION)
        best = higher
    return best, mass, out


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["tiles", "tables"])
def prefill_kernel(
    queries,  # [T, H, D], tokens `query_stride` apart
    keys,  # [blocks, S, G, D]
    values,
    out,  # [T, H, D]
    tiles,  # [4, num_tiles]: first query, queries, position of the first, where the table begins
    tables,
    scale,
    num_tiles,
    query_stride,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + num_tiles + tile).to(tl.int32)
    start = tl.load(tiles + 2 * num_tiles + tile).to(tl.int32)
    table = tables + tl.load(tiles + 3 * num_tiles + tile)
    members, dims = tl.arange(0, TILE_M), tl.arange(0, DIM_PAD)
    there = (members < count)[:, None] & (dims < D)[None, :]
    token = (first + members).to(tl.int64)
    query = tl.load(
        queries + token[:, None] * query_stride + head * D + dims[None, :], mask=there, other=0.0
    )
    positions = start + members
    end = start + count
    # [oldest, interior) seen by every query of the tile; [interior, end) by those at or after it
    oldest = 0
    interior = start // TILE_N * TILE_N
    if WINDOW:
        oldest = tl.maximum(start - WINDOW + 1, 0) // TILE_N * TILE_N
        interior = oldest
    state = (
        tl.full([TILE_M], float("-inf"), tl.float32),
        tl.zeros([TILE_M], tl.float32),
        tl.zeros([TILE_M, DIM_PAD], tl.float32),
    )
    kv_head = head // (H // G)
    if not WINDOW:
        state = _attend_keys(
            query, positions, state, keys, values, table, kv_head, 0, interior, end, scale,
            False, WINDOW, G, D, S, DIM_PAD, TILE_N, PRECISION,
        )  # fmt: skip
    _, mass, mixed = _attend_keys(
        query, positions, state, keys, values, table, kv_head, interior, end, end, scale,
        True, WINDOW, G, D, S, DIM_PAD, TILE_N, PRECISION,
    )  # fmt: skip
    at = (token[:, None] * H + head) * D + dims[None, :]
    # A window may hide every key from the queries beyond the tile's end, which are not stored.
    mass = tl.where(mass > 0, mass, 1.0)
    tl.store(out + at, (mixed / mass[:, None]).to(out.dtype.element_ty), mask=there)
