"""`python -m prefill_worker`, `decode_worker` and `flex_worker`: flags, and the life of the process."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
from baton.engine.config import EngineConfig
from baton.engine.sim import SimConfig
from baton.errors import InvalidRequestError
from baton.types import Role
from baton.worker.command import parse
from tests.hollow import hollow_checkpoint

TALES = str(Path(baton.__file__).parent / "models" / "tales")


def test_flags_win_over_the_environment_which_wins_over_defaults() -> None:
    command = parse(
        Role.DECODE,
        ["--model", "m", "--routers", "a:1,b:2", "--port", "5", "--dtype", "float32"],
        {"BATON_PORT": "6", "BATON_METRICS_PORT": "7", "RAY_ADDRESS": "head:6379"},
    )
    assert (command.settings.port, command.settings.metrics_port) == (5, 7)
    assert command.settings.routers == ("a:1", "b:2")
    assert command.ray_address == "head:6379"
    assert isinstance(command.engine, EngineConfig)
    assert (command.engine.model, command.engine.dtype) == ("m", "float32")
    assert command.settings.worker_id.startswith("decode-")
    assert command.num_gpus == 0


def test_a_simulated_worker_has_the_models_vocabulary_and_runs_where_it_is_told() -> None:
    flags = ["--model", TALES, "--engine", "sim", "--kv-pool-tokens", "1024"]
    flags += ["--ray-resource", "prefill", "--ray-node-ip", "127.0.0.2"]
    command = parse(Role.PREFILL, flags, {})
    assert isinstance(command.engine, SimConfig)
    assert (command.engine.model, command.engine.num_blocks) == ("tales", 64)
    assert (command.ray_resource, command.ray_node_ip) == ("prefill", "127.0.0.2")


def test_a_gpu_worker_asks_ray_for_a_gpu() -> None:
    assert parse(Role.PREFILL, ["--model", "m", "--device", "cuda"], {}).num_gpus == 1


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="BATON_PORT"):
        parse(Role.PREFILL, ["--model", "m"], {"BATON_PORT": "x"})


def test_a_flexible_worker_is_told_its_first_role() -> None:
    command = parse(None, ["--model", "m", "--role", "decode"], {})
    assert command.role is Role.DECODE
    assert command.settings.worker_id.startswith("decode-")
    with pytest.raises(SystemExit):
        parse(None, ["--model", "m"], {})


@contextmanager
def started(package: str, log: Path, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", package, "--ray-address", "local", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(40)


def wait_for(log: Path, pattern: str, process: "subprocess.Popen[bytes]") -> Sequence[str]:
    end_s = time.monotonic() + 90
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end_s, log.read_text()
        time.sleep(0.05)
    return found.groups()


BANNER = r"serves tales at (\S+) \(cpu, .*pid (\d+);"


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.parametrize("start", [["prefill_worker"], ["flex_worker", "--role", "prefill"]])
def test_a_worker_serves_until_sigterm_and_then_leaves_in_order(
    tmp_path: Path, start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: and tells its status on this terminal, though its actor is another process."""
    monkeypatch.setenv("BATON_STATUS_LINE_S", "0.2")
    log = tmp_path / "log"
    package, *flags = start
    with started(package, log, "--model", TALES, *flags) as process:
        address, _ = wait_for(log, BANNER, process)
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="baton.v1.PrefillService")
            answer = stub.Check(request, timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        wait_for(log, r"INFO baton.status: (idle, KV 0.0%)\n", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    assert "draining" in log.read_text()
    assert log.read_text().endswith("stopped\n")


@pytest.mark.ray
@pytest.mark.e2e
def test_the_command_ends_when_its_worker_dies(tmp_path: Path) -> None:
    """An orchestrator learns of a dead worker from the exit code, and starts another."""
    log = tmp_path / "log"
    with started("decode_worker", log, "--model", TALES) as process:
        _, pid = wait_for(log, BANNER, process)
        os.kill(int(pid), signal.SIGKILL)
        assert process.wait(20) == 1
    assert f"died (pid {pid})" in log.read_text()


@pytest.mark.ray
@pytest.mark.e2e
def test_a_model_that_cannot_be_loaded_is_named_on_exit(tmp_path: Path) -> None:
    log, model = tmp_path / "log", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{")
    with started("decode_worker", log, "--model", str(model)) as process:
        assert process.wait(40) == 1
    assert "config.json" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.ray
@pytest.mark.e2e
def test_a_worker_that_loads_a_large_model_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    """Promise: a pod's log tells a long load from a stuck one, and its end need not be awaited."""
    log, model = tmp_path / "log", tmp_path / "model"
    total_mib = hollow_checkpoint(model, num_layers=20) >> 20
    with started("decode_worker", log, "--model", str(model), "--threads", "1") as process:
        wait_for(log, rf"INFO .* loaded [\d,]+ of {total_mib:,} MiB of weights", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    assert "serves" not in log.read_text()
