"""The simulated engine: the real scheduler, pool and prefix cache over a runner that needs no model and no torch.

Its tokens are a deterministic function of the *stored KV* of every token before them, read through the block table, so that a
lost, stale or misplaced block shows as a wrong token, as with a real model. Latencies are configurable. It is for testing
placement, sessions and failure with many workers on a small machine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton.engine.base import EngineInfo
from baton.engine.batch import BatchRow, Sampled, SampleInput
from baton.engine.config import EngineConfig, load_model_config
from baton.engine.engine import PagedEngine
from baton.engine.noise import uniform
from baton.kv.checksum import RunningChecksum, sealed
from baton.kv.spec import KVDtype, KVSpec, SealedKV, WeightFormat
from baton.types import PositionLogprobs, TokenLogprob

_MODULUS = 65521
"""Below 2**16, so that every stored value is exact in float32."""


DEFAULT_POOL_TOKENS = 65536


class EngineKind(Enum):
    """What computes the tokens."""

    TORCH = "torch"
    SIM = "sim"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """Shape and speed of a simulated engine."""

    model: str = "sim"
    vocab_size: int = 256
    max_context_tokens: int = 4096
    eos_token_ids: tuple[int, ...] = (0,)
    block_size_tokens: int = 16
    num_blocks: int = 1024
    max_batch_tokens: int = 512
    max_running: int = 256
    prefix_cache: bool = True
    step_s: float = 0.0
    """Time that every step takes."""
    token_s: float = 0.0
    """Time that each computed token adds."""
    weights: WeightFormat | None = None
    """Format that it pretends to compute in: what it stores and says differs by it. None: the dtype's own."""
    imports_prompts: bool = False
    prompt_weights: WeightFormat | None = None
    """Both as in `EngineConfig`."""
    directory: str = ""
    """Of the checkpoint that it stands for, whose tokenizer is used; empty: none."""


