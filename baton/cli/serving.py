"""The life of `baton serve`: start the fleet, say so, watch over it, drain on a signal, leave nothing running.

Everything runs on one event loop in the main thread, because Ray ties the processes it starts to the thread that starts them.
"""

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from baton.cli.banner import Announcer
from baton.cli.config import ServeConfig, Transport
from baton.cli.console import stderr
from baton.cli.signals import StopSignals
from baton.client import AsyncClient, ConnectionOptions
from baton.errors import BatonError, InternalError
from baton.service import logging as service_logging
from baton.service.channel import fleet_files
from baton.service.settings import RouterSettings, ServerSettings
from baton.service.tls import TlsFiles
from baton.types import WorkerInfo

JOIN_TIMEOUT_S = 30.0

T = TypeVar("T")


class Fleet(Protocol):
    """A router and its workers, somewhere on this machine. Methods are called on one event loop, in this order."""

    async def start(self) -> tuple[WorkerInfo, ...]:
        """Returns when every worker has loaded its model. Raises `ModelLoadError`, or what else keeps a part from starting; `stop` is
        called all the same.
        """
        ...

    async def keep_alive(self) -> None:
        """Replaces what dies. Returns never; raises where it cannot go on."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Lets running requests finish within the grace, then ends everything; 0 ends it at once. Safe in any state, and again after it
        was cancelled.
        """
        ...


def run(config: ServeConfig) -> bool:
    """Serves until a signal; returns whether everything ended cleanly. Raises what kept it from starting."""
    settings = ServerSettings(log_format=config.log_format, log_level=config.log_level)
    service_logging.configure(settings, sys.stderr, os.environ)
    return asyncio.run(_serve(config, Announcer(stderr(), config.log_format)))


def _fleet(config: ServeConfig, announcer: Announcer, signals: StopSignals) -> Fleet:
    # Each brings in what the other does not need: Ray here, torch there.
    if config.transport is Transport.RAY:
        from baton.cli.fleet_ray import RayFleet  # noqa: PLC0415

        return RayFleet(config, announcer, signals)
    from baton.cli.fleet_memory import MemoryFleet  # noqa: PLC0415

    return MemoryFleet(config, announcer)


async def _serve(config: ServeConfig, announcer: Announcer) -> bool:
    signals = StopSignals()
    with signals.listening():
        fleet = _fleet(config, announcer, signals)
        clean = False
        try:
            workers = await _unless(signals.first, _start(fleet, config, announcer))
            if workers is not None:
                tls = bool(RouterSettings.from_env(os.environ).tls_cert_file)
                announcer.banner(config, workers, tls=tls)
                announcer.ready(config)
                await _unless(signals.first, fleet.keep_alive())
            clean = True
        finally:
            grace_s = config.drain_grace_s if clean else 0.0
            step = "draining; a second Ctrl-C stops at once" if grace_s else "stopping"
            with announcer.starting(step):
                clean &= await _stop(fleet, grace_s, signals.second)
        announcer.event("stopped")
    return clean


async def _start(fleet: Fleet, config: ServeConfig, announcer: Announcer) -> tuple[WorkerInfo, ...]:
    workers = await fleet.start()
    with announcer.starting("waiting for the workers to join the router"):
        await _joined(config, len(workers))
    return workers


async def _joined(config: ServeConfig, count: int) -> None:
    """Returns when the router counts `count` members. Raises `InternalError` where that takes too long."""
    problem = "it does not answer"
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S), _administrator(config) as client:
            while True:
                try:
                    model = await client.model(timeout_s=2.0)
                except BatonError as error:
                    problem = error.message
                else:
                    if len(model.workers) >= count:
                        return
                    problem = f"{len(model.workers)} of {count} workers joined"
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise InternalError(
            f"the router at {config.address} is not ready after {JOIN_TIMEOUT_S:.0f} s: {problem}"
        ) from None


def _administrator(config: ServeConfig) -> AsyncClient:
    """At the workers' port, which asks for no key."""
    files = fleet_files(ServerSettings.from_env(os.environ)) or TlsFiles()
    connection = ConnectionOptions(
        tls_ca_file=files.ca, tls_cert_file=files.cert, tls_key_file=files.key
    )
    return AsyncClient(config.fleet_address, connection=connection)


async def _stop(fleet: Fleet, grace_s: float, at_once: asyncio.Event) -> bool:
    """Whether it ended in peace."""
    if await _unless(at_once, _true_after(fleet.stop(grace_s))):
        return True
    await fleet.stop(0.0)
    return False


async def _true_after(act: Coroutine[Any, Any, None]) -> bool:
    await act
    return True


async def _unless(event: asyncio.Event, act: Coroutine[Any, Any, T]) -> T | None:
    """What `act` returns or raises; None where the event came first, and then `act` is cancelled and has ended."""
    acting = asyncio.create_task(act)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({acting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if acting.cancelled() or not acting.done():
            return None
        return acting.result()
    finally:
        waiting.cancel()
        acting.cancel()
        await asyncio.wait({acting, waiting})
        if not acting.cancelled():
            acting.exception()  # one that came too late to matter
