"""Builds engines from their configuration, on the thread that will own them. Torch is imported only where it is needed, and Triton
only for a CUDA device.
"""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.engine.progress import Progress
from baton.engine.sim import SimConfig, build_sim_engine

if TYPE_CHECKING:
    from baton.engine.cuda.runner import CudaRunner
    from baton.engine.runner import ModelRunner

_log = logging.getLogger(__name__)


def build_engine(config: EngineConfig | SimConfig, progress: Progress | None = None) -> PagedEngine:
    """Returns an engine that is ready to step; `progress` is called by this thread while weights load. Raises `ModelLoadError`."""
    if isinstance(config, SimConfig):
        return build_sim_engine(config)
    return build_torch_engine(config, progress)


def build_torch_engine(config: EngineConfig, progress: Progress | None = None) -> PagedEngine:
    """As `build_engine`."""
    from baton.engine.runner import ModelRunner  # noqa: PLC0415 - imports torch

    plain = ModelRunner(config, progress=progress)
    runner = _on_cuda(plain, config) if config.device == "cuda" else plain
    runner.warm_up()
    return PagedEngine(
        runner,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        prefix_cache=config.prefix_cache,
        kv_cache=config.kv_cache,
    )


def _on_cuda(plain: "ModelRunner", config: EngineConfig) -> "ModelRunner | CudaRunner":
    """The same model by kernels of its own; by torch where that is asked for, there is no Triton, or none of them fits the model."""
    if config.kernels == "torch":
        return plain
    if find_spec("triton") is None:
        _log.info("torch computes; the CUDA kernels can't be used: Triton is not installed")
        return plain
    from baton.engine.cuda.runner import CudaRunner, supports  # noqa: PLC0415 - imports Triton

    if not supports(plain.info.spec):
        size = plain.info.spec.head_dim
        _log.info("torch computes; the CUDA kernels can't be used: head size %d", size)
        return plain
    return CudaRunner(plain, max_rows=config.max_running, capture=config.capture_decode)
