"""Checkpoints that are sound, and all the ways in which they are not: each is a `ModelLoadError` with file and reason."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.engine import loader
from baton.engine.config import EngineConfig, load_model_config
from baton.engine.loader import (
    Checkpoint,
    find_checkpoint,
    fingerprint,
    load_weights,
    open_checkpoint,
)
from baton.engine.progress import Progress
from baton.engine.runner import ModelRunner
from baton.engine.weights import Matrices, build_decoder
from baton.errors import ModelLoadError
from baton.kv.spec import WeightFormat
from tests import oracle

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Header = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(oracle.llama, tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(oracle.llama, tmp_path_factory.mktemp("sharded"), shard_size="100KB")


def copy_of(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def load(path: Path, **changes: object) -> ModelRunner:
    config = EngineConfig(model=str(path), kv_pool_tokens=64, threads=1, **changes)  # type: ignore[arg-type]
    return ModelRunner(config)


def refused(path: Path, **changes: object) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **changes)
    return caught.value


def rewrite_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)


def rewrite_header(path: Path, change: Callable[[Header], object]) -> None:
    content = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    write_header(path, json.dumps(header).encode(), content[8 + length :])


@pytest.mark.parametrize("kept", [0, 7, 40, 100_000, -1])
def test_a_truncated_file_is_refused(sound: Path, tmp_path: Path, kept: int) -> None:
    path = copy_of(sound, tmp_path)
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:kept])
    error = refused(path)
    assert error.path == str(path / WEIGHTS)
    assert "truncated" in error.message


def test_a_file_with_bytes_behind_its_end_is_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"\0")
    assert "truncated or corrupt" in refused(path).message


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{]", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b"\xff\xfe\xff\xfe", "its header is not JSON"),
        (b"[]", "its header is no JSON object"),
        (b'{"model.norm": 3}', "model.norm must be an object"),
    ],
)
def test_a_corrupt_header_is_refused(
    sound: Path, tmp_path: Path, header: bytes, reason: str
) -> None:
    path = copy_of(sound, tmp_path)
    write_header(path, header)
    error = refused(path)
    assert error.path == str(path / WEIGHTS)
    assert reason in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", None),
        ("shape", [-64]),
        ("data_offsets", [0]),
        ("data_offsets", [256, 0]),
        ("data_offsets", "all"),
    ],
)
def test_a_corrupt_header_entry_is_refused(
    sound: Path, tmp_path: Path, field: str, value: object
) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_header(path, lambda header: header["model.norm.weight"].update({field: value}))
    assert "model.norm.weight.shape and data_offsets are corrupt" in refused(path).message


def test_a_tensor_whose_bytes_do_not_fill_its_shape_is_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)

    def shift(header: Header) -> None:
        # What one tensor's span gains, its neighbour's loses: the file's length still adds up.
        norm = header["model.norm.weight"]["data_offsets"]
        header.pop("__metadata__", None)
        spans = [entry["data_offsets"] for entry in header.values()]
        neighbour = next(span for span in spans if span[1] == norm[0])
        neighbour[1] -= 4
        norm[0] -= 4

    rewrite_header(path, shift)
    assert "bytes long" in refused(path).message


def test_an_unsupported_tensor_dtype_is_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.int8)}))
    assert "dtype I8, which is not supported" in refused(path).message


def test_a_missing_tensor_is_named(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t.__delitem__("model.layers.1.mlp.up_proj.weight"))
    error = refused(path)
    assert error.path == str(path)
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in error.message


def test_an_untied_model_without_a_head_is_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t.__delitem__("lm_head.weight"))
    assert "tensor lm_head.weight is missing" in refused(path).message


def test_a_wrong_shape_is_named_with_what_the_config_says(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    error = refused(path)
    assert error.path == str(path / WEIGHTS)
    assert "model.norm.weight has shape (65,); the config says (64,)" in error.message


def test_weights_that_are_not_finite_are_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t["lm_head.weight"][3, 5].fill_(float("nan")))
    assert "tensor lm_head.weight holds values that are not finite" in refused(path).message


def test_tensors_that_the_model_does_not_use_are_ignored(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    rewrite_tensors(path, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    assert load(path).info.vocab_size == oracle.VOCAB


def test_a_directory_without_weights_is_refused(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    error = refused(path)
    assert error.path == str(path)
    assert f"holds neither {WEIGHTS} nor {INDEX}" in error.message


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    path = copy_of(sharded, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    error = refused(path)
    assert error.path == str(shard)
    assert "file is missing" in error.message


def test_a_truncated_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    path = copy_of(sharded, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(path).path == str(shard)


def test_an_index_that_points_to_the_wrong_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = copy_of(sharded, tmp_path)
    index = json.loads((path / INDEX).read_text())
    first, second = sorted(path.glob("*.safetensors"))[:2]
    moved = next(n for n, file in index["weight_map"].items() if file == first.name)
    index["weight_map"][moved] = second.name
    (path / INDEX).write_text(json.dumps(index))
    error = refused(path)
    assert error.path == str(second)
    assert f"tensor {moved} is missing" in error.message


@pytest.mark.parametrize("file", [3, "../model.safetensors", "/etc/passwd"])
def test_an_index_that_names_no_file_of_the_checkpoint_is_refused(
    sharded: Path, tmp_path: Path, file: object
) -> None:
    path = copy_of(sharded, tmp_path)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (path / INDEX).write_text(json.dumps(index))
    assert "weight_map.model.norm.weight must be a file name" in refused(path).message


def load_decoder(path: Path, progress: Progress) -> Checkpoint:
    config, checkpoint = load_model_config(path), open_checkpoint(path)
    matrices = Matrices(WeightFormat.FLOAT32, torch.float32)
    load_weights(
        checkpoint,
        config,
        lambda tensor, prefix: build_decoder(
            config, tensor, matrices, prefix=prefix, context_tokens=64
        ),
        device=torch.device("cpu"),
        progress=progress,
    )
    return checkpoint


def test_loading_reports_every_byte(sharded: Path) -> None:
    reports = list[tuple[int, int]]()
    checkpoint = load_decoder(sharded, lambda loaded, total: reports.append((loaded, total)))
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    assert {report[1] for report in reports} == {total}
    assert reports[-1] == (total, total)
    assert reports == sorted(reports)
    assert len(reports) == len(checkpoint.tensors)


def resident_bytes(path: Path) -> int:
    """Of a mapped file, what this process holds in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    mapped = [
        next(each for each in lines if each.startswith("Rss"))
        for line in lines
        if line.endswith(str(path))
    ]
    return sum(int(line.split()[1]) * 1024 for line in mapped)


