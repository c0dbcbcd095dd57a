"""`python -m router`: one router in a process of its own. Settings come from the environment (`BATON_<FIELD>`) and, before it, from
the command line. SIGTERM and SIGINT drain, a second one stops at once.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys

import uvloop

from baton.errors import BatonError
from baton.service.logging import configure
from baton.service.settings import PlacementPolicy, RouterSettings
from router.app import RouterApp, load_tokenizer

_log = logging.getLogger(__name__)


def main() -> None:
    """Runs until a signal."""
    try:
        settings = _settings(sys.argv[1:])
        configure(settings, sys.stderr, os.environ)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))
    except BatonError as error:
        sys.exit(f"router: {error}")


async def _serve(settings: RouterSettings) -> None:
    app = RouterApp(settings, load_tokenizer(settings))
    await app.start()
    _spare_the_collector()
    try:
        await _until_signalled(app, settings.drain_grace_s)
    finally:
        await app.stop()


def _spare_the_collector() -> None:
    """What is alive now stays, and what requests make is freed without it but for a few cycles: so it need not look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _until_signalled(app: RouterApp, grace_s: float) -> None:
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await first.wait()
    _log.info("draining for up to %g s", grace_s)
    draining = asyncio.create_task(app.drain(grace_s))
    hurry = asyncio.create_task(second.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurry):
        task.cancel()
    await asyncio.gather(draining, hurry, return_exceptions=True)


def _settings(arguments: list[str]) -> RouterSettings:
    parser = argparse.ArgumentParser(prog="python -m router", description="Baton's router.")
    parser.add_argument("--model", help="checkpoint directory or hub id of the tokenizer")
    parser.add_argument("--model-name", help="what clients call the model")
    parser.add_argument("--listen", help="host:port; port 0 takes a free one")
    parser.add_argument("--http", help="host:port of the OpenAI API; none unless given")
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument(
        "--placement",
        type=PlacementPolicy,
        metavar="|".join(policy.value for policy in PlacementPolicy),
        help="how workers are chosen",
    )
    parser.add_argument("--drain-grace", type=float, metavar="SECONDS")
    given = parser.parse_args(arguments)
    host, port = None, None
    if given.listen is not None:
        host, colon, number = given.listen.rpartition(":")
        if not colon or not number.isdigit():
            parser.error(f"--listen must be host:port, not {given.listen!r}")
        port = int(number)
    return RouterSettings.from_env(
        os.environ,
        model=given.model,
        model_name=given.model_name,
        host=host or None,
        port=port,
        metrics_port=given.metrics_port,
        http_listen=given.http,
        drain_grace_s=given.drain_grace,
        placement=given.placement,
    )


if __name__ == "__main__":
    main()
