"""Prefill on one Ray node and decode on another, each with an object store of its own: what a fleet of several machines is, on one."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import baton
from baton.client import Client, SamplingOptions
from baton.engine.base import EngineRequest, Mode, Token
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from tests.faults.routers import RouterProcess
from tests.served import until

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.timeout(180)]

TALES = str(Path(baton.__file__).parent / "models" / "tales")
START_S = 90.0
PROMPT = tuple(3 + (7 * number) % 500 for number in range(320))
KV_BYTES = len(PROMPT) * 4 * 2 * 2 * 64 * 4
"""Four layers, keys and values, two heads of 64, float32."""


class Nodes:
    """The cluster of `ray_nodes`, in its process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._ask, self._answers = process.stdin, process.stdout
        self.address = self._answers.readline().strip()
        assert self.address, "the cluster does not start"

    def reports(self) -> dict[str, dict[str, Any]]:
        """By address."""
        self._ask.write("\n")
        self._ask.flush()
        return {each["address"]: each for each in json.loads(self._answers.readline())}


@contextmanager
def nodes(environ: dict[str, str], log: Path) -> Iterator[Nodes]:
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.ray_nodes"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Nodes(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


@contextmanager
def worker(role: str, node_ip: str, address: str, environ: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", f"{role}_worker", "--model", TALES, "--dtype", "float32"]
    command += ["--threads", "1", "--kv-pool-tokens", "4096", "--worker-id", role]
    command += [
        "--log-level",
        "warning",
        "--ray-address",
        address,
        "--ray-node-ip",
        node_ip,
        "--ray-resource",
        role,
    ]
    process = subprocess.Popen(command, env=environ)
    try:
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)


def one_engines_tokens(sampling: SamplingParams) -> tuple[int, ...]:
    engine = build_torch_engine(
        EngineConfig(model=TALES, dtype="float32", kv_pool_tokens=4096, threads=1)
    )
    key = AttemptKey(RequestId("one"))
    engine.add(EngineRequest(key, Sequence(PROMPT, (), sampling), Mode.LOCAL))
    said = []
    while engine.has_work():
        said += [event.token_id for event in engine.step() if isinstance(event, Token)]
    return tuple(said)


def test_kv_crosses_between_nodes_and_changes_no_token(tmp_path: Path) -> None:
    """Promise: with prefill on one node and decode on another, the KV goes from store to store, and the tokens are one engine's."""
    environ = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environ.pop("RAY_ADDRESS", None)
    router = RouterProcess({"BATON_MODEL": TALES, "BATON_LOCAL_PREFILL_TOKENS": "0"}).start()
    with ExitStack() as stack:
        stack.callback(router.end)
        cluster = stack.enter_context(nodes(environ, tmp_path / "nodes.log"))
        members = {**environ, "BATON_ROUTERS": router.address}
        for role, node_ip in (("prefill", "127.0.0.2"), ("decode", "127.0.0.3")):
            stack.enter_context(worker(role, node_ip, cluster.address, members))
        with Client(router.address) as client:
            until(lambda: ready(client), START_S, "both workers have joined")
            before = cluster.reports()
            answer = client.complete(
                PROMPT, sampling=SamplingOptions(max_tokens=24, temperature=0, ignore_eos=True)
            )
        after = cluster.reports()
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    assert answer.token_ids == one_engines_tokens(greedy)
    assert (answer.attempts[-1].prefill_worker, answer.attempts[-1].decode_worker) == (
        "prefill",
        "decode",
    )
    assert after["127.0.0.2"]["actors"] == ["prefill"]
    assert after["127.0.0.3"]["actors"] == ["decode"]
    assert after["127.0.0.2"]["node_id"] != after["127.0.0.3"]["node_id"]
    # The prompt's KV was an object in the one store, and then in the other.
    for node, report in after.items():
        assert report["created_bytes"] - before[node]["created_bytes"] >= KV_BYTES, node


def ready(client: Client) -> bool:
    return {each.worker_id for each in client.model(timeout_s=5).workers} == {"prefill", "decode"}
