"""The same engine on a CUDA device: tokens of `transformers`, and KV that moves between devices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from baton.engine.batch import BatchRow, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.runner import ModelRunner
from tests import oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def runner_of(path: Path, **changes: object) -> ModelRunner:
    fields: dict[str, object] = {"device": "cuda", "dtype": "float32", "kv_pool_tokens": 4096}
    return ModelRunner(EngineConfig(model=str(path), **{**fields, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", oracle.ARCHITECTURES)
def test_every_architecture_generates_the_tokens_of_transformers_on_cuda(
    tmp_path: Path, name: str
) -> None:
    reference = oracle.Oracle(oracle.save(oracle.ARCHITECTURES[name], tmp_path))
    prompts = [oracle.prompt_of(length) for length in (3, 40)]
    expected = [reference.generate(prompt, 64) for prompt in prompts]
    requests = oracle.drive(runner_of(tmp_path), prompts, 64, chunk=24)
    assert [request.output for request in requests] == expected


@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("chunk", [8, 512])
def test_tokens_on_cuda_depend_on_neither_block_size_nor_chunk_size(
    tmp_path: Path, chunk: int, block_size: int
) -> None:
    reference = oracle.Oracle(oracle.save(oracle.llama, tmp_path))
    prompts = [oracle.prompt_of(length) for length in (1, 16, 33, 130)]
    expected = [reference.generate(prompt, 64) for prompt in prompts]
    runner = runner_of(tmp_path, block_size_tokens=block_size)
    requests = oracle.drive(runner, prompts, 64, chunk=chunk)
    assert [request.output for request in requests] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kv_moves_from_cuda_to_cpu_and_back_unchanged(tmp_path: Path, dtype: str) -> None:
    oracle.save(oracle.llama, tmp_path)
    cuda = runner_of(tmp_path, dtype=dtype, block_size_tokens=4)
    cpu = runner_of(tmp_path, dtype=dtype, device="cpu")
    prompt = oracle.prompt_of(50)
    cuda_table, cpu_table = tuple(range(30, 50)), (7, 2, 3, 5)
    want = SampleInput(oracle.GREEDY, prompt, ())
    cuda.run([BatchRow(prompt, 0, cuda_table, want)])
    moved = cuda.read_kv(cuda_table, 3, 50)
    moved.data.setflags(write=False)
    cpu.write_kv(cpu_table, 3, moved)
    np.testing.assert_array_equal(cpu.read_kv(cpu_table, 3, 50).data, moved.data)
    back = tuple(range(60, 80))
    cuda.write_kv(back, 3, moved)
    np.testing.assert_array_equal(cuda.read_kv(back, 3, 50).data, moved.data)
