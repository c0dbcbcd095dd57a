"""The runner of real models: loads one, has a backend compute the engine's batches, and samples. See `baton.engine.batch.Runner`.

Built and used by one thread, the engine's. Torch's thread count is set there, since it is that thread's own.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from baton.engine.backends import load_model
from baton.engine.base import EngineInfo
from baton.engine.batch import BatchRow, Sampled, SampleInput
from baton.engine.config import EngineConfig, load_model_config, resolve
from baton.engine.loader import find_checkpoint, fingerprint, open_checkpoint
from baton.engine.memory import free_memory_bytes
from baton.engine.progress import Progress
from baton.engine.sampling import sample
from baton.errors import ModelLoadError
from baton.kv.pool import size_pool
from baton.kv.spec import KVDtype, KVSpec, SealedKV
from baton.types import SamplingParams

_POOL_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Of the memory that is free once the model is loaded. On CPU the pool's neighbours are other workers and the object store; on
CUDA the rest is for activations."""


WARM_UP_TOKENS = 64


class ModelRunner:
    """Implements `Runner`."""

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None) -> None:
        """Loads the model; `progress` is called by this thread. Raises `ModelLoadError`."""
        directory = find_checkpoint(config.model)
        model = load_model_config(directory)
        config = resolve(config, model)
        assert config.dtype is not None
        assert config.weights is not None
        assert config.max_context_tokens is not None
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ModelLoadError(
                config.model, "device is cuda, but this machine has no CUDA device"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        checkpoint = open_checkpoint(directory)
        spec = KVSpec(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=KVDtype(config.dtype),
            position_scheme=model.position_scheme(config.max_context_tokens),
            model_fingerprint=fingerprint(checkpoint),
            weights=config.prompt_weights,
        )
        with torch.inference_mode():
            loaded = load_model(config, model, checkpoint, progress)
            num_blocks = size_pool(
                kv_pool_tokens=config.kv_pool_tokens,
                free_bytes=int(_POOL_SHARE[config.device] * free_memory_bytes(config.device)),
                token_bytes=spec.token_bytes,
                block_size_tokens=config.block_size_tokens,
                most_tokens=config.max_running * config.max_context_tokens,
            )
            if num_blocks == 0:
                raise ModelLoadError(config.model, "no memory is left for the KV pool")
            room_tokens = min(config.max_context_tokens, num_blocks * config.block_size_tokens)
            if room_tokens < 2:
                raise ModelLoadError(
                    config.model, f"a context of {room_tokens} holds no prompt and answer"
                )
            try:
                self.backend = loaded(spec, num_blocks)
            except (MemoryError, OSError, torch.OutOfMemoryError) as error:
                raise ModelLoadError(
                    config.model, f"no engine with {num_blocks} blocks of KV: {error}"
                ) from error
        self._info = EngineInfo(
            model=directory.resolve().name if Path(config.model).is_dir() else config.model,
            spec=spec,
            vocab_size=model.vocab_size,
            max_context_tokens=config.max_context_tokens,
            eos_token_ids=model.eos_token_ids,
            block_size_tokens=config.block_size_tokens,
            num_blocks=num_blocks,
            device=config.device,
            weights=config.weights,
            directory=str(directory.resolve()),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        results: list[Sampled | None] = [None] * len(rows)
        if not rows:
            return results
        with torch.inference_mode():
            logits = self.backend.compute(rows)
            inputs = [row.sample for row in (rows[i] for i in logits.rows) if row.sample]
            if not inputs:
                return results
            chosen = sample(logits.values, inputs, self._info.eos_token_ids)
        for row, token in zip(logits.rows, chosen, strict=True):
            results[row] = token
        return results

    def warm_up(self) -> None:
        """Computes a prompt and a next token of no meaning: torch loads its kernels with their first use, and no request is to wait
        for that. To be called before any request; the KV it leaves in the first blocks belongs to nobody.
        """
        size = self._info.block_size_tokens
        room = min(self._info.max_context_tokens, self._info.num_blocks * size) - 1
        length = min(WARM_UP_TOKENS, room)
        blocks = range(-(-(length + 1) // size))
        params = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9)
        self.run([BatchRow([0] * length, 0, blocks, SampleInput(params, [0], []))])
        self.run([BatchRow([0], length, blocks, SampleInput(params, [0], [0]))])

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        with torch.inference_mode():
            return self.backend.read_kv(block_table, first, last)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        with torch.inference_mode():
            self.backend.write_kv(block_table, first, kv)
