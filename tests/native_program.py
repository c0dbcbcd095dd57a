"""The native kernels where the system gives them nothing more; a process of its own, since a limit on memory is the whole process's.

    python -m tests.native_program

Prints what was raised, and whether a step after it computes what one before it did.
"""

import resource
import sys
from pathlib import Path

import numpy as np

from baton.engine.native.library import Batch, Format, Library, Matrix, Model, Pool, find_library

HIDDEN, VOCAB = 16, 32
MANY = 4_000_000
"""Tokens whose activations take hundreds of megabytes."""


def tiny_model(library: Library) -> tuple[Model, object]:
    """Embedding, norm and head, without a layer between; and what keeps it alive."""
    rows = np.arange(VOCAB * HIDDEN, dtype=np.float32)
    ones = np.ones(HIDDEN, np.float32)
    packed = np.zeros(library.packed_bytes(Format.FLOAT32, VOCAB, HIDDEN), np.uint8)
    addresses = (rows.ctypes.data, None, VOCAB, HIDDEN, packed.ctypes.data, None)
    library.pack(Format.FLOAT32, *addresses)
    matrix = Matrix(packed.ctypes.data, None, None, VOCAB, HIDDEN)
    sizes = {"hidden": HIDDEN, "inner": HIDDEN, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    model = Model(
        embedding=matrix,
        head=matrix,
        norm=ones.ctypes.data,
        frequencies=ones.ctypes.data,
        norm_eps=1e-5,
        vocab=VOCAB,
        **sizes,
    )
    return model, (packed, ones)


def batch_of(tokens: np.ndarray, logits: np.ndarray) -> tuple[Batch, object]:
    """One sequence, of which the last token's logits are wanted."""
    row = np.array([0, len(tokens), 0, 0], np.int32)
    table, last = np.zeros(1, np.int32), np.array([len(tokens) - 1], np.int32)
    parts = (tokens, row, table, last, logits)
    addresses = (part.ctypes.data for part in parts)
    return Batch(*addresses, None, len(tokens), 1, 1), parts


def leave(num_bytes: int) -> None:
    """Lets this process have so much more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Makes an engine, and then asks for more than there is: of a step, and of threads."""
    library = find_library()
    assert isinstance(library, Library)
    model, _alive = tiny_model(library)
    pool = np.zeros(4096, np.uint8)
    engine = library.engine(model, Pool(pool.ctypes.data, 1, 16), 2, None, tiles=True)
    before, after = np.zeros(VOCAB, np.float32), np.zeros(VOCAB, np.float32)
    few, _kept = batch_of(np.arange(9, dtype=np.int32), before)
    library.step(engine, few)
    many, _kept_too = batch_of(np.zeros(MANY, np.int32), after)
    told: list[str] = []
    leave(64 << 20)
    try:
        library.step(engine, many)
    except MemoryError as error:
        told.append(str(error))
    few, _kept = batch_of(np.arange(9, dtype=np.int32), after)
    library.step(engine, few)
    told.append("same" if before.any() and np.array_equal(before, after) else "different")
    leave(1 << 20)
    try:
        library.engine(model, Pool(pool.ctypes.data, 1, 16), 64, None, tiles=True)
    except OSError as error:
        told.append(str(error))
    sys.stdout.write("\n".join(told))


if __name__ == "__main__":
    main()
