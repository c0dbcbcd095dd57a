"""llama.cpp, built for this processor from the sources that the Python binding's package holds. Its benchmarks time the model alone:
neither sampling nor scheduling.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from benchmarks.engine.checkpoints import Checkpoint
from benchmarks.engine.environments import make_environment
from benchmarks.engine.peers.base import Peer

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
TOOLS = ("llama-bench", "llama-batched-bench")


class LlamaCpp(Peer):
    """The strongest for one stream, and for eight-bit weights."""

    name = "llamacpp"
    formats: ClassVar = {"bf16": "bf16", "int8": "q8_0", "f32": "f32"}

    @property
    def _home(self) -> Path:
        return self.cache / "llamacpp"

    @property
    def _tree(self) -> Path:
        directory = f"{PACKAGE.replace('-', '_')}-{VERSION}"
        return self._home / directory / "vendor" / "llama.cpp"

    def install(self) -> None:
        tools = [self._home / "build" / "bin" / tool for tool in TOOLS]
        if all(tool.exists() for tool in tools):
            return
        if not self._tree.exists():
            self._download()
        build = self._home / "build"
        print(f"building llama.cpp in {build}", flush=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "GGML_NATIVE": "ON",
            "BUILD_SHARED_LIBS": "OFF",
            "LLAMA_CURL": "OFF",
            "LLAMA_OPENSSL": "OFF",
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_BUILD_EXAMPLES": "OFF",
            "LLAMA_BUILD_SERVER": "OFF",
            "LLAMA_BUILD_UI": "OFF",
        }
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", str(self._tree), "-B", str(build), *flags], check=True)
        jobs = str(len(self.cores))
        target = ["--target", *TOOLS]
        subprocess.run(["cmake", "--build", str(build), "-j", jobs, *target], check=True)

    def _download(self) -> None:
        """Asking for a package's sources runs its build's first step, which needs the build's tools."""
        python = make_environment(self._home / "tools", ["install", "scikit-build-core==0.11.6"])
        sources = self._home / "sdist"
        command = [str(python), "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-build-isolation"]
        command += ["--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "-d", str(sources)]
        subprocess.run(command, check=True)
        with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
            archive.extractall(self._home, filter="data")

    def _converted(self, checkpoint: Checkpoint, weight_format: str) -> Path:
        return self.cache / "converted" / f"{checkpoint.name}-{self.formats[weight_format]}.gguf"

    def convert(self, checkpoint: Checkpoint, weight_format: str) -> None:
        path = self._converted(checkpoint, weight_format)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        script = Path(__file__).parents[1] / "convert_gguf.py"
        paths = os.pathsep.join([str(self._tree), str(self._tree / "convert_gguf.py")])
        command = [sys.executable, str(script), str(checkpoint.directory)]
        output = ["--outfile", str(partial), "--outtype", self.formats[weight_format]]
        subprocess.run(
            [*command, *output],
            check=True,
            capture_output=True,
            env={"PATH": os.defpath, "PYTHONPATH": paths},
        )
        shutil.move(partial, path)

    def arguments(self, checkpoint: Checkpoint, weight_format: str) -> Sequence[str]:
        path = self._converted(checkpoint, weight_format)
        tools = self._home / "build" / "bin"
        weights = ["--model", str(path), "--format", self.formats[weight_format]]
        return [*weights, "--tools", str(tools)]
