"""Measures the machine's limits, in a process of its own: memory read bandwidth, and the rates of matrix products.

    python -m benchmarks.engine.machine --threads 2 --cache DIR --answers 1

Each line on standard input asks for the limits of this moment; the answer is a line of JSON (`benchmarks.engine.limits.Limits`), written
to the descriptor --answers.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.engine.limits import Limits

MEMORY_BYTES = 512 << 20
CACHE_INDEX = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
TRIES = 3
ROWS, INPUTS, OUTPUTS = 1024, 2048, 2048
"""A matrix product that no cache or call overhead holds back."""


def best_s(run: Callable[[], object]) -> float:
    """The shortest of some tries: a limit is what was reached once."""
    seconds = []
    for _ in range(TRIES):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


class Reader:
    """Reads memory with as many threads as it is told."""

    def __init__(self, cache: Path) -> None:
        """Compiles its loop for this processor."""
        source, library = Path(__file__).with_name("read.c"), cache / "read.so"
        cache.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", library], check=True)
        self._read = ctypes.CDLL(str(library)).read_words
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._words = np.ones(MEMORY_BYTES // 8, np.uint64)

    def bytes_per_s(self, size_bytes: int, threads: int) -> float:
        """Each thread reads its own part of `size_bytes`, until about `MEMORY_BYTES` are read."""
        count, repetitions = size_bytes // 8 // threads, max(1, MEMORY_BYTES // size_bytes)

        def read() -> None:
            parts = [
                threading.Thread(
                    target=self._read,
                    args=(self._words[n * count :].ctypes.data, count, repetitions),
                )
                for n in range(threads)
            ]
            for part in parts:
                part.start()
            for part in parts:
                part.join()

        return count * threads * 8 * repetitions / best_s(read)


def _product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    ops = torch.ops.mkldnn
    x, packed = x.to(dtype), ops._reorder_linear_weight(weight.to(dtype))  # noqa: SLF001
    return lambda: ops._linear_pointwise(x, packed, None, "none", [], "")  # noqa: SLF001


class Multiplier:
    """Matrix products as oneDNN computes them, with the weight in its own layout where it has one."""

    def __init__(self) -> None:
        self._calls = {
            name: _product(torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), dtype)
            for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
        }
        left = torch.randint(-128, 127, (ROWS, INPUTS), dtype=torch.int8)
        right = torch.randint(-128, 127, (INPUTS, OUTPUTS), dtype=torch.int8)
        self._calls["int8"] = lambda: torch._int_mm(left, right)  # noqa: SLF001

    def per_s(self, threads: int) -> dict[str, float]:
        """Multiplications and additions."""
        torch.set_num_threads(threads)
        flops = 2.0 * ROWS * INPUTS * OUTPUTS
        rates = {name: flops / best_s(call) for name, call in self._calls.items()}
        # Where eight bits have no fast path, what holds for sixteen does for them.
        return rates | {"int8": max(rates["int8"], rates["bf16"])}


def cache_bytes() -> int:
    """Of the last level; 0 where the system does not tell."""
    if not CACHE_INDEX.exists():
        return 0
    text = CACHE_INDEX.read_text().strip()
    return int(text.removesuffix("K")) << 10


def main() -> None:
    """Answers until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--answers", type=int, required=True)
    args = parser.parse_args()
    reader, multiplier, size = Reader(args.cache), Multiplier(), cache_bytes()
    for _ in sys.stdin:
        limits = Limits(
            memory_bytes_per_s=reader.bytes_per_s(MEMORY_BYTES, args.threads),
            memory_bytes_per_s_one_thread=reader.bytes_per_s(MEMORY_BYTES, 1),
            # Beyond the cores' own caches, within the shared one.
            cache_bytes_per_s=reader.bytes_per_s(size // 3 or MEMORY_BYTES, args.threads),
            cache_bytes=size,
            gemm_per_s=multiplier.per_s(args.threads),
            gemm_per_s_one_thread=multiplier.per_s(1),
        )
        os.write(args.answers, f"{json.dumps(asdict(limits))}\n".encode())


if __name__ == "__main__":
    main()
