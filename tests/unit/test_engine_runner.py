"""The torch runner as the engine sees it: steps, KV in and out, and what it says about itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from baton.engine.batch import BatchRow, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.memory import free_memory_bytes
from baton.engine.runner import ModelRunner
from baton.errors import ModelLoadError
from baton.kv.checksum import sealed
from tests import oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(oracle.llama, tmp_path_factory.mktemp("runner") / "tiny")


def runner_of(path: Path, **changes: object) -> ModelRunner:
    fields: dict[str, object] = {"kv_pool_tokens": 1024, "threads": 1, **changes}
    return ModelRunner(EngineConfig(model=str(path), **fields))  # type: ignore[arg-type]


def test_info_says_what_is_served(checkpoint: Path) -> None:
    info = runner_of(checkpoint, block_size_tokens=8, max_context_tokens=256).info
    assert info.model == "tiny"
    assert (info.vocab_size, info.max_context_tokens) == (oracle.VOCAB, 256)
    assert info.eos_token_ids == (2,)
    assert (info.block_size_tokens, info.num_blocks, info.device) == (8, 128, "cpu")
    spec = info.spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (3, 2, 16)


def test_a_pool_without_a_size_fits_memory_and_use(checkpoint: Path) -> None:
    info = runner_of(checkpoint, kv_pool_tokens=None, max_running=4, max_context_tokens=100).info
    assert info.num_blocks == 25
    assert 0 < free_memory_bytes("cpu") < 2**50


@pytest.mark.parametrize("kernels", [None, "torch"])
def test_a_pool_that_no_machine_holds_is_refused(checkpoint: Path, kernels: str | None) -> None:
    """Promise: it is an error that names the model, whatever computes."""
    with pytest.raises(ModelLoadError, match="blocks of KV"):
        runner_of(checkpoint, kv_pool_tokens=2**50, kernels=kernels)


@pytest.mark.parametrize("kernels", [None, "torch"])
@pytest.mark.parametrize(
    "changes", [{"max_context_tokens": 1}, {"kv_pool_tokens": 1, "block_size_tokens": 1}]
)
def test_a_context_of_one_token_is_refused(
    checkpoint: Path, changes: dict[str, object], kernels: str | None
) -> None:
    """Nothing could be asked of it, and a warm-up of no tokens reads what is not there."""
    with pytest.raises(ModelLoadError, match="a context of 1"):
        runner_of(checkpoint, kernels=kernels, **changes)


def test_two_runners_of_one_checkpoint_have_one_digest(checkpoint: Path) -> None:
    one = runner_of(checkpoint, block_size_tokens=4)
    other = runner_of(checkpoint, block_size_tokens=64)
    assert one.info.spec.digest == other.info.spec.digest
    half = runner_of(checkpoint, dtype="bfloat16")
    assert half.info.spec.digest != one.info.spec.digest


def test_an_empty_step_and_a_step_without_samples_choose_nothing(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    assert runner.run([]) == []
    assert runner.run([BatchRow((5, 6, 7), 0, (0,), None)]) == [None]


def test_results_belong_to_their_rows_whatever_the_order(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    rows = []
    for index, length in enumerate((40, 1, 3, 90, 17)):
        prompt = oracle.prompt_of(length)
        table = tuple(range(index * 8, index * 8 + 8))
        want = None if length == 3 else SampleInput(oracle.GREEDY, prompt, ())
        rows.append(BatchRow(prompt, 0, table, want))
    alone = [runner.run([row])[0] for row in rows]
    together = runner.run(rows)
    backwards = runner.run(rows[::-1])[::-1]
    chosen = [result and result.token_id for result in alone]
    assert chosen[2] is None
    assert len(set(chosen)) > 2
    assert [result and result.token_id for result in together] == chosen
    assert [result and result.token_id for result in backwards] == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kv_moved_to_another_runner_continues_the_same(checkpoint: Path, dtype: str) -> None:
    source = runner_of(checkpoint, dtype=dtype, kernels="torch", block_size_tokens=4)
    target = runner_of(checkpoint, dtype=dtype, kernels="torch", block_size_tokens=16)
    prompt = oracle.prompt_of(50)
    source_table, target_table = tuple(range(20, 40)), (9, 3, 4, 1, 60)
    want = SampleInput(oracle.GREEDY, prompt, ())
    (first,) = source.run([BatchRow(prompt, 0, source_table, want)])
    assert first is not None
    moved = source.read_kv(source_table, 0, 50)
    moved.data.setflags(write=False)
    for start, end in ((0, 21), (21, 50)):
        piece = source.read_kv(source_table, start, end)
        np.testing.assert_array_equal(piece.data, moved.data[:, :, start:end])
        target.write_kv(target_table, start, piece)
    np.testing.assert_array_equal(target.read_kv(target_table, 0, 50).data, moved.data)
    want = SampleInput(oracle.GREEDY, prompt, (first.token_id,))
    expected = source.run([BatchRow((first.token_id,), 50, source_table, want)])
    assert target.run([BatchRow((first.token_id,), 50, target_table, want)]) == expected


def test_a_neighbours_kv_does_not_leak_into_a_padded_row(checkpoint: Path) -> None:
    """Rows of 17 and 32 tokens share a padded group; what stands beyond the shorter one's end must not count."""
    runner = runner_of(checkpoint)
    short, long = oracle.prompt_of(17), oracle.prompt_of(32)
    tables = {17: (4, 5), 32: (6, 7)}
    rows = [
        BatchRow(p[-1:], len(p) - 1, tables[len(p)], SampleInput(oracle.GREEDY, p, ()))
        for p in (short, long)
    ]
    for garbage in (0.0, 1e4):
        for block in range(8):
            shape = runner.info.spec.wire_shape(16)
            runner.write_kv((block,), 0, sealed(np.full(shape, garbage, np.float32)))
        for prompt in (short, long):
            runner.run([BatchRow(prompt[:-1], 0, tables[len(prompt)], None)])
        result = runner.run(rows)
        if garbage == 0.0:
            clean = result
    assert [r and r.token_id for r in result] == [r and r.token_id for r in clean]
    for given, expected in zip(result, clean, strict=True):
        assert given is not None
        assert expected is not None
        assert given.logprobs is not None
        assert expected.logprobs is not None
        assert given.logprobs.chosen.logprob == pytest.approx(expected.logprobs.chosen.logprob)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="no CUDA device"):
        runner_of(checkpoint, device="cuda")


def test_threads_are_set_where_the_runner_is_built(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        runner_of(checkpoint, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
