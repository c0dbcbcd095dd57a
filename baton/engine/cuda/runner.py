"""The CUDA runner: a torch runner's model and pool, computed by kernels of its own. See `baton.engine.batch.Runner`.

Rows of one token and prompts' chunks are computed apart, the former as a captured graph where there is one. Nothing in a step waits
for the device but its end, for the copy of the chosen tokens; a step that chooses none waits for nothing at all.

Until the kernels are compiled, and for good where they cannot be, the torch runner computes: `baton.engine.cuda.readiness` makes them
ready on a thread of its own. All else belongs to the engine's thread.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from baton.engine.base import EngineInfo
from baton.engine.batch import BatchRow, Sampled, SampleInput
from baton.engine.cuda.attention import HeadShape
from baton.engine.cuda.decode import DecodeStep
from baton.engine.cuda.decoder import CudaDecoder
from baton.engine.cuda.link import Link
from baton.engine.cuda.plan import Wish, graph_buckets
from baton.engine.cuda.prefill import PrefillStep
from baton.engine.cuda.readiness import Readiness
from baton.engine.cuda.sampling import wish_of
from baton.engine.cuda.staging import CudaSide, InlineSide, Staging
from baton.engine.runner import ModelRunner
from baton.engine.sampling import sample
from baton.engine.torch_backend import TorchBackend
from baton.errors import InternalError
from baton.kv.spec import KVSpec, SealedKV

_LARGEST_HEAD_DIM = 256

_Settle = Callable[[list[Sampled | None]], None]
"""Waits for a part of a step and fills in its rows' results."""


def supports(spec: KVSpec) -> bool:
    """Whether the kernels can compute a model of this shape."""
    return spec.head_dim % 2 == 0 and spec.head_dim <= _LARGEST_HEAD_DIM


class CudaRunner:
    """Implements `Runner`."""

    def __init__(self, plain: ModelRunner, *, max_rows: int, capture: bool) -> None:
        """`max_rows` is the most sequences of one step; `capture` says whether decode steps become graphs."""
        self._plain = plain
        backend = plain.backend
        assert isinstance(backend, TorchBackend), "the kernels share torch's pool"
        info, pool, model = plain.info, backend.pool, backend.decoder
        device = pool.data.device
        self._eos = info.eos_token_ids
        self._link = Link(device)
        side = CudaSide(device) if device.type == "cuda" else InlineSide()
        self._staging = Staging(info.spec, pool.data, self._link, side)
        decoder = CudaDecoder(
            decoder=model,
            layers=pool.layers,
            shape=HeadShape(
                num_heads=model.blocks[0].attention.num_heads,
                num_kv_heads=info.spec.num_kv_heads,
                head_dim=info.spec.head_dim,
                block_size_tokens=info.block_size_tokens,
            ),
        )
        with torch.inference_mode():
            self._decode = DecodeStep(
                decoder,
                self._link,
                buckets=graph_buckets(max_rows),
                context_tokens=info.max_context_tokens,
                vocab_size=info.vocab_size,
            )
        self._prefill = PrefillStep(decoder, self._link, self._decode.sampling)
        self._readiness = Readiness(self._decode, self._prefill, capture=capture)

    @property
    def info(self) -> EngineInfo:
        return self._plain.info

    def warm_up(self) -> None:
        """As the torch runner's; compiling and capturing go on beside the first requests."""
        self._plain.warm_up()
        self._readiness.start(self._link.device)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether compiling and capturing have ended, for those who measure; a request waits for neither."""
        return self._readiness.wait(timeout_s)

    @property
    def num_graphs(self) -> int:
        """Batch sizes captured so far."""
        return self._decode.num_graphs

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        if not self._readiness.compiled:
            return self._plain.run(rows)
        results: list[Sampled | None] = [None] * len(rows)
        singles = [i for i, row in enumerate(rows) if len(row.token_ids) == 1]
        chunks = [i for i, row in enumerate(rows) if len(row.token_ids) > 1]
        with torch.inference_mode():
            most = self._decode.buckets[-1]
            parts = [
                self._start_decode(rows, singles[first : first + most])
                for first in range(0, len(singles), most)
            ]
            if chunks:
                parts.append(self._start_prefill(rows, chunks))
            for settle in parts:
                settle(results)
        return results

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        with torch.inference_mode():
            return self._staging.read_kv(block_table, first, last)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        with torch.inference_mode():
            self._staging.write_kv(block_table, first, kv)

    def _start_decode(self, rows: Sequence[BatchRow], members: list[int]) -> _Settle:
        wishes = [wish_of(rows[i].sample, self._eos) for i in members]
        chosen, logits = self._decode.run([rows[i] for i in members], wishes)
        return self._settle(rows, members, wishes, chosen, logits)

    def _start_prefill(self, rows: Sequence[BatchRow], members: list[int]) -> _Settle:
        sampled = [i for i in members if rows[i].sample is not None]
        wishes = [wish_of(rows[i].sample, self._eos) for i in sampled]
        chosen, logits = self._prefill.run([rows[i] for i in members], wishes)
        return self._settle(rows, sampled, wishes, chosen, logits)

    def _settle(
        self,
        rows: Sequence[BatchRow],
        members: list[int],
        wishes: list[Wish | None],
        chosen: Tensor,
        logits: Tensor,
    ) -> _Settle:
        """Starts to fetch the tokens of `members`; what the kernels cannot choose is chosen now, since the logits will not stay."""
        inputs = [rows[i].sample for i in members]
        asked = [at for at, wish in enumerate(wishes) if wish is None]
        others = self._sample([inputs[at] for at in asked], logits[asked]) if asked else []
        if not any(inputs):
            return lambda _: None
        fetched = self._link.fetch(chosen)

        def settle(results: list[Sampled | None]) -> None:
            tokens = fetched()
            broken = [members[at] for at, token in enumerate(tokens) if token < 0 and inputs[at]]
            if broken:
                raise InternalError(
                    f"no token can be chosen from the logits of batch rows {broken}"
                )
            for at, member in enumerate(members):
                if inputs[at] is not None:
                    results[member] = Sampled(tokens[at], None)
            for at, other in zip(asked, others, strict=True):
                results[members[at]] = other

        return settle

    def _sample(self, inputs: list[SampleInput | None], logits: Tensor) -> list[Sampled]:
        wanted = [one for one in inputs if one is not None]
        return sample(logits.to(torch.float32), wanted, self._eos)
