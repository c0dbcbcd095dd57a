"""Paged attention over a batch in which decode rows and prefill chunks mix.

`plan_batch` turns a step's rows into index tensors, once; `attend` uses them in every layer. The flat batch holds the rows of one
token first, ordered by how many blocks they fill, then the longer chunks:

    [group 0 | group 1 | …]    one token per row; a group's rows are attended together, padded to its longest
    [chunk | chunk | …]        one row each

Legend: T tokens of the flat batch, R rows of a group, C tokens of a chunk, K keys that a row sees (padded), H heads, G KV heads,
D head size. Queries of one KV head are grouped by views, so no key or value is ever repeated in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from baton.engine.batch import BatchRow
from baton.kv.pool import LayerKV

Masks = dict[int | None, Tensor | None]
"""By window: what is added to the scores, or None where every key counts (group) or those up to the query's position (chunk)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one token."""

    first: int
    last: int
    """Tokens [first, last) of the flat batch."""
    blocks: Tensor
    """[R * M], padded to M blocks a row."""
    num_keys: int
    masks: Masks
    """[R, 1, 1, K]."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row of several tokens."""

    first: int
    last: int
    blocks: Tensor | None
    """[M]; None where the sequence starts in this chunk, so that nothing is to be read."""
    num_keys: int
    masks: Masks
    """[C, K]."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A step, as index tensors on the device."""

    token_ids: Tensor
    """[T]."""
    positions: Tensor
    """[T]."""
    slots: Tensor
    """[T]: where each token's KV goes."""
    sampled_rows: tuple[int, ...]
    """The caller's row numbers that want a token, in the order of `sampled`."""
    sampled: Tensor
    """Flat index of the last token of each sampled row."""
    groups: tuple[Group, ...]
    chunks: tuple[Chunk, ...]


