"""The engine on one CUDA device, beside `transformers` on the same weights, as a share of what the device can do.

Random weights in bfloat16, of the shapes of Llama 3.2 1B and Llama 3.1 8B. Decode: tokens per second at several batch sizes, whole engine
steps, after a context of 128 tokens. Its limit is the time to read the weights and the KV once, at the bandwidth that a copy reaches.
Prefill: 8,192 tokens of one prompt. Its limit is the time of its multiplications, at the rate that a large product reaches.

    python -m benchmarks.gpu_engine --shapes 1b 8b
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from baton.engine.base import EngineRequest, Mode, Token
from baton.engine.config import EngineConfig
from baton.engine.cuda.runner import CudaRunner
from baton.engine.engine import PagedEngine
from baton.engine.runner import ModelRunner
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from benchmarks.report import write_report

VOCAB = 128_256
CONTEXT, PREFILL = 128, 8192
READY_S = 600.0
TARGETS = {
    "decode, share of bandwidth, batch 1 and 64": 0.75,
    "prefill, share of GEMM rate": 0.60,
    "decode against transformers, batch 16": 3.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    def config(self) -> LlamaConfig:
        """As `transformers` has it."""
        return LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=16_384,
            rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            dtype="bfloat16",
            eos_token_id=2,
            bos_token_id=1,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        attention = 2 * self.heads + 2 * self.kv_heads
        return self.layers * self.hidden * (attention * self.head_dim + 3 * self.inner)

    def decode_bytes(self, batch: int, context: int) -> int:
        """What a decode step must read: every matrix once, the output's too, and the KV of every sequence."""
        kv = 2 * self.layers * self.kv_heads * self.head_dim * context * batch
        return 2 * (self.layer_weights + VOCAB * self.hidden + kv)

    def prefill_operations(self, tokens: int) -> int:
        """Multiplications and additions; attention sees half of all pairs."""
        pairs = tokens * tokens // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * self.layer_weights * tokens + 2 * VOCAB * self.hidden + attention


SHAPES = {
    "1b": Shape(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True),
    "8b": Shape(
        hidden=4096, inner=14_336, layers=32, heads=32, kv_heads=8, head_dim=128, tied=False
    ),
}


def seconds_of(run: Callable[[], object], *, repeats: int) -> float:
    """Median of several runs, by the device's own clock."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        times.append(elapsed_ms / 1000)
    return statistics.median(times)


def copy_bytes_per_s() -> float:
    """Read and written, by a copy far larger than any cache."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), repeats=9)


def gemm_operations_per_s() -> float:
    """Of a large product of random numbers in bfloat16."""
    size = 8192
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / seconds_of(lambda: a @ b, repeats=15)


def save_random(shape: Shape, directory: Path) -> None:
    """A checkpoint of random weights, written tensor by tensor from the device."""
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        made = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        tensors[name] = (made.fill_(1.0) if made.dim() == 1 else made.normal_(std=0.02)).cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def prompt(tokens: int, salt: int) -> tuple[int, ...]:
    """Random, and always the same."""
    generator = torch.Generator().manual_seed(salt)
    return tuple(torch.randint(3, VOCAB, (tokens,), generator=generator).tolist())


class Baton:
    """Baton's engine, stepped by this thread."""

    def __init__(self, directory: Path, *, max_rows: int) -> None:
        config = EngineConfig(
            model=str(directory),
            dtype="bfloat16",
            device="cuda",
            kv_pool_tokens=max(2 * PREFILL, max_rows * 1024),
            max_batch_tokens=PREFILL,
            max_running=max_rows,
            prefix_cache=False,
        )
        runner = CudaRunner(ModelRunner(config), max_rows=max_rows, capture=True)
        runner.warm_up()
        assert runner.wait_until_ready(READY_S)
        if runner.num_graphs == 0:
            sys.exit("the kernels or graphs could not be made ready: see the log above")
        self._engine = PagedEngine(
            runner, max_batch_tokens=PREFILL, max_running=max_rows, prefix_cache=False
        )
        self._count = 0

    def decode_step_s(self, batch: int, steps: int) -> float:
        """Median of whole steps, once every sequence generates."""
        keys = [self._add(prompt(CONTEXT, salt), steps + 16) for salt in range(batch)]
        begun: set[AttemptKey] = set()
        while len(begun) < batch:
            begun |= {event.key for event in self._engine.step() if isinstance(event, Token)}
        times = []
        for _ in range(steps):
            began_s = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - began_s)
        for key in keys:
            self._engine.release(key)
        return statistics.median(times)

    def prefill_s(self, repeats: int) -> float:
        """Median from a prompt's arrival to its first token."""
        times = []
        for salt in range(repeats + 1):
            began_s = time.perf_counter()
            key = self._add(prompt(PREFILL, salt), 1)
            while not any(isinstance(event, Token) for event in self._engine.step()):
                pass
            times.append(time.perf_counter() - began_s)
            self._engine.release(key)
        return statistics.median(times[1:])

    def _add(self, tokens: tuple[int, ...], count: int) -> AttemptKey:
        self._count += 1
        key = AttemptKey(RequestId(f"bench-{self._count}"))
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        self._engine.add(EngineRequest(key, Sequence(tokens, (), sampling), Mode.LOCAL))
        return key


