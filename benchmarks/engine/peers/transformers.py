"""Hugging Face transformers, in this environment: `generate` with its dynamic cache."""

from typing import ClassVar

from benchmarks.engine.peers.base import Peer


class Transformers(Peer):
    """The reference that everybody has."""

    name = "transformers"
    formats: ClassVar = {"bf16": "bfloat16", "f32": "float32"}