def plan_batch(
    rows: Sequence[BatchRow],
    *,
    block_size: int,
    windows: frozenset[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> BatchPlan:
    """Lays out the flat batch; all integers cross to the device in one copy."""
    order = sorted(range(len(rows)), key=lambda i: _sort_key(rows[i], block_size))
    packer = _Packer(device)
    token_ids = [token for i in order for token in rows[i].token_ids]
    positions = [p for i in order for p in range(rows[i].start, _end(rows[i]))]
    slots = [slot for i in order for slot in _slots(rows[i], block_size)]
    ends = np.cumsum([len(rows[i].token_ids) for i in order]).tolist()
    sampled = [(i, end - 1) for i, end in zip(order, ends, strict=True) if rows[i].sample]
    heads = [packer.add(part) for part in (token_ids, positions, slots, [at for _, at in sampled])]

    group_parts: list[tuple[int, list[BatchRow], slice]] = []
    first = 0
    singles = [rows[i] for i in order if len(rows[i].token_ids) == 1]
    for _, members in groupby(singles, key=lambda row: _sort_key(row, block_size)):
        group = list(members)
        group_parts.append((first, group, packer.add(_padded_tables(group, block_size))))
        first += len(group)
    chunk_parts: list[tuple[int, BatchRow, slice]] = []
    for i in order[first:]:
        row = rows[i]
        used = row.block_table[: -(-_end(row) // block_size)] if row.start else ()
        chunk_parts.append((first, row, packer.add(used)))
        first += len(row.token_ids)

    packed = packer.pack()
    masker = _Masker(windows, dtype, device)
    return BatchPlan(
        token_ids=packed[heads[0]],
        positions=packed[heads[1]],
        slots=packed[heads[2]],
        sampled_rows=tuple(i for i, _ in sampled),
        sampled=packed[heads[3]],
        groups=tuple(
            masker.group(at, group, packed[part], block_size) for at, group, part in group_parts
        ),
        chunks=tuple(
            masker.chunk(at, row, packed[part] if row.start else None)
            for at, row, part in chunk_parts
        ),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: BatchPlan,
    kv: LayerKV,
    window: int | None,
    scale: float,
) -> Tensor:
    """Stores this step's keys and values, and attends every row to its sequence."""
    # q: [T, H, D]  k, v: [T, G, D]  ->  [T, H, D]
    kv.write(plan.slots, k, v)
    out = torch.empty_like(q)
    for group in plan.groups:
        rows = slice(group.first, group.last)
        out[rows] = _attend_group(q[rows], group, kv, window, scale)
    for chunk in plan.chunks:
        tokens = slice(chunk.first, chunk.last)
        if chunk.blocks is None:
            keys, values = k[tokens], v[tokens]
        else:
            keys, values = (x[: chunk.num_keys] for x in kv.gather(chunk.blocks))
        out[tokens] = _attend_chunk(q[tokens], keys, values, chunk.masks[window], scale)
    return out


def _attend_group(q: Tensor, group: Group, kv: LayerKV, window: int | None, scale: float) -> Tensor:
    # q: [R, H, D] -> [R, H, D]. The queries of one KV head stand where a chunk's tokens would.
    num_rows, _, head_dim = q.shape
    keys, values = (
        x.view(num_rows, -1, *x.shape[1:])[:, : group.num_keys].transpose(1, 2)  # [R, G, K, D]
        for x in kv.gather(group.blocks)
    )
    grouped = q.view(num_rows, keys.shape[1], -1, head_dim)  # [R, G, H / G, D]
    mask = group.masks[window]
    return functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    ).reshape(q.shape)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # q: [C, H, D]  k, v: [K, G, D]  mask: [C, K]  ->  [C, H, D]
    kv_heads, per_kv_head = k.shape[1], q.shape[1] // k.shape[1]
    out = functional.scaled_dot_product_attention(
        q.view(len(q), kv_heads, per_kv_head, -1).permute(1, 2, 0, 3),  # [G, H / G, C, D]
        k.transpose(0, 1).unsqueeze(1).expand(-1, per_kv_head, -1, -1),  # [G, H / G, K, D]
        v.transpose(0, 1).unsqueeze(1).expand(-1, per_kv_head, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out.flatten(0, 1).transpose(0, 1)


class _Packer:
    """Collects integers, to make one tensor of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] = []

    def add(self, values: Sequence[int]) -> slice:
        first = len(self._values)
        self._values.extend(values)
        return slice(first, len(self._values))

    def pack(self) -> Tensor:
        return torch.from_numpy(np.array(self._values, dtype=np.int64)).to(self._device)


@dataclass(frozen=True, slots=True)
class _Masker:
    windows: frozenset[int | None]
    dtype: torch.dtype
    device: torch.device

    def group(self, first: int, rows: list[BatchRow], blocks: Tensor, block_size: int) -> Group:
        ends = [_end(row) for row in rows]
        longest = max(ends)
        even = min(ends) == longest
        # Sequences of one length need no mask, and no keys beyond it.
        num_keys = longest if even else len(blocks) // len(rows) * block_size
        masks: Masks = {}
        for window in self.windows:
            if even and (window is None or window >= longest):
                masks[window] = None
                continue
            end = torch.tensor(ends, device=self.device).view(-1, 1, 1, 1)
            position = torch.arange(num_keys, device=self.device)
            masks[window] = self._additive(_visible(position, end, window))
        return Group(first, first + len(rows), blocks, num_keys, masks)

    def chunk(self, first: int, row: BatchRow, blocks: Tensor | None) -> Chunk:
        num_keys = _end(row)
        masks: Masks = {}
        for window in self.windows:
            if row.start == 0 and (window is None or window >= num_keys):
                masks[window] = None
                continue
            end = torch.arange(row.start + 1, num_keys + 1, device=self.device).view(-1, 1)
            position = torch.arange(num_keys, device=self.device)
            masks[window] = self._additive(_visible(position, end, window))
        return Chunk(first, first + len(row.token_ids), blocks, num_keys, masks)

    def _additive(self, visible: Tensor) -> Tensor:
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return zeros.masked_fill_(visible.logical_not(), float("-inf"))


def _visible(position: Tensor, end: Tensor, window: int | None) -> Tensor:
    """Keys at [end - window, end) are seen."""
    seen = position < end
    return seen if window is None else seen & (position >= end - window)


def _end(row: BatchRow) -> int:
    return row.start + len(row.token_ids)


def _sort_key(row: BatchRow, block_size: int) -> int:
    """Single tokens by the magnitude of their length, so that padding at most doubles a row; longer chunks after them."""
    num_blocks = -(-_end(row) // block_size)
    return (num_blocks - 1).bit_length() if len(row.token_ids) == 1 else 64


def _slots(row: BatchRow, block_size: int) -> list[int]:
    if len(row.token_ids) == 1:
        index, offset = divmod(row.start, block_size)
        return [row.block_table[index] * block_size + offset]
    slots: list[int] = []
    token, end = row.start, _end(row)
    while token < end:
        index, offset = divmod(token, block_size)
        count = min(block_size - offset, end - token)
        slot = row.block_table[index] * block_size + offset
        slots.extend(range(slot, slot + count))
        token += count
    return slots


def _padded_tables(rows: list[BatchRow], block_size: int) -> list[int]:
    """Block tables of equal length, one after another; block 0 stands where a shorter sequence has none."""
    used = [-(-_end(row) // block_size) for row in rows]
    longest = max(used)
    padded: list[int] = []
    for row, count in zip(rows, used, strict=True):
        padded.extend(row.block_table[:count])
        padded.extend([0] * (longest - count))
    return padded
