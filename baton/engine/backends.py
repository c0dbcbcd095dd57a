"""Chooses what computes a model, and loads the model for it."""

import logging
from collections.abc import Callable

import torch

from baton.engine.backend import Backend
from baton.engine.config import EngineConfig, ModelConfig
from baton.engine.loader import Checkpoint, load_weights
from baton.engine.native.backend import NativeBackend
from baton.engine.native.library import Format, Library, find_library
from baton.engine.native.weights import WeightPacker, unsupported
from baton.engine.progress import Progress
from baton.engine.torch_backend import TorchBackend
from baton.engine.weights import Matrices, build_decoder
from baton.errors import ModelLoadError
from baton.kv.pool import TORCH_DTYPES
from baton.kv.spec import KVDtype, KVSpec, WeightFormat

_log = logging.getLogger(__name__)
WithPool = Callable[[KVSpec, int], Backend]
"""Given the KV's spec and a number of blocks, the backend."""
_KV_FORMATS = {KVDtype.FLOAT32: Format.FLOAT32, KVDtype.BFLOAT16: Format.BFLOAT16}
_FORMATS = {
    WeightFormat.FLOAT32: Format.FLOAT32,
    WeightFormat.BFLOAT16: Format.BFLOAT16,
    WeightFormat.INT8: Format.INT8,
}


def load_model(
    config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint, progress: Progress | None
) -> WithPool:
    """Loads the weights; how many blocks memory has room for shows only afterwards. `config` is resolved. Raises `ModelLoadError`."""
    if config.kernels != "torch":
        usable = _usable(config, model)
        if isinstance(usable, Library):
            return _load_native(usable, config, model, checkpoint, progress)
        if config.kernels is not None:
            raise ModelLoadError(config.model, f"the native kernels can't be used: {usable}")
        if config.device == "cpu":
            _log.info("torch computes; the native kernels can't be used: %s", usable)
    return _load_torch(config, model, checkpoint, progress)


def _usable(config: EngineConfig, model: ModelConfig) -> Library | str:
    """The native kernels, or why they can't be used."""
    if config.device != "cpu":
        return f"device {config.device}"
    if KVDtype(config.dtype) not in _KV_FORMATS:
        return f"dtype {config.dtype}"
    assert config.weights is not None
    if config.weights not in {WeightFormat.INT8, WeightFormat(config.dtype)}:
        return f"{config.weights.value} weights beside {config.dtype}"
    return unsupported(model, config.block_size_tokens) or find_library()


def _load_native(
    library: Library,
    config: EngineConfig,
    model: ModelConfig,
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> WithPool:
    context_tokens = config.max_context_tokens
    assert context_tokens is not None
    assert config.weights is not None
    form, kv = _FORMATS[config.weights], _KV_FORMATS[KVDtype(config.dtype)]
    weights = load_weights(
        checkpoint,
        model,
        lambda tensor, prefix: WeightPacker(library, model, form, tensor).build(
            prefix=prefix, context_tokens=context_tokens, kv=kv
        ),
        device=torch.device("cpu"),
        progress=progress,
    )
    threads = config.most_threads or config.threads or torch.get_num_threads()
    # What is left to torch is sampling; its threads would spin on the kernels' cores after each call.
    torch.set_num_threads(1)
    return lambda spec, num_blocks: NativeBackend(
        library,
        weights,
        spec,
        num_blocks=num_blocks,
        block_size_tokens=config.block_size_tokens,
        threads=threads,
        tiles=config.kernels != "avx512",
    )


def _load_torch(
    config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint, progress: Progress | None
) -> WithPool:
    context_tokens, device = config.max_context_tokens, torch.device(config.device)
    assert context_tokens is not None
    assert config.weights is not None
    matrices = Matrices(config.weights, TORCH_DTYPES[KVDtype(config.dtype)])
    decoder = load_weights(
        checkpoint,
        model,
        lambda tensor, prefix: build_decoder(
            model, tensor, matrices, prefix=prefix, context_tokens=context_tokens
        ),
        device=device,
        progress=progress,
    )
    return lambda spec, num_blocks: TorchBackend(
        decoder,
        spec,
        windows=frozenset(model.windows),
        num_blocks=num_blocks,
        block_size_tokens=config.block_size_tokens,
        device=device,
    )
