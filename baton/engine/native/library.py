"""The compiled kernels, as `ctypes` sees them. Calls release Python's lock.

The structures mirror `src/model.h`. Loaded once per process, on the engine's thread.
"""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from baton.engine.quantize import GROUP

NEEDED = frozenset(
    {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}
    | {"fma", "f16c", "bmi2"}
)
"""What the kernels are compiled for, by Linux's names."""
PANEL = 32
"""Outputs of a panel: `src/gemm.h`."""
_CPUINFO = Path("/proc/cpuinfo")


class Format(IntEnum):
    """How numbers are stored."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2


class Matrix(Structure):
    """`n` outputs of `k` inputs, packed."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
    )


class Layer(Structure):
    """One layer's weights."""

    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("scale", c_float),
        ("window", c_int32),
    )


class Model(Structure):
    """All weights and sizes."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        ("frequencies", c_void_p),
        ("rope_scale", c_float),
        ("norm_eps", c_float),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocab", c_int32),
        ("weights", c_int32),
        ("kv", c_int32),
    )


class Pool(Structure):
    """The KV blocks' memory."""

    _fields_ = (("data", c_void_p), ("num_blocks", c_int32), ("block_size", c_int32))


class Batch(Structure):
    """One step's rows: addresses of int32 arrays, of the logits, and of three seconds to add to (linear, attention, the rest) or None."""

    _fields_ = (
        ("tokens", c_void_p),
        ("rows", c_void_p),
        ("tables", c_void_p),
        ("sampled", c_void_p),
        ("logits", c_void_p),
        ("seconds", c_void_p),
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("num_sampled", c_int32),
    )


class Library:
    """The functions of `src/api.cpp`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be loaded or has another layout, and AttributeError where it lacks a function."""
        self._code = ctypes.CDLL(str(path))
        declared = {
            "baton_layout": (c_int64, []),
            "baton_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
            "baton_pack": (
                None,
                [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p],
            ),
            "baton_allocate": (c_void_p, [c_int64]),
            "baton_free": (None, [c_void_p, c_int64]),
            "baton_engine": (
                c_char_p,
                [POINTER(Model), POINTER(Pool), c_int32, c_char_p, c_int32, POINTER(c_void_p)],
            ),
            "baton_engine_free": (None, [c_void_p]),
            "baton_step": (c_char_p, [c_void_p, POINTER(Batch)]),
            "baton_read_kv": (None, [c_void_p, *[c_int32] * 2, c_void_p, *[c_int32] * 2, c_void_p]),
            "baton_write_kv": (
                None,
                [c_void_p, *[c_int32] * 2, c_void_p, *[c_int32] * 2, c_void_p],
            ),
        }
        for name, (result, arguments) in declared.items():
            function = getattr(self._code, name)
            function.restype, function.argtypes = result, arguments
        if self._code.baton_layout() != _layout():
            raise OSError("it was compiled for another version of Baton; install Baton again")

    def packed_bytes(self, form: Format, n: int, k: int) -> int:
        return int(self._code.baton_packed_bytes(form, n, k))

    def pack(  # noqa: PLR0917 - the C function's
        self,
        form: Format,
        rows: int,
        scales: int | None,
        n: int,
        k: int,
        out: int,
        out_scales: int | None,
    ) -> None:
        self._code.baton_pack(form, rows, scales, n, k, out, out_scales)

    def allocate(self, num_bytes: int) -> int:
        """Zero memory. Raises MemoryError."""
        address = self._code.baton_allocate(num_bytes)
        if not address:
            raise MemoryError(f"{num_bytes} bytes")
        return int(address)

    def free(self, address: int, num_bytes: int) -> None:
        self._code.baton_free(address, num_bytes)

    def engine(
        self, model: Model, pool: Pool, threads: int, cores_path: str | None, *, tiles: bool
    ) -> int:
        """An engine's address; `tiles`: it may multiply on the processor's tiles, where there are any. Everything that `model` and `pool`
        point to must outlive it. Raises OSError where it can't be made: threads or memory are used up, or the model's formats are no
        combination that is compiled.
        """
        path = None if cores_path is None else cores_path.encode()
        engine = c_void_p()
        failure = self._code.baton_engine(
            byref(model), byref(pool), threads, path, tiles, byref(engine)
        )
        if failure is not None:
            raise OSError(f"no engine of {threads} threads: {failure.decode()}")
        assert engine.value is not None
        return engine.value

    def free_engine(self, engine: int) -> None:
        self._code.baton_engine_free(engine)

    def step(self, engine: int, batch: Batch) -> None:
        """Raises MemoryError."""
        failure = self._code.baton_step(engine, byref(batch))
        if failure is not None:
            raise MemoryError(f"a step of {batch.num_tokens} tokens: {failure.decode()}")

    def read_kv(  # noqa: PLR0917 - the C function's
        self, engine: int, plane: int, layer: int, table: int, first: int, last: int, wire: int
    ) -> None:
        self._code.baton_read_kv(engine, plane, layer, table, first, last, wire)

    def write_kv(  # noqa: PLR0917 - the C function's
        self, engine: int, plane: int, layer: int, table: int, first: int, last: int, wire: int
    ) -> None:
        self._code.baton_write_kv(engine, plane, layer, table, first, last, wire)


def _layout() -> int:
    """As `baton_layout` in `src/api.cpp`."""
    layout = 0
    for part in (*map(ctypes.sizeof, (Layer, Model, Pool, Batch)), GROUP):
        layout = layout << 12 | part
    return layout


@cache
def find_library() -> Library | str:
    """The kernels, or why there are none to use on this machine."""
    return load_library(Path(__file__).parent, processor_flags())


def load_library(folder: Path, flags: frozenset[str]) -> Library | str:
    """As `find_library`, on a processor of these flags."""
    if lacking := NEEDED - flags:
        return f"this processor lacks {', '.join(sorted(lacking))}"
    paths = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return "they were not compiled when Baton was installed, which takes a C++ compiler"
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return f"{path.name} can't be loaded: {error}"


def processor_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """What the processor can do; empty where that is not told."""
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
