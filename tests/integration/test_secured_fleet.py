"""A deployment with certificates everywhere: clients with keys over TLS, routers and workers with mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from baton.client import AsyncClient, Client, ConnectionOptions, SamplingOptions
from baton.errors import InvalidRequestError, UnauthenticatedError, UnavailableError
from baton.service.channel import open_channel
from baton.service.keys import TenantLimits, add_key, new_key
from baton.service.settings import RouterSettings, WorkerSettings
from baton.service.tls import TlsFiles, channel_credentials
from baton.v1 import decode_pb2, decode_pb2_grpc, fleet_pb2_grpc
from router.app import RouterApp
from router.text import Tokenizer
from tests.certificates import Authority
from tests.integration.router_fakes import SETTINGS
from tests.integration.sim_house import LENGTH, SIM, WORKERS, House, house, prompt_of

GREEDY = SamplingOptions(max_tokens=LENGTH, temperature=0, ignore_eos=True)


class Secrets:
    """The files of a deployment: the clients' CA is not the fleet's."""

    def __init__(self, directory: Path) -> None:
        self.public = Authority.make(directory / "public")
        self.fleet = Authority.make(directory / "fleet")
        self.stranger = Authority.make(directory / "stranger")
        self.keys = str(directory / "keys.json")
        entry, self.key = new_key("acme", limits=TenantLimits())
        add_key(self.keys, entry)

    def router(self, *, client_ca: str = "") -> RouterSettings:
        shown, within = self.public.issue("router"), self.fleet.issue("router")
        return replace(
            SETTINGS,
            fleet_listen="127.0.0.1:0",
            api_keys_file=self.keys,
            tls_cert_file=shown.cert,
            tls_key_file=shown.key,
            tls_client_ca_file=client_ca,
            fleet_cert_file=within.cert,
            fleet_key_file=within.key,
            fleet_ca_file=within.ca,
        )

    def worker(self, authority: Authority) -> WorkerSettings:
        files = authority.issue("worker")
        return replace(
            WORKERS,
            fleet_cert_file=files.cert,
            fleet_key_file=files.key,
            fleet_ca_file=str(self.fleet.ca_file),
        )

    @property
    def connection(self) -> ConnectionOptions:
        return ConnectionOptions(tls_ca_file=str(self.public.ca_file))


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path)


@asynccontextmanager
async def secured(secrets: Secrets, *, client_ca: str = "") -> AsyncIterator[House]:
    files = TlsFiles(ca=str(secrets.public.ca_file))
    async with house(
        1,
        1,
        settings=secrets.router(client_ca=client_ca),
        workers=secrets.worker(secrets.fleet),
        connect=lambda target: grpc.aio.secure_channel(target, channel_credentials(files)),
    ) as here:
        yield here


def client(here: House, secrets: Secrets, connection: ConnectionOptions) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{here.app.port}", api_key=secrets.key, connection=connection)


async def test_a_client_with_a_key_is_answered_over_tls(secrets: Secrets) -> None:
    """Promise: through prefill and decode, sync and async; without the key, or without TLS, nobody is."""
    async with secured(secrets) as here:
        address = f"127.0.0.1:{here.app.port}"
        async with client(here, secrets, secrets.connection) as here_client:
            answer = await here_client.complete(prompt_of(1), sampling=GREEDY)
        assert answer.usage.completion_tokens == LENGTH
        assert answer.attempts[-1].prefill_worker

        def ask() -> tuple[int, ...]:
            with Client(address, api_key=secrets.key, connection=secrets.connection) as blocking:
                return blocking.complete(prompt_of(1), sampling=GREEDY).token_ids

        assert await asyncio.to_thread(ask) == answer.token_ids
        async with AsyncClient(address, connection=secrets.connection) as nobody:
            with pytest.raises(UnauthenticatedError):
                await nobody.complete(prompt_of(1))
        async with client(here, secrets, ConnectionOptions()) as plain:
            with pytest.raises(UnavailableError):
                await plain.model(timeout_s=5)


async def test_clients_can_be_asked_for_certificates(secrets: Secrets) -> None:
    async with secured(secrets, client_ca=str(secrets.public.ca_file)) as here:
        async with client(here, secrets, secrets.connection) as without:
            with pytest.raises(UnavailableError):
                await without.model(timeout_s=5)
        mine = secrets.public.issue("client")
        shown = replace(secrets.connection, tls_cert_file=mine.cert, tls_key_file=mine.key)
        async with client(here, secrets, shown) as with_one:
            assert (await with_one.model(timeout_s=5)).model == SIM.model


async def test_who_is_not_of_the_fleet_neither_joins_nor_reaches_a_worker(
    secrets: Secrets,
) -> None:
    """Promise: a worker without the fleet's certificate is no member, and only members of the fleet get an answer of a worker."""
    async with secured(secrets) as here:
        members = here.app.fleet.registry.infos()
        strangers = (WORKERS, secrets.worker(secrets.stranger))
        for settings in strangers:
            own = replace(settings, keepalive_s=1.0)
            port = members[0].address.rpartition(":")[2]
            async with open_channel(f"127.0.0.1:{port}", own) as channel:
                stub = decode_pb2_grpc.DecodeServiceStub(channel)
                request = decode_pb2.DecodeServiceGetInfoRequest()
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await stub.GetInfo(request, timeout=5)
                assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            async with open_channel(f"127.0.0.1:{here.app.fleet_port}", own) as channel:
                join = fleet_pb2_grpc.FleetServiceStub(channel).Join(timeout=5)
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await join.read()
                assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert here.app.fleet.registry.infos() == members


