"""Compiles the CUDA kernels to machine code for a device that need not be here, for the shapes of an 8B model in bfloat16.

    python -m tests.cuda_compile

A process of its own, since the tests' own process may have kernels for the interpreter. Fails where a kernel does not compile, or asks
for more shared memory than a multiprocessor has.
"""

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.engine.cuda.kernels import attention, layers, sampling

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
HALF, SINGLE, DOUBLE, INT, LONG = "*bf16", "*fp32", "*fp64", "*i32", "*i64"
HEADS = {"H": 32, "D": 128, "DIM_PAD": 128}
SPLITS = {"TILE": 64, "MIN_SPLIT": 128, "MAX_SPLITS": 32}
POOL = {"G": 8, "S": 16, "PRECISION": "tf32"}


def compile_kernel(
    kernel: Any, types: Mapping[str, str], fixed: Mapping[str, object], **options: int
) -> None:
    """`types` are those of the arguments that are not compiled in."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in types if "*" in types[name]
        },
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    shared = compiled.metadata.shared
    assert compiled.asm["cubin"], kernel.__name__
    assert shared <= SHARED_BYTES, kernel.__name__


def main() -> None:
    """Every kernel."""
    numbers = {"scale": "fp32", "query_stride": "i32"}
    pool = {"queries": HALF, "keys": HALF, "values": HALF, **numbers}
    compile_kernel(
        attention.decode_kernel,
        {
            **pool,
            "partials": SINGLE,
            "weights": SINGLE,
            "lengths": LONG,
            "tables": INT,
            "num_rows": "i32",
            "table_stride": "i32",
        },
        {**HEADS, **SPLITS, **POOL, "WINDOW": 0, "ROWS_PAD": 64, "GROUP_PAD": 16},
        num_warps=4,
        num_stages=2,
    )
    compile_kernel(
        attention.combine_kernel,
        {"partials": SINGLE, "weights": SINGLE, "lengths": LONG, "out": HALF},
        {**HEADS, **SPLITS, "WINDOW": 4096},
        num_warps=4,
    )
    compile_kernel(
        attention.prefill_kernel,
        {**pool, "out": HALF, "tiles": INT, "tables": INT, "num_tiles": "i32"},
        {**HEADS, **POOL, "WINDOW": 0, "TILE_M": 128, "TILE_N": 128},
        num_warps=8,
        num_stages=2,
    )
    compile_kernel(
        layers.add_rms_norm_kernel,
        {"branch": HALF, "residual": HALF, "weight": HALF, "out": HALF, "eps": "fp32"},
        {"ADD": True, "E": 4096, "E_PAD": 4096},
        num_warps=8,
    )
    compile_kernel(
        layers.swiglu_kernel,
        {"gate_up": HALF, "out": HALF},
        {"F": 14336, "TILE": 1024},
        num_warps=4,
    )
    compile_kernel(
        layers.rotate_and_store_kernel,
        {
            **dict.fromkeys(("heads", "norm_weight", "keys", "values"), HALF),
            **dict.fromkeys(("cosines", "sines"), SINGLE),
            "slots": LONG,
            "eps": "fp32",
        },
        {
            "ROTATE": True,
            "NORM": True,
            "CLAMP": False,
            "H": 32,
            "G": 8,
            "D": 128,
            "HEADS_PAD": 64,
            "HALF_PAD": 64,
        },
        num_warps=8,
    )
    vocabulary = {"V": 128_256, "P": 16}
    compile_kernel(
        sampling.peaks_kernel,
        {"logits": HALF, "peaks": SINGLE, "places": INT},
        {**vocabulary, "STRETCH": 8192},
        num_warps=8,
    )
    compile_kernel(
        sampling.choose_kernel,
        {
            "logits": HALF,
            "peaks": SINGLE,
            "places": INT,
            **dict.fromkeys(("temperatures", "top_ps", "min_ps", "noise", "weights"), DOUBLE),
            **dict.fromkeys(("top_ks", "chosen"), LONG),
        },
        {**vocabulary, "P_PAD": 16, "TILE": 4096},
        num_warps=16,
    )


if __name__ == "__main__":
    main()