class Peer:
    """`transformers`, as its documentation says to generate."""

    def __init__(self, directory: Path) -> None:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model
        # transformers declares a self that its models are not.
        self._model.cuda()  # type: ignore[call-arg]

    def decode_step_s(self, batch: int, steps: int) -> float:
        """The time that one more token takes: between generations of two lengths, so that the prompt's part falls out."""
        ids = torch.tensor([prompt(CONTEXT, salt) for salt in range(batch)], device="cuda")
        self._generate(ids, 4)
        return (self._generate(ids, steps + 4) - self._generate(ids, 4)) / steps

    def prefill_s(self, repeats: int) -> float:
        ids = torch.tensor([prompt(PREFILL, 0)], device="cuda")
        self._generate(ids, 1)
        return statistics.median(self._generate(ids, 1) for _ in range(repeats))

    def _generate(self, ids: torch.Tensor, count: int) -> float:
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        with torch.inference_mode():
            # transformers declares a self that its models are not.
            self._model.generate(  # type: ignore[misc]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - began_s


def measure(directory: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of each cell, by engine. One engine is on the device at a time."""
    seconds: dict[str, dict[str, float]] = {}
    for name in ("baton", "transformers"):
        engine = (
            Baton(directory, max_rows=max(args.batches)) if name == "baton" else Peer(directory)
        )
        cells = {f"decode {n}": engine.decode_step_s(n, args.steps) for n in args.batches}
        cells[f"prefill {PREFILL}"] = engine.prefill_s(args.repeats)
        seconds[name] = cells
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return seconds


def rows_of(
    name: str,
    seconds: dict[str, dict[str, float]],
    args: argparse.Namespace,
    limits: dict[str, float],
) -> list[dict[str, object]]:
    """One row a cell: rates, the share of the limit, and the ratio to the peer."""
    shape = SHAPES[name]
    rows: list[dict[str, object]] = []
    for cell, ours_s in seconds["baton"].items():
        kind, size = cell.split()
        theirs_s = seconds["transformers"][cell]
        if kind == "decode":
            tokens = int(size)
            context = CONTEXT + args.steps // 2
            limit_s = shape.decode_bytes(tokens, context) / limits["copy_bytes_per_s"]
        else:
            tokens = PREFILL
            limit_s = shape.prefill_operations(tokens) / limits["gemm_operations_per_s"]
        rows.append(
            {
                "shape": name,
                "cell": cell,
                "baton_tokens_per_s": tokens / ours_s,
                "transformers_tokens_per_s": tokens / theirs_s,
                "ratio": theirs_s / ours_s,
                "share_of_limit": limit_s / ours_s,
            }
        )
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=128, help="decode steps a cell")
    parser.add_argument("--repeats", type=int, default=5, help="prompts a cell")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_engine.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_engine needs a CUDA device, and this machine has none")
    limits = {
        "copy_bytes_per_s": copy_bytes_per_s(),
        "gemm_operations_per_s": gemm_operations_per_s(),
    }
    device = torch.cuda.get_device_name()
    print(
        f"{device}: copies {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"multiplies {limits['gemm_operations_per_s'] / 1e12:.0f} TFLOP/s"
    )
    print(
        f"{'shape':6}{'cell':14}{'baton tok/s':>13}{'peer tok/s':>13}{'ratio':>8}{'of limit':>10}"
    )
    raw: dict[str, object] = {}
    table: list[dict[str, object]] = []
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as directory:
            save_random(SHAPES[name], Path(directory))
            seconds = measure(Path(directory), args)
        raw[name] = seconds
        for row in rows_of(name, seconds, args, limits):
            table.append(row)
            print(
                f"{row['shape']:6}{row['cell']:14}{row['baton_tokens_per_s']:13.0f}"
                f"{row['transformers_tokens_per_s']:13.0f}{row['ratio']:8.2f}"
                f"{row['share_of_limit']:10.1%}",
                flush=True,
            )
    write_report(
        args.out,
        settings={"device": device, "dtype": "bfloat16", "context_tokens": CONTEXT, **limits},
        raw={"seconds": raw},
        summary={"targets": TARGETS, "cells": table},
    )


if __name__ == "__main__":
    main()
