"""The native kernels: what they compute is what torch computes, and a row's result depends on the row alone, bit by bit."""

import itertools
import os
import random
import stat
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from baton.engine.batch import BatchRow, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.native.library import NEEDED, Library, Pool, find_library, processor_flags
from baton.engine.runner import ModelRunner
from baton.errors import CorruptKVError, InternalError, ModelLoadError
from baton.kv.checksum import sealed
from baton.kv.spec import SealedKV, WeightFormat
from tests import oracle
from tests.native_program import tiny_model

pytestmark = pytest.mark.skipif(
    not processor_flags() >= NEEDED, reason=f"this processor lacks {NEEDED - processor_flags()}"
)
INT8 = WeightFormat.INT8
FORMATS = [("float32", None), ("bfloat16", None), ("bfloat16", INT8), ("float32", INT8)]
MODELS = {
    "llama": lambda **changes: oracle.llama(head_dim=32, **changes),
    "window": lambda: oracle.mistral(sliding_window=24),
    "qwen3": lambda: oracle.qwen3(tie_word_embeddings=True),
    "wide": lambda: oracle.qwen3(head_dim=80, max_position_embeddings=512),
    "grouped": lambda: oracle.qwen2(
        hidden_size=112, num_attention_heads=7, num_key_value_heads=1, intermediate_size=208
    ),
    "tiled window": lambda: oracle.mistral(head_dim=64, intermediate_size=416, sliding_window=24),
    "tiled wide": lambda: oracle.qwen3(
        hidden_size=224, head_dim=96, intermediate_size=160, max_position_embeddings=512
    ),
    "tiled grouped": lambda: oracle.qwen2(
        hidden_size=224, num_attention_heads=7, num_key_value_heads=1, intermediate_size=2080
    ),
}
"""The tiled ones, and llama, have sizes that are multiples of 32, and are multiplied on a processor's tiles where it has them."""
KERNELS = ("native", "avx512")
TILES = {"amx_tile", "amx_bf16", "amx_int8"} <= processor_flags()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = find_library()
    assert isinstance(found, Library), f"{found}: apt-get install g++ && make clean install"
    folder = tmp_path_factory.mktemp("native")
    return {
        name: oracle.save(lambda build=build: build(max_position_embeddings=2048), folder / name)  # type: ignore[misc]
        if name == "llama"
        else oracle.save(build, folder / name)
        for name, build in MODELS.items()
    }


def runner_of(path: Path, **changes: object) -> ModelRunner:
    fields = {
        "dtype": "float32",
        "kv_pool_tokens": 6144,
        "threads": 1,
        "kernels": "native",
        **changes,
    }
    return ModelRunner(EngineConfig(model=str(path), **fields))  # type: ignore[arg-type]


