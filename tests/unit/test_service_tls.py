"""TLS on a port: who gets in, who does not, and certificates that change while calls run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import InvalidRequestError
from baton.service.channel import RenewedChannel, fleet_files, open_channel
from baton.service.server import GrpcServer
from baton.service.settings import ServerSettings
from baton.service.tls import TlsFiles, channel_credentials
from tests.certificates import Authority, put, remove, spoil


@pytest.fixture
def fleet(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "fleet")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "stranger")


@asynccontextmanager
async def serving(tls: TlsFiles) -> AsyncIterator[int]:
    server = GrpcServer(ServerSettings(reflection=False), ["a.Service"], tls=tls)
    port = await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def check(channel: grpc.aio.Channel) -> None:
    request = health_pb2.HealthCheckRequest()
    await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)


async def reaches(port: int, files: TlsFiles | None, host: str = "127.0.0.1") -> bool:
    """Whether a client with these files is served. Those who are not get UNAVAILABLE, in bounded time."""
    target = f"{host}:{port}"
    channel = (
        grpc.aio.insecure_channel(target)
        if files is None
        else grpc.aio.secure_channel(target, channel_credentials(files))
    )
    async with channel:
        try:
            await check(channel)
        except grpc.aio.AioRpcError as error:
            code = error.code()
        else:
            return True
    assert code is grpc.StatusCode.UNAVAILABLE
    return False


async def test_a_port_with_a_certificate_serves_those_who_trust_it(
    fleet: Authority, stranger: Authority
) -> None:
    own = replace(fleet.issue("server"), ca="")
    async with serving(own) as port:
        assert await reaches(port, TlsFiles(ca=str(fleet.ca_file)))
        assert not await reaches(port, TlsFiles(ca=str(stranger.ca_file)))
        assert not await reaches(port, None)


async def test_a_certificate_for_another_host_or_out_of_date_is_not_trusted(
    fleet: Authority,
) -> None:
    trusting = TlsFiles(ca=str(fleet.ca_file))
    async with serving(replace(fleet.issue("other", "elsewhere.example"), ca="")) as port:
        assert not await reaches(port, trusting)
    async with serving(replace(fleet.issue("old", expired=True), ca="")) as port:
        assert not await reaches(port, trusting)


async def test_a_port_with_a_ca_serves_only_those_who_show_its_certificate(
    fleet: Authority, stranger: Authority
) -> None:
    """Promise: mutual TLS. A client without a certificate, with another CA's, or with one out of date gets nowhere."""
    async with serving(fleet.issue("server")) as port:
        assert await reaches(port, fleet.issue("client", "client.example"))
        assert not await reaches(port, TlsFiles(ca=str(fleet.ca_file)))
        theirs = replace(stranger.issue("client"), ca=str(fleet.ca_file))
        assert not await reaches(port, theirs)
        assert not await reaches(port, fleet.issue("old", expired=True))
        assert not await reaches(port, None)


async def test_a_new_certificate_counts_without_a_restart_and_fails_no_call(
    fleet: Authority, stranger: Authority
) -> None:
    """Promise: under load, files are replaced time and again, by those of another CA too, and every call succeeds."""
    async with serving(replace(fleet.issue("server"), ca="")) as port:
        trusting = TlsFiles(ca=str(fleet.ca_file))
        done = asyncio.Event()
        target = f"127.0.0.1:{port}"

        async def load() -> int:
            count = 0
            async with grpc.aio.secure_channel(target, channel_credentials(trusting)) as channel:
                while not done.is_set():
                    await check(channel)
                    count += 1
            return count

        loads = [asyncio.create_task(load()) for _ in range(4)]
        for _ in range(10):
            fleet.issue("server")
            assert await reaches(port, trusting)
        # Connections that are open stay; those to come see the other CA's certificate.
        put(fleet.issue("server"), stranger.issue("server"))
        assert await reaches(port, TlsFiles(ca=str(stranger.ca_file)))
        assert not await reaches(port, trusting)
        done.set()
        assert all(await asyncio.gather(*loads))


async def test_unusable_new_files_leave_the_old_ones_in_force(
    fleet: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    own = fleet.issue("server")
    client = fleet.issue("client")
    async with serving(own) as port:
        spoil(own)
        assert await reaches(port, client)
        assert "stays in force" in caplog.text
        remove(own)
        assert await reaches(port, client)
        fleet.issue("server")
        assert await reaches(port, client)


async def test_an_unusable_file_is_named_at_the_start(
    fleet: Authority, stranger: Authority
) -> None:
    own, theirs = fleet.issue("server"), stranger.issue("server")
    bad = [
        (replace(own, cert="/nowhere.pem"), "/nowhere.pem"),
        (replace(own, key=theirs.key), own.cert),
        (replace(own, ca=own.key), own.key),
        (replace(own, key=""), own.cert),
    ]
    for files, name in bad:
        with pytest.raises(InvalidRequestError) as failed:
            await GrpcServer(ServerSettings(), [], tls=files).start()
        assert name in failed.value.message


def test_a_fleet_has_all_three_files_or_none() -> None:
    """Without the CA, a worker's port would take everybody."""
    assert fleet_files(ServerSettings()) is None
    with pytest.raises(InvalidRequestError, match="fleet_ca_file"):
        fleet_files(ServerSettings(fleet_cert_file="c", fleet_key_file="k"))


async def test_a_channel_shows_the_new_certificate_in_calls_to_come(
    fleet: Authority, stranger: Authority
) -> None:
    """Promise: a process whose certificate ran out is let in again once it has a new one, and running calls go on."""
    mine = fleet.issue("client")
    settings = ServerSettings(
        fleet_cert_file=mine.cert, fleet_key_file=mine.key, fleet_ca_file=mine.ca
    )
    async with (
        serving(fleet.issue("server")) as port,
        open_channel(f"127.0.0.1:{port}", settings) as channel,
    ):
        assert isinstance(channel, RenewedChannel)
        await check(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        put(mine, stranger.issue("client"))
        with pytest.raises(grpc.aio.AioRpcError):
            await check(channel)
        fleet.issue("client")
        await check(channel)
        assert not watch.done()
        watch.cancel()
