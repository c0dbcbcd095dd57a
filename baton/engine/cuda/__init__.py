"""The engine's fast path on a CUDA device: Triton kernels over the paged pool, decode steps as CUDA graphs, staged KV copies.

`baton.engine.cuda.runner` speeds up a `ModelRunner`, which stays its fallback and its oracle. Triton is imported here only, and only
where an engine is built for a CUDA device.
"""