def row(tokens: Sequence[int], start: int, end: int, first_block: int = 0) -> BatchRow:
    """Tokens [start, end) of a sequence whose blocks stand apart from others'."""
    blocks = [first_block + 2 * i for i in range(-(-len(tokens) // 16))]
    sample = SampleInput(oracle.GREEDY, tokens, [])
    return BatchRow(tokens[start:end], start, blocks, sample)


def logits_of(runner: ModelRunner, rows: Sequence[BatchRow]) -> torch.Tensor:
    with torch.inference_mode():
        return runner.backend.compute(rows).values.clone()


def in_chunks(runner: ModelRunner, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """The last token's logits, the sequence computed chunk by chunk."""
    edges = [0, *cuts, len(tokens)]
    for start, end in itertools.pairwise(edges):
        last = logits_of(runner, [row(tokens, start, end)])
    return last[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_float32_are_those_of_torch(paths: dict[str, Path], name: str) -> None:
    tokens = oracle.prompt_of(130)
    expected = in_chunks(runner_of(paths[name], kernels="torch"), tokens, [64])
    found = in_chunks(runner_of(paths[name]), tokens, [64])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_bfloat16_are_as_near_to_those_in_float32_as_torch_comes(
    paths: dict[str, Path], name: str
) -> None:
    """How near that is, is a matter of the model."""
    tokens = oracle.prompt_of(130)
    exact = in_chunks(runner_of(paths[name], kernels="torch"), tokens, [64])
    errors = {
        kernels: (
            in_chunks(runner_of(paths[name], dtype="bfloat16", kernels=kernels), tokens, [64])
            - exact
        ).norm()
        for kernels in (*KERNELS, "torch")
    }
    assert max(errors.values()) < 1.3 * errors["torch"] < 0.15 * exact.norm()


@pytest.mark.parametrize("name", MODELS)
def test_eight_bit_weights_compute_what_their_definition_says(
    paths: dict[str, Path], name: str
) -> None:
    """The torch path is the definition; the two differ by the rounding of float32 sums, now and then, in a longer prompt, by a step of an
    activation.
    """
    native, definition = (
        runner_of(paths[name], weights=INT8, kernels=kernels) for kernels in ("native", "torch")
    )
    errors = []
    for length in (2, 5, 20, 40, 60):
        tokens = oracle.prompt_of(length)
        expected = in_chunks(definition, tokens, [])
        off = (in_chunks(native, tokens, []) - expected).abs().max()
        errors.append(float(off / expected.abs().max()))
    assert statistics.median(errors) < 1e-5
    assert max(errors) < 0.03


@pytest.mark.parametrize("name", [name for name in MODELS if "tiled" in name or name == "llama"])
def test_eight_bit_weights_compute_the_same_with_tiles_and_without(
    paths: dict[str, Path], name: str
) -> None:
    """Promise: workers on processors with and without tiles say the same tokens in int8 with KV in float32, bit for bit."""
    tokens = oracle.prompt_of(300)
    found, expected = (
        in_chunks(runner_of(paths[name], weights=INT8, kernels=kernels), tokens, [1, 14, 60])
        for kernels in KERNELS
    )
    assert torch.equal(found, expected)


@pytest.mark.skipif(not TILES, reason="this processor has no tiles (AMX)")
def test_tiles_are_used_where_there_are_any(paths: dict[str, Path]) -> None:
    """Their sums of bfloat16 are rounded in another order."""
    tokens = oracle.prompt_of(60)
    found, expected = (
        in_chunks(runner_of(paths["llama"], dtype="bfloat16", kernels=kernels), tokens, [])
        for kernels in KERNELS
    )
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "weights"), FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_result_depends_on_neither_chunks_nor_batch_nor_threads(
    paths: dict[str, Path], name: str, dtype: str, weights: WeightFormat | None, kernels: str
) -> None:
    """Promise: bit for bit, in every format. So a split system says the same tokens as one process, whatever its batches."""
    rng = random.Random(name)
    tokens = oracle.prompt_of(300)
    runner = runner_of(paths[name], dtype=dtype, weights=weights, kernels=kernels)
    expected = in_chunks(runner, tokens, [])
    for cuts in ([299], [1, 3, 6], [16, 32, 255, 256, 257], sorted(rng.sample(range(1, 300), 40))):
        assert torch.equal(in_chunks(runner, tokens, cuts), expected), cuts
    others = [oracle.prompt_of(length) for length in (290, 1, 77, 64, 31)]
    starts = [row(other, 0, len(other), 60 * i + 61) for i, other in enumerate(others)]
    logits_of(runner, [row(tokens, 0, 290), *starts])
    threaded = runner_of(paths[name], dtype=dtype, weights=weights, kernels=kernels, threads=3)
    for computing in (runner, threaded):
        batch = [starts[0], row(tokens, 0, 300), *starts[1:]]
        assert torch.equal(logits_of(computing, batch)[1], expected)
        batch = [*[row(o, len(o) - 1, len(o), 60 * i + 61) for i, o in enumerate(others)]]
        assert torch.equal(logits_of(computing, [*batch, row(tokens, 299, 300)])[-1], expected)


def test_a_long_context_shared_by_threads_is_the_one_that_a_single_thread_computes(
    paths: dict[str, Path],
) -> None:
    tokens = oracle.prompt_of(1500)
    alone = runner_of(paths["llama"], dtype="bfloat16")
    threaded = runner_of(paths["llama"], dtype="bfloat16", threads=4)
    expected = in_chunks(alone, tokens, [512, 1024])
    assert torch.equal(in_chunks(threaded, tokens, [512, 1024]), expected)
    assert torch.equal(in_chunks(threaded, tokens, [512, 1024, 1499]), expected)
    exact = in_chunks(runner_of(paths["llama"], kernels="torch"), tokens, [512, 1024])
    found = in_chunks(runner_of(paths["llama"]), tokens, [512, 1024])
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "wide"])
def test_kv_crosses_to_other_blocks_and_other_kernels(
    paths: dict[str, Path], model: str, dtype: str, block_size: int
) -> None:
    """Promise: the wire knows neither blocks nor their order within; native and torch workers exchange KV."""
    tokens = oracle.prompt_of(300)
    source = runner_of(paths[model], dtype=dtype, threads=2)
    expected = in_chunks(source, tokens, [])
    given = row(tokens, 0, 300).block_table
    whole = source.read_kv(given, 0, 299)
    for kernels in ("native", "torch"):
        target = runner_of(
            paths[model], dtype=dtype, block_size_tokens=block_size, kernels=kernels, threads=2
        )
        table = random.Random(0).sample(range(40), 19)
        for first, last in ((0, 7), (7, 48), (48, 131), (131, 299)):
            part = np.ascontiguousarray(whole.data[:, :, first:last])
            target.write_kv(table, first, sealed(part))
        again = target.read_kv(table, 0, 299)
        assert np.array_equal(again.data, whole.data)
        assert again.checksum == whole.checksum
        found = logits_of(target, [BatchRow(tokens[299:], 299, table, row(tokens, 0, 1).sample)])[0]
        if kernels == "native":
            assert torch.equal(found, expected)
        else:
            assert (found - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "weights"), FORMATS)
@pytest.mark.parametrize("name", ["llama", "window", "wide", "tiled window"])
def test_what_is_no_number_in_a_block_does_not_reach_its_next_owner(
    paths: dict[str, Path], name: str, dtype: str, weights: WeightFormat | None, kernels: str
) -> None:
    """Promise: a request that overflows spoils no other, whether that one computes its KV there or receives it."""
    tokens = oracle.prompt_of(75)
    settings = {"dtype": dtype, "weights": weights, "kernels": kernels}
    clean, spoilt, receiving = (runner_of(paths[name], **settings) for _ in range(3))
    spec = clean.info.spec
    nothing = np.full(spec.wire_shape(clean.info.num_blocks * 16), np.nan, np.float32)
    if spec.dtype.wire_dtype != np.float32:
        # The upper half of a NaN is one in bfloat16.
        nothing = (nothing.view(np.uint32) >> 16).astype(np.uint16)
    for runner in (spoilt, receiving):
        runner.write_kv(range(runner.info.num_blocks), 0, sealed(nothing))
    expected = in_chunks(clean, tokens, [37, 74])
    assert expected.isfinite().all()
    assert torch.equal(in_chunks(spoilt, tokens, [37, 74]), expected)
    blocks = row(tokens, 0, 1).block_table
    for first, last in ((0, 37), (37, 74)):
        receiving.write_kv(blocks, first, clean.read_kv(blocks, first, last))
    assert torch.equal(logits_of(receiving, [row(tokens, 74, 75)])[0], expected)


def test_corrupt_kv_is_refused_and_leaves_nothing(paths: dict[str, Path]) -> None:
    runner = runner_of(paths["llama"])
    logits_of(runner, [row(oracle.prompt_of(40), 0, 40)])
    table = row(oracle.prompt_of(40), 0, 40).block_table
    whole = runner.read_kv(table, 0, 40)
    broken = whole.data.copy()
    broken.view(np.uint8).reshape(-1)[77] ^= 4
    with pytest.raises(CorruptKVError):
        runner.write_kv(table, 0, SealedKV(broken, whole.checksum))
    assert not runner.read_kv(table, 0, 40).data.any()


@pytest.mark.parametrize("place", [0, 5, 15])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_eight_bit_activations_hide_no_number_that_is_none(
    paths: dict[str, Path], bad: float, place: int
) -> None:
    """Promise: what is computed from a value that is not finite is an error of its request, in every format, not a token."""
    runner = runner_of(paths["llama"], weights=INT8)
    tokens = oracle.prompt_of(40)
    logits_of(runner, [row(tokens, 0, 40)])
    table = row(tokens, 0, 40).block_table
    values = runner.read_kv(table, 0, 39).data.copy()
    values[1, 0, 7, 0, place] = bad
    runner.write_kv(table, 0, sealed(values))
    with pytest.raises(InternalError):
        runner.run([row(tokens, 39, 40)])


def test_wire_buffers_in_pieces_are_not_read_beyond_their_ends(paths: dict[str, Path]) -> None:
    """The kernels know an address and a number of tokens, no strides."""
    runner = runner_of(paths["llama"])
    whole = runner.read_kv([0, 1], 0, 32)
    apart = whole.data[:, :, ::2]
    with pytest.raises(AssertionError, match="one piece"):
        runner.write_kv([0], 0, SealedKV(apart, whole.checksum))


def test_tokens_that_no_block_holds_never_reach_the_kernels(paths: dict[str, Path]) -> None:
    """They know addresses, and would read and write whatever stands behind."""
    runner = runner_of(paths["llama"])
    for tokens, start in (([], 3), ([5] * 20, 0), ([5], 16)):
        with pytest.raises(AssertionError):
            logits_of(runner, [BatchRow(tokens, start, [0], None)])
    for first, last in ((0, 17), (16, 17), (3, 3), (-1, 4)):
        with pytest.raises(AssertionError):
            runner.read_kv([0], first, last)
    kv = runner.read_kv([0], 0, 2)
    with pytest.raises(AssertionError):
        runner.write_kv([0], 15, kv)


def test_engines_that_compute_at_once_share_the_cores_and_disturb_nobody(
    paths: dict[str, Path],
) -> None:
    """Promise: more threads than cores change no result and hang nobody."""
    tokens = oracle.prompt_of(200)
    runners = [runner_of(paths["llama"], dtype="bfloat16", threads=3) for _ in range(3)]
    expected = in_chunks(runners[0], tokens, [])
    wrong: list[int] = []

    def compute(runner: ModelRunner) -> None:
        found = [in_chunks(runner, tokens, [turn + 1, 150]) for turn in range(6)]
        wrong.extend(turn for turn in range(6) if not torch.equal(found[turn], expected))

    threads = [threading.Thread(target=compute, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
        assert not thread.is_alive()
    assert not wrong


def test_what_the_system_refuses_is_an_error_and_the_engine_goes_on() -> None:
    """Promise: neither memory nor threads that are used up end the process."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.native_program"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    step, again, engine = ended.stdout.splitlines()
    assert step.startswith("a step of 4000000 tokens: ")
    assert again == "same"
    assert engine.startswith("no engine of 64 threads: ")


def test_only_a_file_of_ones_own_is_shared_with_other_engines(tmp_path: Path) -> None:
    """Promise: a user who may cut the file in which engines meet, and so end whoever reads it, finds no engine there. The page that is
    shared has its room on the file system from the start.
    """
    library = find_library()
    assert isinstance(library, Library)
    model, _alive = tiny_model(library)
    pool = np.zeros(4096, np.uint8)
    paths = [tmp_path / name for name in ("own", "others", "link", "pipe")]
    own, others, link, pipe = paths
    others.touch()
    others.chmod(0o666)
    link.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(pipe)
    for path in paths:
        engine = library.engine(model, Pool(pool.ctypes.data, 1, 16), 2, str(path), tiles=True)
        library.free_engine(engine)
    assert own.stat().st_blocks * 512 >= 4096
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert others.stat().st_size == 0
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size_tokens": 8}, "block size 8"),
        ({"dtype": "float16"}, "float16"),
        ({"weights": WeightFormat.BFLOAT16}, "bfloat16"),
        ({"kernels": "magic"}, "native, avx512, torch"),
    ],
)
def test_what_they_cannot_compute_is_said(
    paths: dict[str, Path], changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        runner_of(paths["llama"], **changes)


def test_a_processor_without_the_instructions_is_known(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2\n")
    assert processor_flags(cpuinfo) == {"fpu", "sse2", "avx2"}
    assert not processor_flags(tmp_path / "none")
