"""`python -m router`: starts, says where it listens, and ends in order."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytestmark = pytest.mark.e2e


@contextmanager
def router(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A router process and its port."""
    command = [sys.executable, "-m", "router", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = None
            while found is None:
                line = process.stderr.readline()
                assert line, "the router ended before it served"
                found = re.search(r"serving on port (\d+)", line)
            yield process, int(found[1])
        finally:
            process.kill()


def health(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2.HealthCheckRequest(service="baton.v1.InferenceService")
        return int(health_pb2_grpc.HealthStub(channel).Check(check, timeout=5).status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_router_serves_until_a_signal_and_then_exits_cleanly(number: signal.Signals) -> None:
    with router() as (process, port):
        assert health(port) == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(number)
        assert process.wait(10) == 0


def test_a_taken_port_is_told_in_one_line() -> None:
    with router() as (_, port):
        command = [sys.executable, "-m", "router", "--listen", f"127.0.0.1:{port}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert "is the port taken?" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_malformed_address_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "router", "--listen", "nowhere"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == 2
    assert "host:port" in process.stderr
