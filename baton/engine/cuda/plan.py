"""What crosses to the device for a step, as arrays: decided on the host, without torch.

A decode step is padded to a bucket, one of a few batch sizes, since a captured graph has a fixed one. A prompt's chunks are laid out
flat, one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from baton.engine.batch import BatchRow


@dataclass(frozen=True, slots=True)
class Wish:
    """What the kernels need to know of one row's parameters."""

    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    noise: float = 0.0


LIKELIEST = Wish()
"""Of rows for which nothing is drawn."""


INTEGERS = ("token_ids", "positions", "slots", "lengths", "top_k")
FLOATS = ("temperature", "top_p", "min_p", "noise")
HEADER = (*INTEGERS, *FLOATS)
"""The rows of a header, in order; the floats are stored as their bits."""


def graph_buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes for which a step is captured, ascending: close enough that padding costs little, few enough to capture soon."""
    steps = chain((1, 2, 4), range(8, 64, 8), range(64, 128, 16), range(128, max_rows + 32, 32))
    return (*(size for size in steps if size < max_rows), max_rows)


def bucket_of(rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so many rows. Precondition: one does."""
    return next(bucket for bucket in buckets if rows <= bucket)


def decode_header(
    rows: Sequence[BatchRow], wishes: Sequence[Wish | None], *, width: int, block_size: int
) -> NDArray[np.int64]:
    """A decode step's numbers, padded to `width` rows: such a row has no length and no slot."""
    # -> [len(HEADER), width]
    header = np.zeros((len(HEADER), width), np.int64)
    count = len(rows)
    header[0, :count] = [row.token_ids[0] for row in rows]
    starts = header[1, :count]
    starts[:] = [row.start for row in rows]
    blocks = np.array([row.block_table[row.start // block_size] for row in rows], np.int64)
    header[2, count:] = -1
    header[2, :count] = blocks * block_size + starts % block_size
    header[3, :count] = starts + 1
    put_wishes(header, wishes)
    return header


def put_wishes(header: NDArray[np.int64], wishes: Sequence[Wish | None]) -> None:
    """Fills in what the sampling kernels read; a wish of None is another's business."""
    known = [wish or LIKELIEST for wish in wishes]
    count = len(known)
    header[4, :count] = [wish.top_k for wish in known]
    floats = header[len(INTEGERS) :].view(np.float64)
    # Rows that pad the batch are greedy.
    floats[0, :count] = [wish.temperature for wish in known]
    floats[1, :count] = [wish.top_p for wish in known]
    floats[2, :count] = [wish.min_p for wish in known]
    floats[3, :count] = [wish.noise for wish in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLayout:
    """Chunks of T tokens in all, as one array of integers and where its parts are."""

    packed: NDArray[np.int32]
    tokens: tuple[slice, slice, slice]
    """Token ids, positions, slots: [T] each."""
    tiles: slice
    """[4 * tiles]."""
    tables: slice
    wanted: slice
    """[R]: flat indices of the tokens to sample after."""


def prefill_layout(rows: Sequence[BatchRow], *, block_size: int, tile: int) -> PrefillLayout:
    """`tile` is the number of queries that a program of the kernel takes."""
    tables = [np.array(row.block_table[: -(-_end(row) // block_size)], np.int32) for row in rows]
    begins = np.cumsum([0, *map(len, tables)])
    spans = [(row.start, len(row.token_ids)) for row in rows]
    positions = [np.arange(row.start, _end(row), dtype=np.int32) for row in rows]
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, position in zip(tables, positions, strict=True)
    ]
    ends = np.cumsum([count for _, count in spans])
    wanted = [end - 1 for row, end in zip(rows, ends.tolist(), strict=True) if row.sample]
    parts = [
        np.fromiter(chain.from_iterable(row.token_ids for row in rows), np.int32, int(ends[-1])),
        np.concatenate(positions),
        np.concatenate(slots),
        query_tiles(spans, begins.tolist()[:-1], tile).reshape(-1),
        np.concatenate(tables),
        np.array(wanted, np.int32),
    ]
    borders = np.cumsum([0, *map(len, parts)]).tolist()
    ids, at, to, tiles, table, last = (slice(*pair) for pair in pairwise(borders))
    return PrefillLayout(
        packed=np.concatenate(parts).astype(np.int32, copy=False),
        tokens=(ids, at, to),
        tiles=tiles,
        tables=table,
        wanted=last,
    )


def query_tiles(
    spans: Sequence[tuple[int, int]], tables: Sequence[int], tile: int
) -> NDArray[np.int32]:
    """Cuts rows into tiles of queries. `spans` has each row's position of the first token and number of tokens, in the order of the
    flat batch; `tables` says where each row's block table begins. Those that see most keys come first, so that none of them is
    left for the end.
    """
    # -> [4, tiles]
    columns: list[tuple[int, int, int, int]] = []
    flat = 0
    for (start, count), table in zip(spans, tables, strict=True):
        columns += (
            (flat + at, min(tile, count - at), start + at, table) for at in range(0, count, tile)
        )
        flat += count
    columns.sort(key=lambda column: column[2] + column[1], reverse=True)
    return np.array(columns, np.int32).reshape(-1, 4).T.copy()


def _end(row: BatchRow) -> int:
    return row.start + len(row.token_ids)
