"""Compiled kernels for CPUs with AVX-512: a whole decoder step in one call, over packed weights and a paged pool of its own order.

    library   the compiled code, found and called
    weights   a checkpoint's tensors, packed
    pool      KV blocks in the order in which they are multiplied, and their copies to and from the wire
    backend   both, as the runner's backend

An optional accelerator: where it was not compiled, or the processor or model is none that it knows, the torch path computes. Each
row's result depends on the row alone, bit by bit: not on its batch, its chunk, or the number of threads.
"""
