"""Makes the kernels and graphs ready, beside the engine that serves already.

Compiling Triton's kernels takes many seconds where they are not in its cache, and capturing the graphs a few. One thread does both,
and then ends: it runs each kernel on rows that have no place in the pool, so that nothing of it is seen; from then on the engine's
thread may use the kernels, and each graph as it is done. Where the thread fails, what it had not made is done without.
"""

import logging
import threading

import torch

from baton.engine.cuda.decode import DecodeStep
from baton.engine.cuda.prefill import PrefillStep

_log = logging.getLogger(__name__)


class Readiness:
    """Of one runner."""

    def __init__(self, decode: DecodeStep, prefill: PrefillStep, *, capture: bool) -> None:
        self._decode = decode
        self._prefill = prefill
        self._graphs = capture
        self._compiled = threading.Event()
        self._finished = threading.Event()

    @property
    def compiled(self) -> bool:
        """Whether the steps may be used."""
        return self._compiled.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the thread has ended, after at most so long."""
        return self._finished.wait(timeout_s)

    def start(self, device: torch.device) -> None:
        """Begins. Call it once."""
        threading.Thread(
            target=self._run, args=(device,), name="engine-kernels", daemon=True
        ).start()

    def _run(self, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                with torch.inference_mode(), torch.cuda.stream(stream):
                    self._compile()
                    stream.synchronize()
                    self._compiled.set()
                    if self._graphs:
                        self._capture()
            else:
                with torch.inference_mode():
                    self._compile()
                self._compiled.set()
        except Exception:  # noqa: BLE001 - logged; the engine serves without
            left = "CUDA graphs" if self.compiled else "the CUDA kernels, but with torch's"
            _log.exception("the engine goes on without %s", left)
        finally:
            self._finished.set()

    def _compile(self) -> None:
        """Every batch size is launched: libraries load kernels by size, which a capture does not allow."""
        self._prefill.launch_padding()
        for bucket in self._decode.buckets:
            self._decode.launch(bucket)

    def _capture(self) -> None:
        # Large ones first: the others find room in their memory.
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self._decode.buckets):
            self._decode.capture(bucket, pool)
