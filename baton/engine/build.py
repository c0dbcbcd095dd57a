"""Builds engines from their configuration, on the thread that will own them. Torch is imported only where it is needed."""

from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.engine.progress import Progress
from baton.engine.sim import SimConfig, build_sim_engine


def build_engine(config: EngineConfig | SimConfig, progress: Progress | None = None) -> PagedEngine:
    """Returns an engine that is ready to step; `progress` is called by this thread while weights load. Raises `ModelLoadError`."""
    if isinstance(config, SimConfig):
        return build_sim_engine(config)
    return build_torch_engine(config, progress)


def build_torch_engine(config: EngineConfig, progress: Progress | None = None) -> PagedEngine:
    """As `build_engine`."""
    from baton.engine.runner import ModelRunner  # noqa: PLC0415 - imports torch

    runner = ModelRunner(config, progress=progress)
    runner.warm_up()
    return PagedEngine(
        runner,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        prefix_cache=config.prefix_cache,
        kv_cache=config.kv_cache,
    )