def test_what_was_read_of_a_checkpoint_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker holds its weights once: not as pages of their file, too."""
    megabyte = 1 << 20
    monkeypatch.setattr(loader, "MAPPED_BYTES", 2 * megabyte)
    large = partial(oracle.llama, hidden_size=256, intermediate_size=1024)
    path = oracle.save(large, tmp_path / "large") / WEIGHTS
    assert path.stat().st_size > 6 * megabyte
    held = list[int]()
    load_decoder(path.parent, lambda _loaded, _total: held.append(resident_bytes(path)))
    assert megabyte <= max(held) <= 3 * megabyte, "with what the system reads ahead"


def test_a_fingerprint_is_the_same_for_a_copy_and_differs_where_a_weight_does(
    sound: Path, tmp_path: Path
) -> None:
    path = copy_of(sound, tmp_path)
    original = fingerprint(open_checkpoint(sound))
    assert fingerprint(open_checkpoint(path)) == original
    rewrite_tensors(path, lambda t: t["model.norm.weight"][0].add_(1))
    assert fingerprint(open_checkpoint(path)) != original


def test_a_fingerprint_of_a_large_file_covers_header_start_and_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weight = torch.zeros(2_000_000)
    digests = set()
    for changed in (None, 0, -1):
        value = weight.clone()
        if changed is not None:
            value[changed] = 1.0
        save_file({"w": value}, tmp_path / WEIGHTS)
        digests.add(fingerprint(open_checkpoint(tmp_path)))
    save_file({"v": weight}, tmp_path / WEIGHTS)
    digests.add(fingerprint(open_checkpoint(tmp_path)))
    assert len(digests) == 4


def test_a_fingerprint_differs_where_the_config_does(sound: Path, tmp_path: Path) -> None:
    path = copy_of(sound, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert fingerprint(open_checkpoint(path)) != fingerprint(open_checkpoint(sound))


@pytest.mark.parametrize("model", ["/no/such/place", "./nowhere", "~nobody/model"])
def test_a_path_that_is_no_directory_is_refused_and_not_looked_up_on_the_hub(model: str) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory"):
        find_checkpoint(model)


def test_a_name_that_can_be_no_hub_id_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="neither a directory nor a hub id"):
        find_checkpoint("three/part/name")


def test_a_hub_id_that_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="the hub has not given it"):
        find_checkpoint("someone/some-model")


def test_a_hub_id_loads_from_its_cached_snapshot(
    sound: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = tmp_path / "models--someone--some-model"
    shutil.copytree(sound, repository / "snapshots" / "0123456789abcdef")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    info = load(Path("someone/some-model")).info
    assert info.model == "someone/some-model"
    assert info.spec.digest == load(sound).info.spec.digest
