"""Starts the servers that are measured, and stops them: Baton in its shapes, and vLLM's for CPUs."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

READY_S = 900.0
"""A server that compiles takes minutes."""
STOP_S = 30.0
CACHE_GIB = 2
"""Of vLLM's KV, for which it takes no size in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers."""

    pid: int
    ready_s: float
    """How long it took."""
    address: str = ""
    """host:port of its gRPC; empty: it has none."""
    url: str = ""
    """Of its OpenAI API."""


Start = Callable[[], AbstractContextManager[Server]]


@contextmanager
def running_baton(
    flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`baton serve` with these flags and variables."""
    command = [sys.executable, "-m", "baton", "serve", "--port", "0", "--metrics-port", "0"]
    began_s = time.perf_counter()
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | dict(environment or {}),
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("ready "):
                    yield Server(
                        pid=process.pid,
                        ready_s=time.perf_counter() - began_s,
                        address=line.split()[1],
                    )
                    return
            raise RuntimeError(f"{' '.join(flags)} did not become ready:\n{_tail(log)}")
        finally:
            process.terminate()


@contextmanager
def running_vllm(python: Path, model: Path, cores: Sequence[int]) -> Iterator[Server]:
    """The OpenAI server of vLLM on these cores, from the environment that this Python belongs to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--served-model-name", model.name, "--no-enable-prefix-caching"),
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # It counts its threads itself; and this checkout is for this environment only.
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        environment.pop(name, None)
    began_s = time.perf_counter()
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.perf_counter() - began_s > READY_S:
                    raise RuntimeError(f"vLLM did not become ready:\n{_tail(log)}")
                time.sleep(0.5)
            yield Server(pid=process.pid, ready_s=time.perf_counter() - began_s, url=url)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-4000:]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - this machine's
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
