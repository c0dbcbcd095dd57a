"""One module per engine: how its environment is made, what a checkpoint becomes for it, and how its runner is started."""

from benchmarks.engine.peers.base import Peer
from benchmarks.engine.peers.baton import Baton
from benchmarks.engine.peers.ctranslate2 import CTranslate2
from benchmarks.engine.peers.llamacpp import LlamaCpp
from benchmarks.engine.peers.transformers import Transformers
from benchmarks.engine.peers.vllm import VLLM

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Baton, VLLM, LlamaCpp, CTranslate2, Transformers)
}
