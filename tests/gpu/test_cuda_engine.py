"""The engine on a CUDA device, by its own kernels and by torch's: tokens of `transformers`, graphs, and KV that moves between devices."""

from pathlib import Path

import numpy as np
import pytest

from tests import cuda_rig, oracle  # isort: skip - first: it chooses the interpreter

from baton.engine.batch import BatchRow, Runner, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.cuda.plan import graph_buckets
from baton.engine.cuda.runner import CudaRunner
from baton.engine.runner import ModelRunner
from baton.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_rig.DEVICE.type != "cuda", reason="needs a CUDA device"),
]


READY_S = 50.0
MAX_ROWS = 6


def plain_runner_of(path: Path, **changes: object) -> ModelRunner:
    fields: dict[str, object] = {"device": "cuda", "dtype": "float32", "kv_pool_tokens": 4096}
    return ModelRunner(EngineConfig(model=str(path), **{**fields, **changes}))  # type: ignore[arg-type]


def runner_of(path: Path, **changes: object) -> CudaRunner:
    """With every graph captured."""
    runner = CudaRunner(plain_runner_of(path, **changes), max_rows=MAX_ROWS, capture=True)
    runner.warm_up()
    assert runner.wait_until_ready(READY_S)
    assert runner.num_graphs == len(graph_buckets(MAX_ROWS))
    return runner


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
    cpu = plain_runner_of(tmp_path, dtype=dtype, device="cpu")
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


def generate(runner: Runner, params: SamplingParams, lengths: tuple[int, ...]) -> list[list[int]]:
    """Forty tokens of several prompts, whose decode steps share batches of every size."""
    prompts = [oracle.prompt_of(length) for length in lengths]
    outputs: list[list[int]] = [[] for _ in prompts]
    tables = [range(at * 20, at * 20 + 20) for at in range(len(prompts))]
    for at, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
        rows = [BatchRow(prompt, 0, table, SampleInput(params, prompt, []))]
        rows += [
            BatchRow(
                outputs[one][-1:],
                len(prompts[one]) + len(outputs[one]) - 1,
                tables[one],
                SampleInput(params, prompts[one], outputs[one]),
            )
            for one in range(at)
        ]
        results = runner.run(rows)
        for one, result in zip([at, *range(at)], results, strict=True):
            assert result is not None
            outputs[one].append(result.token_id)
    for _ in range(40):
        rows = [
            BatchRow(
                output[-1:],
                len(prompt) + len(output) - 1,
                table,
                SampleInput(params, prompt, output),
            )
            for prompt, output, table in zip(prompts, outputs, tables, strict=True)
        ]
        for output, result in zip(outputs, runner.run(rows), strict=True):
            assert result is not None
            output.append(result.token_id)
    return outputs


@pytest.mark.parametrize("drawn", [False, True])
def test_graphs_choose_what_the_torch_runner_chooses(tmp_path: Path, *, drawn: bool) -> None:
    """Sampling is in the graph, and each row has the noise of its own position."""
    oracle.save(oracle.llama, tmp_path)
    params = SamplingParams(
        max_tokens=99,
        temperature=0.8 if drawn else 0.0,
        top_k=40,
        top_p=0.9,
        seed=3,
        ignore_eos=True,
    )
    lengths = (3, 40, 130, 17, 64)
    expected = generate(plain_runner_of(tmp_path), params, lengths)
    assert generate(runner_of(tmp_path), params, lengths) == expected


def test_a_request_waits_for_neither_kernels_nor_graphs(tmp_path: Path) -> None:
    oracle.save(oracle.llama, tmp_path)
    params = SamplingParams(max_tokens=99, temperature=0.0, ignore_eos=True)
    expected = generate(plain_runner_of(tmp_path), params, (9, 30))
    runner = CudaRunner(plain_runner_of(tmp_path), max_rows=MAX_ROWS, capture=True)
    runner.warm_up()
    while not runner.wait_until_ready(0):
        assert generate(runner, params, (9, 30)) == expected
    assert generate(runner, params, (9, 30)) == expected


def test_kv_that_arrives_beside_a_step_is_seen_by_the_next(tmp_path: Path) -> None:
    oracle.save(oracle.llama, tmp_path)
    runner = runner_of(tmp_path)
    prompt = oracle.prompt_of(300)
    want = SampleInput(oracle.GREEDY, prompt, ())
    expected = runner.run([BatchRow(prompt, 0, range(20), want)])
    moved = runner.read_kv(range(20), 0, 299)
    for turn in range(1, 8):
        table = range(20 * turn, 20 * turn + 20)
        # A chunk whose tokens nobody wants is still being computed when the copy starts.
        assert runner.run([BatchRow(prompt, 0, range(200, 220), None)]) == [None]
        runner.write_kv(table, 0, moved)
        again = runner.run([BatchRow(prompt[299:], 299, table, want)])
        assert again[0] is not None
        assert expected[0] is not None
        assert again[0].token_id == expected[0].token_id
