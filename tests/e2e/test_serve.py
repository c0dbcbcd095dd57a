"""`baton serve` as a process: it starts, answers, survives what dies, drains, and leaves nothing running."""

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from baton.client import Client, ConnectionOptions, SamplingOptions
from baton.errors import BatonError
from baton.types import Role
from tests.served import Serve, Served, baton, until

pytestmark = [pytest.mark.e2e]

SIM = ("--engine", "sim", "--transport", "memory")
RAY = ("--engine", "sim", "--transport", "ray")
LONG = SamplingOptions(max_tokens=1500, ignore_eos=True, seed=1)
PROMPT = list(range(2, 202))


def test_it_answers_over_the_split_and_stops_cleanly(serve: Serve) -> None:
    served = serve(*SIM)
    with Client(served.address) as client:
        assert {worker.role for worker in client.model().workers} == {Role.PREFILL, Role.DECODE}
        result = client.complete(PROMPT, sampling=SamplingOptions(max_tokens=8, ignore_eos=True))
    assert len(result.token_ids) == 8
    assert result.timings.handoff_bytes > 0
    assert served.stop() == 0
    assert not served.processes()


def test_the_banner_tells_what_runs(serve: Serve) -> None:
    served = serve(*SIM, "--decode", "2", "--kv-tokens", "1024", "--block-size", "32")
    text = served.output()
    for word in ("1,024 tokens", "32 blocks of 32", "decode-1", "transport=memory", "/metrics"):
        assert word in text
    assert "\x1b" not in text


def test_without_prefill_workers_decode_does_it_all(serve: Serve) -> None:
    served = serve("--engine", "sim", "--prefill", "0")
    with Client(served.address) as client:
        result = client.complete(PROMPT, sampling=SamplingOptions(max_tokens=8, ignore_eos=True))
    assert (len(result.token_ids), result.timings.handoff_bytes) == (8, 0)
    assert result.attempts[0].prefill_worker == ""


def test_a_running_request_survives_the_drain(serve: Serve) -> None:
    """Promise: a stop signal lets running requests finish, and refuses new ones."""
    served = serve(*SIM)
    with Client(served.address) as client, client.generate(PROMPT, sampling=LONG) as stream:
        chunks = iter(stream)
        next(chunks)
        served.process.send_signal(signal.SIGTERM)
        assert len(stream.read().token_ids) == LONG.max_tokens
    assert served.process.wait(20) == 0


def test_a_second_signal_stops_at_once(serve: Serve) -> None:
    """Promise: nobody has to wait for a drain."""
    served = serve(*SIM, "--drain-grace", "60")
    failures: list[BatonError] = []
    began = threading.Event()

    def read() -> None:
        options = SamplingOptions(max_tokens=2000, ignore_eos=True)
        try:
            with Client(served.address, connection=ConnectionOptions(reconnect_s=1.0)) as client:
                while True:
                    with client.generate([5], sampling=options) as stream:
                        for _ in stream:
                            began.set()
        except BatonError as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(20)
    served.process.send_signal(signal.SIGINT)
    until(lambda: "draining" in served.output(), 5, "the first one is heeded")
    served.process.send_signal(signal.SIGINT)
    served.process.wait(15)
    reader.join(15)
    assert len(failures) == 1
    assert not served.processes()


def test_with_json_logs_every_line_is_json(serve: Serve) -> None:
    served = serve(*SIM, "--json-logs", "--log-level", "info")
    assert served.stop() == 0
    lines = [json.loads(line) for line in served.output().splitlines()]
    (config,) = [line for line in lines if line.get("kind") == "config"]
    assert config["transport"] == "memory"
    assert any("joined" in line["message"] for line in lines if "level" in line)


def test_it_serves_openais_api_where_it_is_told_to(serve: Serve) -> None:
    """Promise: with --http, the ready line has the address, the banner too, and OpenAI's clients are answered there."""
    served = serve(*SIM, "--json-logs", "--http", "127.0.0.1:0")
    http = json.loads(served.stdout.read_text().splitlines()[0])["http"]
    assert f'"http": "{http}"' in served.output()
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none") as client:
        (model,) = client.models.list()
        messages: Any = [{"role": "user", "content": "Tell me a tale."}]
        answer = client.chat.completions.create(model=model.id, messages=messages, max_tokens=8)
        assert answer.choices[0].finish_reason


def test_an_http_address_that_is_none_is_named() -> None:
    done = baton("serve", *SIM, "--port", "0", "--metrics-port", "0", "--http", "8000")
    assert done.returncode == 2
    assert "--http" in done.stderr


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = baton("serve", *SIM, "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port 0" in done.stderr


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """Promise: a model that cannot be loaded says which file is wrong, and nothing is left running."""
    done = baton(
        "serve",
        "--transport",
        "memory",
        "--model",
        str(tmp_path),
        "--port",
        "0",
        "--metrics-port",
        "0",
    )
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_without_kv_cache_there_is_nothing_to_hand_over() -> None:
    done = baton("serve", "--no-kv-cache")
    assert done.returncode == 2
    assert "--prefill 0" in done.stderr


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_over_ray_it_recovers_from_every_death(serve: Serve) -> None:
    """Promise: a killed worker and a killed router come back by themselves, a running stream goes on with the same tokens where a worker
    dies, and at the end no process is left.
    """
    served = serve(*RAY, "--decode", "2")
    with Client(served.address) as client:
        undisturbed = client.complete(PROMPT, sampling=LONG)
        assert undisturbed.timings.handoff_bytes > 0

        decode = undisturbed.attempts[-1].decode_worker
        (killed,) = [w.pid for w in client.model().workers if w.worker_id == decode]
        with client.generate(PROMPT, sampling=LONG) as stream:
            chunks = iter(stream)
            next(chunks)
            os.kill(killed, signal.SIGKILL)
            assert stream.read().token_ids == undisturbed.token_ids

        def is_whole() -> bool:
            workers = client.model().workers
            return len(workers) == 3 and killed not in {w.pid for w in workers}

        until(is_whole, 40, "the dead worker is replaced")
        assert client.complete(PROMPT, sampling=LONG).token_ids == undisturbed.token_ids

    os.kill(_router_pid(served), signal.SIGKILL)

    def is_back() -> bool:
        try:
            with Client(served.address) as client:
                return len(client.model().workers) == 3
        except BatonError:
            return False

    until(is_back, 40, "the router and its fleet are back")
    assert served.stop() == 0
    until(lambda: not served.processes(), 5, "every process is gone")


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_over_ray_a_killed_serve_takes_everything_along(serve: Serve) -> None:
    """Promise: even SIGKILL of `baton serve` ends its router, its workers and its Ray. Ray's two agents, which hold nothing, take up to a
    minute to give up on it.
    """
    served = serve(*RAY)
    running = "\n".join(served.processes().values())
    assert "Actor" in running
    (directory,) = set(re.findall(r"(/\S*/baton-ray-\w+)/", running))
    served.process.kill()
    served.process.wait(10)

    def only_agents() -> bool:
        return all("Agent" in line for line in served.processes().values())

    until(only_agents, 15, "everything but Ray's agents is gone")
    shutil.rmtree(directory, ignore_errors=True)  # which nobody was left to remove


def _router_pid(served: Served) -> int:
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    for child in children.split():
        if b"router" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(children)


def test_readiness_means_answers(serve: Serve) -> None:
    """Promise: once the ready line is out, the first request succeeds."""
    began_s = time.monotonic()
    served = serve(*SIM)
    with Client(served.address) as client:
        client.complete([3], sampling=SamplingOptions(max_tokens=1))
    assert time.monotonic() - began_s < 30
