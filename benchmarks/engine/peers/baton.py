"""Baton's engine, in this environment: stepped in process, without a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.engine.checkpoints import Checkpoint
from benchmarks.engine.peers.base import ENGINE_CELLS, Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Baton(Peer):
    """What is measured against the others."""

    name: ClassVar = "baton"
    formats: ClassVar = {"bf16": "bf16", "int8": "int8", "f32": "f32"}
    kinds: ClassVar = ENGINE_CELLS | {"mixed"}

    kernels: str | None = None
    """As `baton.engine.config.EngineConfig` has it."""

    def arguments(self, checkpoint: Checkpoint, weight_format: str) -> Sequence[str]:
        chosen = [] if self.kernels is None else ["--kernels", self.kernels]
        return [*Peer.arguments(self, checkpoint, weight_format), *chosen]
