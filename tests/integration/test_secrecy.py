"""What clients say and what opens doors stays out of everything that is kept: logs, metrics, error details."""

import ast
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

import baton
from baton.service.keys import TenantLimits, add_key, new_key
from baton.v1 import inference_pb2, session_pb2
from tests.integration.router_fakes import SETTINGS, request
from tests.integration.sim_house import House, house

SECRET = "swordfish"
ROOT = Path(baton.__file__).parent.parent


@pytest.fixture
def key(tmp_path: Path) -> tuple[str, str]:
    """The keys file, and a key in it."""
    file = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(file, entry)
    return file, key


def bearing(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def said(here: House, message: inference_pb2.GenerateRequest, key: str) -> str:
    """What the router says of a request that fails, whole."""
    try:
        async for _ in here.inference.Generate(message, timeout=10, metadata=bearing(key)):
            pass
    except grpc.aio.AioRpcError as error:
        return repr((error.details(), error.trailing_metadata(), error.debug_error_string()))
    return ""


def scraped(here: House) -> str:
    ports = [f"127.0.0.1:{here.app.metrics_port}"]
    ports += [worker.host.info.metrics_address for worker in here.workers.values()]
    pages = []
    for address in ports:
        with urlopen(f"http://{address}/metrics", timeout=5) as page:
            pages.append(page.read().decode())
    return "\n".join(pages)


async def test_no_prompt_key_or_stop_string_is_logged_measured_or_sent_back(
    key: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: at DEBUG, over requests that succeed, that are refused for every reason, and whose worker dies."""
    file, presented = key
    settings = replace(SETTINGS, api_keys_file=file, fleet_listen="127.0.0.1:0")
    caplog.set_level(logging.DEBUG)
    told = ""
    text = f"{SECRET} " * 20
    async with house(1, 2, settings=settings) as here:
        good = request(text=text, stop=[SECRET], max_tokens=400, ignore_eos=True, cache_salt=SECRET)
        assert not await said(here, good, presented)
        # The worker that serves it dies: the attempt's failure is logged.
        call = here.inference.Generate(good, timeout=20, metadata=bearing(presented))
        killed = False
        async for response in call:
            if not killed and response.HasField("chunk"):
                await here.kill(next(w for w in here.workers if "decode" in w and _busy(here, w)))
                killed = True
        bad = [
            request(text=text * 200),
            request(text=text, stop=[SECRET * 99]),
            request(text=text, top_p=7.0),
            request(text=text, request_id=f"{SECRET}!"),
            inference_pb2.GenerateRequest(
                chat=inference_pb2.Chat(
                    messages=[inference_pb2.ChatMessage(role=SECRET, content=text)]
                )
            ),
        ]
        create = session_pb2.SessionServiceCreateRequest()
        created = await here.sessions.Create(create, metadata=bearing(presented))
        session = created.session.session_id
        turn = request(text=text, max_tokens=8, session_id=session)
        assert not await said(here, turn, presented)
        bad += [
            request(text=text * 200, session_id=session),
            request(text=text, stop=[SECRET * 99], session_id=session),
        ]
        for message in bad:
            refusal = await said(here, message, presented)
            assert refusal
            told += refusal
        for wrong in (f"baton_{SECRET}_{SECRET * 4}", SECRET, presented + "x"):
            refusal = await said(here, good, wrong)
            assert "UNAUTHENTICATED" in refusal
            told += refusal
        get = session_pb2.SessionServiceGetRequest(session_id=session)
        told += str(await here.sessions.Get(get, metadata=bearing(presented)))
        told += scraped(here)
    assert "attempt 0 ended" in caplog.text
    # caplog's records hold the arguments too, not only the text.
    kept = caplog.text + repr([vars(record) for record in caplog.records]) + told
    for secret in (SECRET, presented, presented.split("_", 2)[2]):
        assert secret not in kept


def _busy(here: House, worker_id: str) -> bool:
    return any(w == worker_id and each.host.num_calls for w, each in here.workers.items())


PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
GRPC_PATHS = ("router", "baton/service", "baton/client", "baton/codec.py", "baton/v1", "baton/kv")
SERVICERS = ("prefill_worker", "decode_worker", "baton/engine", "baton/scheduling", "baton/cli")


def _sources(*places: str) -> Iterator[Path]:
    for place in places:
        path = ROOT / place
        yield from path.rglob("*.py") if path.is_dir() else [path]


@pytest.mark.parametrize("place", [*GRPC_PATHS, *SERVICERS])
def test_nothing_that_a_call_reaches_unpickles(place: str) -> None:
    """Promise: no bytes from the network become code. Neither pickle nor what is built on it is imported or named where gRPC's bytes
    go; nor eval, exec, or a torch.load, which unpickles.
    """
    found = []
    for path in _sources(place):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                called = f"{ast.unparse(node.value)}.{node.attr}"
                names = ["pickle"] if called in {"torch.load", "np.load", "numpy.load"} else []
                names.append(node.attr)
            elif isinstance(node, ast.Name):
                names = ["pickle"] if node.id in {"eval", "exec"} else [node.id]
            parts = {part for name in names for part in name.split(".")}
            if parts & PICKLES:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found
