"""Baton's engine, in this environment: stepped in process, without a server."""

from typing import ClassVar

from benchmarks.engine.peers.base import ENGINE_CELLS, Peer


class Baton(Peer):
    """What is measured against the others."""

    name = "baton"
    formats: ClassVar = {"bf16": "bf16", "int8": "int8", "f32": "f32"}
    kinds = ENGINE_CELLS | {"mixed"}
