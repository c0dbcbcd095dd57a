"""Which engine a worker of `baton serve` builds; see `baton.engine.aio.AsyncEngine` for the thread that calls it."""

from baton.engine.base import Engine
from baton.engine.config import EngineConfig
from baton.engine.sim import SimConfig, build_sim_engine


def build_engine(config: EngineConfig | SimConfig) -> Engine:
    """Raises `ModelLoadError`."""
    if isinstance(config, SimConfig):
        return build_sim_engine(config)
    from baton.engine.build import build_torch_engine  # noqa: PLC0415 - the simulated engine needs no torch

    return build_torch_engine(config)
