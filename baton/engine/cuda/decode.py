"""Decode steps: one token of each of many sequences, replayed as a CUDA graph where one of the batch's size has been captured.

A step's inputs and scratch stand at fixed addresses, which every graph knows; a step overwrites them, so one step is computed at a
time. Launching without a graph does the same work, kernel by kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.cuda import _POOL_HANDLE  # torch names its type nowhere else

from baton.engine.batch import BatchRow
from baton.engine.cuda.attention import DecodeRows, DecodeScratch
from baton.engine.cuda.decoder import CudaDecoder, Step
from baton.engine.cuda.link import Link
from baton.engine.cuda.plan import HEADER, INTEGERS, Wish, bucket_of, decode_header
from baton.engine.cuda.sampling import SamplingScratch, Wishes, choose


class DecodeStep:
    """The step's tensors, and how it is launched. Used by one thread at a time; `capture` by any one, once `launch` has run."""

    def __init__(
        self,
        decoder: CudaDecoder,
        link: Link,
        *,
        buckets: tuple[int, ...],
        context_tokens: int,
        vocab_size: int,
    ) -> None:
        rows, shape, device = buckets[-1], decoder.shape, link.device
        self.buckets = buckets
        self._decoder = decoder
        self._link = link
        self._header = torch.zeros(len(HEADER), rows, dtype=torch.int64, device=device)
        # Rows that pad the batch have no place in the pool.
        self._header[HEADER.index("slots")] = -1
        num_blocks = -(-context_tokens // shape.block_size_tokens)
        self._tables = torch.zeros(rows, num_blocks, dtype=torch.int32, device=device)
        self._known: list[Sequence[int]] = [()] * rows
        """What each row of `_tables` holds."""
        self._attention = DecodeScratch.allocate(shape, rows=rows, device=device)
        self.sampling = SamplingScratch.allocate(rows=rows, vocab_size=vocab_size, device=device)
        self._graphs: dict[int, _Graph] = {}

    @property
    def num_graphs(self) -> int:
        """Batch sizes captured so far."""
        return len(self._graphs)

    def run(self, rows: Sequence[BatchRow], wishes: Sequence[Wish | None]) -> tuple[Tensor, Tensor]:
        """Computes at most `buckets[-1]` rows: the token of each, where its wish is known, and the logits of each. Both are the
        step's own, until the next.
        """
        # -> [R] int64, [R, V]
        size = self._decoder.shape.block_size_tokens
        width = self._header.shape[1]
        header = decode_header(rows, wishes, width=width, block_size=size)
        self._link.send_into(header, self._header)
        self._send_tables(rows)
        bucket = bucket_of(len(rows), self.buckets)
        graph = self._graphs.get(bucket)
        if graph is None:
            chosen, logits = self.launch(bucket)
        else:
            graph.graph.replay()
            chosen, logits = graph.chosen, graph.logits
        return chosen[: len(rows)], logits[: len(rows)]

    def launch(self, bucket: int) -> tuple[Tensor, Tensor]:
        """Starts the kernels of a step of so many rows, one by one."""
        fields = dict(zip(HEADER[: len(INTEGERS)], self._header[:, :bucket], strict=False))
        drawn = self._header[len(INTEGERS) :, :bucket].view(torch.float64)
        logits = self._decoder(
            Step(
                token_ids=fields["token_ids"],
                positions=fields["positions"],
                slots=fields["slots"],
                rows=DecodeRows(
                    lengths=fields["lengths"], tables=self._tables, scratch=self._attention
                ),
                wanted=None,
            )
        )
        wishes = Wishes(
            top_k=fields["top_k"],
            temperature=drawn[0],
            top_p=drawn[1],
            min_p=drawn[2],
            noise=drawn[3],
        )
        return choose(logits, wishes, self.sampling), logits

    def capture(self, bucket: int, pool: _POOL_HANDLE) -> None:
        """Records `launch` as a graph, which `run` uses from then on. Computes nothing. To be called on a stream of its own, after
        `launch` has run there for this bucket; another thread may `run` meanwhile. Graphs of one `pool` share memory.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            chosen, logits = self.launch(bucket)
        finally:
            graph.capture_end()
        self._graphs[bucket] = _Graph(graph, chosen, logits)

    def _send_tables(self, rows: Sequence[BatchRow]) -> None:
        """Of the rows whose sequence has another block than in the step before."""
        size = self._decoder.shape.block_size_tokens
        for at, row in enumerate(rows):
            table = row.block_table[: row.start // size + 1]
            if table != self._known[at]:
                values = np.array(table, np.int32)
                self._link.send_into(values, self._tables[at, : len(values)])
                self._known[at] = table


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    chosen: Tensor
    logits: Tensor
