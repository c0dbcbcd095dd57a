"""Processes that benchmarks start: what stands around what is measured."""
