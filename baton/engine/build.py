"""Builds the torch engine from its configuration. Imports torch, so workers import this in their engine's thread."""

from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.engine.loader import Progress
from baton.engine.runner import TorchRunner


def build_torch_engine(config: EngineConfig, *, progress: Progress | None = None) -> PagedEngine:
    """Loads the model and returns an engine that is ready to step; `progress` hears of the weights read. Raises
    `ModelLoadError`.
    """
    return PagedEngine(
        TorchRunner(config, progress=progress),
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        prefix_cache=config.prefix_cache,
        kv_cache=config.kv_cache,
    )
