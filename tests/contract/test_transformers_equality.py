"""The gate: greedy tokens equal those of `transformers` in float32, for every architecture, however a batch is cut."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from baton.engine.config import EngineConfig
from baton.engine.runner import ModelRunner
from tests import oracle

NEW_TOKENS = 64
LENGTHS = (1, 5, 16, 33, 64, 130)

Checkpoint = Callable[[str], oracle.Oracle]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint by name, made once."""
    made: dict[str, oracle.Oracle] = {}

    def get(name: str) -> oracle.Oracle:
        if name not in made:
            path = tmp_path_factory.mktemp("checkpoints") / name
            made[name] = oracle.Oracle(oracle.save(oracle.ARCHITECTURES[name], path))
        return made[name]

    return get


def runner_of(path: Path, **changes: object) -> ModelRunner:
    fields = {"dtype": "float32", "kv_pool_tokens": 4096, "threads": 1, **changes}
    return ModelRunner(EngineConfig(model=str(path), **fields))  # type: ignore[arg-type]


def check(
    runner: ModelRunner, reference: oracle.Oracle, lengths: tuple[int, ...], chunk: int
) -> None:
    prompts = [oracle.prompt_of(length) for length in lengths]
    expected = [reference.generate(prompt, NEW_TOKENS) for prompt in prompts]
    requests = oracle.drive(runner, prompts, NEW_TOKENS, chunk=chunk)
    assert [request.output for request in requests] == expected


@pytest.mark.parametrize("kernels", ["torch", None])
@pytest.mark.parametrize("name", oracle.ARCHITECTURES)
def test_every_architecture_generates_the_tokens_of_transformers(
    checkpoint: Checkpoint, name: str, kernels: str | None
) -> None:
    """By torch, and by what is quickest for the architecture on this machine."""
    reference = checkpoint(name)
    check(runner_of(reference.path, kernels=kernels), reference, (3, 40), chunk=24)


@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("chunk", [8, 64, 512])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_tokens_depend_on_neither_block_size_nor_chunk_size_nor_batch(
    checkpoint: Checkpoint, name: str, chunk: int, block_size: int
) -> None:
    reference = checkpoint(name)
    runner = runner_of(reference.path, block_size_tokens=block_size)
    check(runner, reference, LENGTHS, chunk)


def test_dtype_is_the_checkpoints_unless_told_otherwise(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama").path
    assert runner_of(path, dtype=None).info.spec.dtype.value == "float32"
    assert runner_of(path, dtype="bfloat16").info.spec.dtype.value == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_half_precision_gives_the_probabilities_of_float32_within_its_rounding(
    checkpoint: Checkpoint, name: str, dtype: str
) -> None:
    reference = checkpoint(name)
    prompts = [oracle.prompt_of(length) for length in (7, 40)]
    runner = runner_of(reference.path, dtype=dtype)
    for request in oracle.drive(runner, prompts, 8, chunk=16):
        for index, given in enumerate(request.logprobs):
            exact = reference.logprobs(request.prompt + request.output[:index])
            assert given.chosen.logprob == pytest.approx(
                exact[given.chosen.token_id].item(), abs=0.6 if dtype == "bfloat16" else 0.1
            )


def test_logprobs_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    reference = checkpoint("llama")
    runner = runner_of(reference.path)
    (request,) = oracle.drive(runner, [oracle.prompt_of(9)], 12, chunk=64)
    for index, given in enumerate(request.logprobs):
        exact = reference.logprobs(request.prompt + request.output[:index])
        assert given.chosen.token_id == exact.argmax().item()
        best = exact.topk(2)
        assert [top.token_id for top in given.top] == best.indices.tolist()
        assert [top.logprob for top in given.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_sharded_checkpoint_gives_the_same_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = checkpoint("llama")
    sharded = oracle.save(oracle.ARCHITECTURES["llama"], tmp_path, shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check(runner_of(sharded), whole, (12,), chunk=64)


def test_a_gpt2_checkpoint_without_a_prefix_gives_the_same_tokens(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reference = checkpoint("gpt2")
    tensors = load_file(reference.path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert set(bare).isdisjoint(tensors)
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((reference.path / "config.json").read_bytes())
    check(runner_of(tmp_path), reference, (12,), chunk=64)


def test_longrope_serves_its_long_frequencies_where_the_context_is_long(tmp_path: Path) -> None:
    reference = oracle.Oracle(oracle.save(oracle.longrope_long, tmp_path))
    check(runner_of(tmp_path), reference, (40, 100), chunk=64)


def test_dynamic_rope_stretches_for_the_context_that_is_served(tmp_path: Path) -> None:
    """A prompt of the whole context length makes `transformers` use the frequencies that the engine uses throughout."""
    path = oracle.save(
        lambda: oracle.llama(
            max_position_embeddings=32,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        ),
        tmp_path,
    )
    reference, prompt = oracle.Oracle(path), oracle.prompt_of(100)
    runner = runner_of(path, max_context_tokens=100)
    (request,) = oracle.drive(runner, [prompt], 1, chunk=30)
    exact = reference.logprobs(prompt)
    assert request.logprobs[0].chosen.logprob == pytest.approx(exact.max().item(), abs=1e-4)
    assert request.output == [exact.argmax().item()]


def test_old_and_new_spellings_of_a_config_load_the_same_model(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reference = checkpoint("rope-llama3")
    for file in reference.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(runner_of(tmp_path), reference, (12,), chunk=64)
