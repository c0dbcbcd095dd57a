"""Where the native kernels can't be used, on whatever processor: the engine says why, and torch computes."""

import ctypes
import logging
import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import pytest

from baton.engine import backends
from baton.engine.config import EngineConfig
from baton.engine.native import library
from baton.engine.native.library import NEEDED, load_library, processor_flags
from baton.engine.runner import ModelRunner
from baton.engine.torch_backend import TorchBackend
from baton.errors import ModelLoadError
from tests import oracle

NAME = f"_kernels{EXTENSION_SUFFIXES[0]}"


def test_a_processor_that_lacks_instructions_is_told_which(tmp_path: Path) -> None:
    found = load_library(tmp_path, NEEDED - {"avx512_bf16", "f16c"})
    assert found == "this processor lacks avx512_bf16, f16c"


def test_an_installation_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    found = load_library(tmp_path, NEEDED)
    assert isinstance(found, str)
    assert "not compiled" in found


@pytest.mark.parametrize("kind", ["cut short", "another version's"])
def test_kernels_that_cannot_be_loaded_are_not_the_end_of_the_worker(
    tmp_path: Path, kind: str
) -> None:
    """Promise: what installation left behind may be broken, or of another version, and torch computes then."""
    if kind == "cut short":
        (tmp_path / NAME).write_bytes(b"\x7fELF")
    else:
        another = find_spec("numpy._core._multiarray_umath")
        assert another is not None
        assert another.origin is not None
        shutil.copy(another.origin, tmp_path / NAME)
    found = load_library(tmp_path, NEEDED)
    assert isinstance(found, str)
    assert f"{NAME} can't be loaded: " in found


@pytest.mark.skipif(not processor_flags() >= NEEDED, reason="there are no kernels to load")
def test_kernels_of_another_layout_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: what was compiled before a change of the structures is not used, since it would read and write elsewhere."""

    class Another(ctypes.Structure):
        _fields_ = (("tokens", ctypes.c_void_p),)

    folder = Path(library.__file__).parent
    found = load_library(folder, NEEDED)
    assert isinstance(found, library.Library), found
    monkeypatch.setattr(library, "Batch", Another)
    found = load_library(folder, NEEDED)
    assert isinstance(found, str)
    assert "compiled for another version of Baton" in found


def test_the_log_says_why_torch_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a missing accelerator is a line of the log; only where it was asked for is it an error."""
    monkeypatch.setattr(backends, "find_library", lambda: "this processor lacks fma")
    model = str(oracle.save(oracle.llama, tmp_path))
    config = EngineConfig(model=model, kv_pool_tokens=64, threads=1)
    with caplog.at_level(logging.INFO):
        runner = ModelRunner(config)
    assert isinstance(runner.backend, TorchBackend)
    why = "the native kernels can't be used: this processor lacks fma"
    assert f"torch computes; {why}" in caplog.messages
    with pytest.raises(ModelLoadError, match=why):
        ModelRunner(EngineConfig(model=model, kv_pool_tokens=64, threads=1, kernels="native"))
