"""The CUDA runner whole, on tiny models; its kernels in Triton's interpreter where there is no CUDA device."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda_rig import DEVICE  # isort: skip - first: it chooses the interpreter

from baton.engine import build
from baton.engine.batch import BatchRow, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.cuda.runner import CudaRunner, supports
from baton.engine.runner import ModelRunner
from baton.engine.torch_backend import TorchBackend
from baton.errors import InternalError
from tests import oracle

GREEDY = replace(oracle.GREEDY, logprobs=None)
READY_S = 50.0
MODELS = {
    "windows, norms of heads, rotation": lambda: oracle.qwen3(
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "learned positions": lambda: oracle.gpt2(n_layer=1),
}


def runners_of(path: Path) -> tuple[ModelRunner, CudaRunner]:
    """On one pool: what the one computes, the other goes on from."""
    config = EngineConfig(
        model=str(path),
        kv_pool_tokens=1024,
        threads=1,
        dtype="float32",
        device=DEVICE.type,
        kernels="torch",
    )
    plain = ModelRunner(config)
    fast = CudaRunner(plain, max_rows=2, capture=True)
    fast.warm_up()
    assert fast.wait_until_ready(READY_S)
    return plain, fast


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_torch_runner_whatever_shares_the_step(
    tmp_path: Path, name: str
) -> None:
    plain, fast = runners_of(oracle.save(MODELS[name], tmp_path))
    assert supports(plain.info.spec)
    prompts = [oracle.prompt_of(length) for length in (21, 9, 5)]
    first = [range(at * 4, at * 4 + 4) for at in (1, 5, 9)]
    last: list[BatchRow] = []
    wants = [SampleInput(GREEDY, prompt, ()) for prompt in prompts]
    # The torch runner's pool is read by both.
    expected = [
        plain.run([BatchRow(prompt, 0, table, want)])[0]
        for prompt, table, want in zip(prompts, first, wants, strict=True)
    ]
    begun = [fast.run([BatchRow(prompts[0][:12], 0, first[0], None)])[0]]
    assert begun == [None]
    rows = [
        BatchRow(prompts[0][12:], 12, first[0], wants[0]),
        BatchRow(prompts[1], 0, first[1], None),
        BatchRow(prompts[2], 0, first[2], wants[2]),
    ]
    results = fast.run(rows)
    assert [results[0], results[1], results[2]] == [expected[0], None, expected[2]]
    drawn = replace(GREEDY, temperature=0.8, top_k=30, top_p=0.9, seed=5)
    reported = replace(GREEDY, logprobs=1)
    for at, params in ((0, drawn), (1, GREEDY), (2, reported)):
        want = SampleInput(params, prompts[at], [9])
        last.append(BatchRow([9], len(prompts[at]), first[at], want))
    # More rows than a step takes, beside a chunk.
    chunk = BatchRow(prompts[0][:9], 0, range(40, 44), wants[1])
    together = fast.run([*last, chunk])
    for row, result in zip([*last, chunk], together, strict=True):
        alone = plain.run([row])[0]
        assert alone is not None
        assert result is not None
        assert result.token_id == alone.token_id
        assert (result.logprobs is None) == (alone.logprobs is None)


def test_a_row_that_breaks_fails_alone_and_kv_moves_through_the_staging(tmp_path: Path) -> None:
    plain, fast = runners_of(oracle.save(lambda: oracle.llama(num_hidden_layers=1), tmp_path))
    prompt = oracle.prompt_of(20)
    want = SampleInput(GREEDY, prompt, ())
    fast.run([BatchRow(prompt, 0, range(2), want)])
    kv = fast.read_kv(range(2), 0, 20)
    fast.write_kv(range(8, 10), 0, kv)
    row = BatchRow([4], 20, range(8, 10), want)
    assert fast.run([row]) == plain.run([row])
    assert isinstance(plain.backend, TorchBackend)
    norm = plain.backend.decoder.norm
    with torch.inference_mode():
        norm.weight.fill_(float("nan"))
    with pytest.raises(InternalError, match="batch rows \\[1\\]"):
        fast.run([BatchRow([4], 20, range(8, 10), None), row])


@pytest.mark.parametrize("lacking", ["Triton is not installed", "head size 512"])
def test_the_log_says_why_torch_computes_on_a_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lacking: str,
) -> None:
    model = oracle.save(lambda: oracle.llama(num_hidden_layers=1, head_dim=512), tmp_path)
    plain = ModelRunner(EngineConfig(model=str(model), kv_pool_tokens=64, threads=1))
    if "Triton" in lacking:
        monkeypatch.setattr(build, "find_spec", lambda _: None)
    with caplog.at_level(logging.INFO):
        assert build._on_cuda(plain, EngineConfig(model="m", device="cuda")) is plain
    assert f"torch computes; the CUDA kernels can't be used: {lacking}" in caplog.messages


def test_the_kernels_compile_for_a_device_that_is_not_here() -> None:
    """For the shapes of an 8B model in bfloat16, to machine code, with what they take of a multiprocessor within what it has. The
    interpreter knows no types and no limits.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_compile"],
        check=False,
        capture_output=True,
        text=True,
        timeout=55,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
