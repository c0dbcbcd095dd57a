"""Triton kernels: the only modules that know Triton. What launches them stands beside this package."""
