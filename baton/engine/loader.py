"""Finds a checkpoint, checks it against the model's config before any weight is read, and loads it.

Headers come first: a truncated file, a missing tensor or a wrong shape is named at once, not after a minute of loading. Every fault is
a `ModelLoadError` that names the file. Called by the engine thread, while the runner is built.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.engine.config import ModelConfig
from baton.engine.fields import Fields, read_fields
from baton.engine.progress import Progress
from baton.engine.weights import TensorSource, expected_shapes, tensor_prefix
from baton.errors import ModelLoadError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER_BYTES = 100_000_000
MAPPED_BYTES = 128 * 1024 * 1024
"""How much of a checkpoint's files stays in memory while they are read, or the largest tensor."""
BuiltT = TypeVar("BuiltT")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor stands."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory whose safetensors headers have been read and found sound."""

    directory: Path
    tensors: Mapping[str, StoredTensor]


def find_checkpoint(model: str) -> Path:
    """The directory of a model: itself, or a snapshot of the hub's repository, downloaded where it is not cached."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or model.startswith((".", "~")):
        raise ModelLoadError(model, "is not a directory")
    try:
        snapshot = huggingface_hub.snapshot_download(
            model, allow_patterns=["*.json", "model*.safetensors", "*.jinja"]
        )
    except HFValidationError as error:
        raise ModelLoadError(model, f"is neither a directory nor a hub id: {error}") from error
    except OSError as error:
        raise ModelLoadError(
            model, f"is no directory, and the hub has not given it: {error}"
        ) from error
    return Path(snapshot)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the headers of all weight files."""
    if (directory / _INDEX).exists():
        return Checkpoint(directory, _open_sharded(directory))
    if not (directory / _SINGLE).exists():
        raise ModelLoadError(str(directory), f"holds neither {_SINGLE} nor {_INDEX}")
    return Checkpoint(directory, _read_header(directory / _SINGLE))


def _open_sharded(directory: Path) -> dict[str, StoredTensor]:
    index = read_fields(directory / _INDEX)
    placed = index.nested("weight_map").values
    files: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise index.fail(f"weight_map.{name}", f"must be a file name, not {file!r}")
        if file not in files:
            files[file] = _read_header(directory / file)
        if name not in files[file]:
            raise ModelLoadError(str(directory / file), f"tensor {name} is missing")
        tensors[name] = files[file][name]
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelLoadError(
                    str(path), f"is truncated or no safetensors file ({size} bytes)"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelLoadError(str(path), "file is missing") from None
    except OSError as error:
        raise ModelLoadError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(str(path), f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelLoadError(str(path), "its header is no JSON object")
    entries = Fields(str(path), {n: e for n, e in header.items() if n != "__metadata__"})
    tensors = {name: _parse_entry(path, entries.nested(name)) for name in entries.values}
    end = 8 + length + sum(tensor.num_bytes for tensor in tensors.values())
    if size != end:
        raise ModelLoadError(
            str(path), f"is truncated or corrupt: {size} bytes, its header says {end}"
        )
    return tensors


def _parse_entry(path: Path, entry: Fields) -> StoredTensor:
    shape, span = entry.values.get("shape"), entry.values.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise entry.fail("shape and data_offsets", "are corrupt")
    return StoredTensor(path, entry.text("dtype"), tuple(shape), span[1] - span[0])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    build: Callable[[TensorSource, str], BuiltT],
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> BuiltT:
    """Checks names, dtypes and shapes, then has `build` take tensor by tensor, with a report after each; it is given their source, and
    what their names begin with.
    """
    prefix = tensor_prefix(config, checkpoint.tensors)
    wanted = expected_shapes(config, prefix)
    for name, shape in wanted.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise ModelLoadError(str(checkpoint.directory), f"tensor {name} is missing")
        if stored.shape != shape:
            raise ModelLoadError(
                str(stored.file), f"tensor {name} has shape {stored.shape}; the config says {shape}"
            )
        if stored.dtype not in _DTYPES:
            raise ModelLoadError(
                str(stored.file), f"tensor {name} has dtype {stored.dtype}, which is not supported"
            )
        if stored.num_bytes != math.prod(shape) * _DTYPES[stored.dtype].itemsize:
            raise ModelLoadError(
                str(stored.file), f"tensor {name} is {stored.num_bytes} bytes long"
            )
    total = sum(checkpoint.tensors[name].num_bytes for name in wanted)
    loaded = 0

    def tensor(name: str, dtype: torch.dtype | None) -> Tensor:
        nonlocal loaded
        stored = checkpoint.tensors[name]
        value = files.read(stored, name)
        # The sum is finite only where every element is, and takes one pass.
        if not value.sum(dtype=torch.float32).isfinite():
            raise ModelLoadError(
                str(stored.file), f"tensor {name} holds values that are not finite"
            )
        loaded += stored.num_bytes
        if progress is not None:
            progress(loaded, total)
        # Always a copy: the file may change or go once the model is loaded.
        return value.to(device=device, dtype=dtype, copy=True)

    with ExitStack() as stack:
        files = _OpenFiles(stack)
        return build(tensor, prefix)


class _OpenFiles:
    """A checkpoint's files, kept open, since to open one costs as much as its header is long; but what was read of them stays in memory
    until they are closed, so that happens from time to time.
    """

    def __init__(self, stack: ExitStack) -> None:
        """They are closed with the stack."""
        self._stack = stack
        self._files: dict[Path, safe_open] = {}
        self._mapped_bytes = 0

    def read(self, stored: StoredTensor, name: str) -> Tensor:
        """Raises `ModelLoadError`."""
        if self._mapped_bytes + stored.num_bytes > MAPPED_BYTES:
            self._files.clear()
            self._stack.close()
            self._mapped_bytes = 0
        self._mapped_bytes += stored.num_bytes
        path = stored.file
        try:
            if path not in self._files:
                opened = safe_open(path, framework="pt", device="cpu")
                self._files[path] = self._stack.enter_context(opened)
            value: Tensor = self._files[path].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(str(path), f"cannot be read: {error}") from error
        return value


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names the weights: a digest of the config, and of each file's size, header and evenly sampled bytes."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    for path in (checkpoint.directory / "config.json", *files):
        with _named_errors(path), path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            for offset, length in _samples(size, int.from_bytes(file.read(8), "little")):
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()


def _samples(size: int, header_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans (offset, length) of a file: all of a small one; else its header, and 256 pages spread over the rest."""
    page, pages = 4096, 256
    if size <= 2 * page * pages:
        yield 0, size
        return
    first = 8 + header_bytes
    yield 0, first
    for i in range(pages):
        yield first + (size - page - first) * i // (pages - 1), page


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelLoadError(str(path), f"cannot be read: {error.strerror}") from error