def simulated(chosen: EngineConfig, *, step_s: float = 0.0) -> SimConfig:
    """A simulated engine in the chosen one's place, with the vocabulary and context of its checkpoint, whose tokenizer is served. Reads
    the checkpoint's description; raises `ModelLoadError`.
    """
    model = load_model_config(Path(chosen.model))
    tokens = chosen.kv_pool_tokens or DEFAULT_POOL_TOKENS
    return SimConfig(
        model=Path(chosen.model).resolve().name,
        directory=str(Path(chosen.model).resolve()),
        vocab_size=model.vocab_size,
        max_context_tokens=chosen.max_context_tokens or model.max_position_tokens,
        eos_token_ids=model.eos_token_ids,
        block_size_tokens=chosen.block_size_tokens,
        num_blocks=max(1, tokens // chosen.block_size_tokens),
        max_batch_tokens=chosen.max_batch_tokens,
        max_running=chosen.max_running,
        prefix_cache=chosen.prefix_cache,
        weights=chosen.weights,
        imports_prompts=chosen.imports_prompts,
        prompt_weights=chosen.prompt_weights,
        step_s=step_s,
    )


class SimRunner:
    """KV of a token is (its id, its position), in one layer with one head of two numbers. A format other than the dtype's adds a number
    of its own to the id.
    """

    def __init__(self, config: SimConfig) -> None:
        self._config = config
        self._info = EngineInfo(
            model=config.model,
            spec=KVSpec(
                num_layers=1,
                num_kv_heads=1,
                head_dim=2,
                dtype=KVDtype.FLOAT32,
                position_scheme="sim",
                model_fingerprint=f"sim:{config.model}:{config.vocab_size}",
                weights=config.prompt_weights if config.imports_prompts else config.weights,
            ),
            vocab_size=config.vocab_size,
            max_context_tokens=config.max_context_tokens,
            eos_token_ids=config.eos_token_ids,
            block_size_tokens=config.block_size_tokens,
            num_blocks=config.num_blocks,
            device="sim",
            weights=config.weights,
            directory=config.directory,
        )
        # [slots, 2]: what keys and values both hold
        self._slots = np.zeros((config.num_blocks * config.block_size_tokens, 2), np.float32)
        own = self._info.weight_format
        self._mark = 0 if own is WeightFormat.FLOAT32 else 7 * list(WeightFormat).index(own)
        # A table's last block may end after the longest context.
        end = config.max_context_tokens + config.block_size_tokens
        position = np.arange(end, dtype=np.int64)
        self._weight = (position * 40503 + 12345) % _MODULUS

    @property
    def info(self) -> EngineInfo:
        return self._info

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        computed = sum(len(row.token_ids) for row in rows)
        end_s = time.monotonic() + self._config.step_s + computed * self._config.token_s
        for row in rows:
            self._write(row)
        states = iter(self._states([row for row in rows if row.sample is not None]))
        chosen = [
            None if row.sample is None else self._choose(next(states), row.sample) for row in rows
        ]
        left_s = end_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        return chosen

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        slots = self._slot_ids(block_table, last)[first:]
        kv = np.empty(self._info.spec.wire_shape(last - first), np.float32)
        kv[:, 0, :, 0, :] = self._slots[slots]
        return sealed(kv)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        checksum = RunningChecksum()
        checksum.add(kv.data)
        checksum.compare(kv)
        slots = self._slot_ids(block_table, first + kv.data.shape[2])[first:]
        self._slots[slots] = kv.data[0, 0, :, 0, :]

    def _slot_ids(self, block_table: Sequence[int], num_tokens: int) -> npt.NDArray[np.int64]:
        """[num_tokens]: where each token's KV is."""
        size = self._config.block_size_tokens
        blocks = np.asarray(block_table, np.int64)
        return (blocks[:, None] * size + np.arange(size)).reshape(-1)[:num_tokens]

    def _write(self, row: BatchRow) -> None:
        size, start, count = self._config.block_size_tokens, row.start, len(row.token_ids)
        if count == 1:
            slot = row.block_table[start // size] * size + start % size
            slots: slice | npt.NDArray[np.int64] = slice(slot, slot + 1)
        else:
            slots = self._slot_ids(row.block_table, start + count)[start:]
        self._slots[slots, 0] = np.add(row.token_ids, self._mark)
        self._slots[slots, 1] = np.arange(start, start + count)

    def _states(self, rows: Sequence[BatchRow]) -> list[int]:
        """What the stored KV of each row's tokens comes to."""
        if not rows:
            return []
        size = self._config.block_size_tokens
        lengths = [row.start + len(row.token_ids) for row in rows]
        counts = [-(-length // size) for length in lengths]
        tables = (row.block_table[:count] for row, count in zip(rows, counts, strict=True))
        # [B]: of all rows
        blocks = np.fromiter(chain.from_iterable(tables), np.int64, sum(counts))
        firsts = np.cumsum([0, *counts[:-1]])
        index = np.arange(len(blocks)) - np.repeat(firsts, counts)
        # [B, block size]
        position = index[:, None] * size + np.arange(size)
        stored = self._slots.reshape(-1, size, 2)[blocks].astype(np.int64)
        each = (stored[..., 0] + 1 + (stored[..., 1] != position)) * self._weight[position]
        each *= position < np.repeat(lengths, counts)[:, None]
        states = np.add.reduceat(each.sum(axis=1), firsts) % _MODULUS + self._mark
        return [int(state) for state in states]

    def _choose(self, state: int, sample: SampleInput) -> Sampled:
        params = sample.params
        if params.temperature > 0:
            state += int(uniform(params.seed, params.choice, len(sample.output)) * _MODULUS)
        token_id = state % self._config.vocab_size
        if len(sample.output) < params.min_tokens:
            ends = {*self._config.eos_token_ids, *params.stop_token_ids}
            while token_id in ends:
                token_id = (token_id + 1) % self._config.vocab_size
        if params.logprobs is None:
            return Sampled(token_id, None)
        chosen = TokenLogprob(token_id, -(state % 1000) / 1000)
        return Sampled(token_id, PositionLogprobs(chosen, (chosen,) * min(params.logprobs, 1)))


def build_sim_engine(config: SimConfig) -> PagedEngine:
    """A simulated engine, ready to step."""
    return PagedEngine(
        SimRunner(config),
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        prefix_cache=config.prefix_cache,
    )