async def test_certificates_for_one_name_serve_a_fleet_whose_addresses_nobody_knows_before(
    secrets: Secrets,
) -> None:
    """Promise: where addresses are drawn, as pods' are, each certificate may be for the fleet's name alone; another name is refused."""
    router, worker = secrets.router(), secrets.worker(secrets.fleet)
    for name in ("router", "worker"):
        secrets.fleet.issue(name, "fleet.example")
    named = replace(router, fleet_server_name="fleet.example")
    member = replace(worker, fleet_server_name="fleet.example")
    files = TlsFiles(ca=str(secrets.public.ca_file))
    async with house(
        1,
        1,
        settings=named,
        workers=member,
        connect=lambda target: grpc.aio.secure_channel(target, channel_credentials(files)),
    ) as here:
        async with client(here, secrets, secrets.connection) as asking:
            answer = await asking.complete(prompt_of(1), sampling=GREEDY)
        assert answer.attempts[-1].prefill_worker
        target = f"127.0.0.1:{here.app.fleet_port}"
        async with open_channel(target, replace(member, fleet_server_name="another")) as channel:
            join = fleet_pb2_grpc.FleetServiceStub(channel).Join(timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await join.read()
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_fleets_certificates_are_replaced_while_requests_run(secrets: Secrets) -> None:
    """Promise: no request fails, none is tried twice, and a worker that comes afterwards is let in."""
    async with secured(secrets) as here, client(here, secrets, secrets.connection) as asking:
        done = asyncio.Event()

        async def load(number: int) -> int:
            count = 0
            while not done.is_set():
                answer = await asking.complete(prompt_of(number), sampling=GREEDY)
                assert len(answer.attempts) == 1
                count += 1
            return count

        loads = [asyncio.create_task(load(number)) for number in range(3)]
        for _ in range(5):
            secrets.fleet.issue("router")
            secrets.fleet.issue("worker")
            secrets.public.issue("router")
            async with client(here, secrets, secrets.connection) as fresh:
                await fresh.complete(prompt_of(9), sampling=GREEDY)
        await here.add_decode()
        done.set()
        assert all(await asyncio.gather(*loads))


@pytest.mark.parametrize("name", ["api_keys_file", "tls_cert_file", "fleet_cert_file"])
def test_a_router_whose_clients_could_pose_as_workers_does_not_start(
    secrets: Secrets, name: str
) -> None:
    """Promise: as soon as anybody is told apart, workers join at a port of their own."""
    whole = secrets.router()
    settings = replace(SETTINGS, **{name: getattr(whole, name)})
    with pytest.raises(InvalidRequestError, match="fleet_listen"):
        RouterApp(settings, Tokenizer.of_bytes())


def test_routers_that_share_a_port_without_one_each_for_workers_do_not_start() -> None:
    """Promise: a worker joins every router, and not whichever the system gives it."""
    with pytest.raises(InvalidRequestError, match="fleet_listen"):
        RouterApp(replace(SETTINGS, share_port=True), Tokenizer.of_bytes())
