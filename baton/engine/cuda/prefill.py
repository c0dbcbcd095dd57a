"""Prompts' chunks: many tokens of a few sequences, launched kernel by kernel, since their shapes are of endless variety."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.engine.batch import BatchRow
from baton.engine.cuda.attention import PrefillRows, prefill_tile
from baton.engine.cuda.decoder import CudaDecoder, Step
from baton.engine.cuda.link import Link
from baton.engine.cuda.plan import (
    HEADER,
    INTEGERS,
    PrefillLayout,
    Wish,
    prefill_layout,
    put_wishes,
)
from baton.engine.cuda.sampling import SamplingScratch, Wishes, choose


class PrefillStep:
    """Used by one thread at a time."""

    def __init__(self, decoder: CudaDecoder, link: Link, sampling: SamplingScratch) -> None:
        """`sampling` may be another step's: steps are computed one after another."""
        self._decoder = decoder
        self._link = link
        self._sampling = sampling

    def run(self, rows: Sequence[BatchRow], wishes: Sequence[Wish | None]) -> tuple[Tensor, Tensor]:
        """Computes the rows: the token of each that wants one, as `wishes` says, and its logits, both in the rows' order."""
        # -> [R] int64, [R, V]
        logits = self._compute(self._layout(rows))
        if not wishes:
            return torch.empty(0, dtype=torch.int64, device=logits.device), logits
        header = np.zeros((len(HEADER), len(wishes)), np.int64)
        put_wishes(header, wishes)
        return self._choose(logits, self._link.send(header)), logits

    def launch_padding(self) -> None:
        """Starts the kernels for two tokens that have no place in the pool."""
        layout = self._layout([BatchRow((0, 0), 0, (0,), None)])
        layout.packed[layout.tokens[2]] = -1
        self._compute(layout)

    def _layout(self, rows: Sequence[BatchRow]) -> PrefillLayout:
        shape = self._decoder.shape
        tile = prefill_tile(self._decoder.layers[0].keys.dtype, shape.head_dim).queries
        return prefill_layout(rows, block_size=shape.block_size_tokens, tile=tile)

    def _compute(self, layout: PrefillLayout) -> Tensor:
        # -> [R, V]
        packed = self._link.send(layout.packed)
        token_ids, positions, slots = (packed[part] for part in layout.tokens)
        attended = PrefillRows(tiles=packed[layout.tiles].view(4, -1), tables=packed[layout.tables])
        return self._decoder(
            Step(
                token_ids=token_ids,
                positions=positions,
                slots=slots,
                rows=attended,
                wanted=packed[layout.wanted],
            )
        )

    def _choose(self, logits: Tensor, header: Tensor) -> Tensor:
        """For as many rows at a time as there is scratch for."""
        drawn = header[len(INTEGERS) :].view(torch.float64)
        most = len(self._sampling.peaks)
        chosen = []
        for first in range(0, len(logits), most):
            part = slice(first, first + most)
            temperature, top_p, min_p, noise = (column[part] for column in drawn)
            wishes = Wishes(
                top_k=header[HEADER.index("top_k"), part],
                temperature=temperature,
                top_p=top_p,
                min_p=min_p,
                noise=noise,
            )
            chosen.append(choose(logits[part], wishes, self._sampling))
        return torch.cat(chosen)
