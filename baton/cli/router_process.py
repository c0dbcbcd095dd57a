"""The router as a child process of `baton serve`: started, restarted when it dies, and stopped by SIGTERM, which makes it drain.

All methods run on the serve process's event loop, in its main thread: the kernel ties the child to the thread that started it.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from baton.cli import leash
from baton.cli.backoff import Backoff
from baton.cli.banner import Announcer
from baton.cli.config import ServeConfig
from baton.errors import UnavailableError

STOP_SLACK_S = 10.0
"""Beyond its drain grace, a router that is still there is killed."""


class RouterProcess:
    """One router at a fixed port."""

    def __init__(self, config: ServeConfig, announcer: Announcer) -> None:
        self._config = config
        self._announcer = announcer
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts the process; it listens a little later."""
        # A session of its own: Ctrl-C in the terminal must reach the parent only, which then drains in order.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(leash.__file__)),
            "router",
            env=environment(self._config),
            start_new_session=True,
        )

    async def listening(self) -> None:
        """Returns once it accepts connections. Raises `UnavailableError` where it ends before."""
        assert self._process is not None
        host, _, port = self._config.address.rpartition(":")
        while self._process.returncode is None:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return
        raise UnavailableError(f"the router did not start (exit code {self._process.returncode})")

    async def keep_alive(self) -> None:
        """Starts the router again whenever it dies; cancelled before `stop`."""
        backoff = Backoff()
        while True:
            assert self._process is not None
            began_s = time.monotonic()
            code = await self._process.wait()
            pause_s = backoff.after(time.monotonic() - began_s)
            self._announcer.event(
                f"the router died (exit code {code}); starting it again in {pause_s:.1f} s",
                style="yellow",
            )
            await asyncio.sleep(pause_s)
            await self.start()

    async def stop(self, grace_s: float) -> None:
        """Lets it drain for its own grace, then makes sure that it is gone. Without a grace, it is killed; so
        it is where the caller is cancelled. Idempotent.
        """
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            if grace_s:
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(grace_s + STOP_SLACK_S):
                    await process.wait()
        except TimeoutError:
            self._announcer.event("the router does not stop; killing it", style="yellow")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def environment(config: ServeConfig) -> dict[str, str]:
    """The router's settings, as `RouterSettings.from_env` reads them, on top of this process's environment."""
    chosen = {
        "BATON_HOST": config.host,
        "BATON_PORT": str(config.port),
        "BATON_METRICS_PORT": str(config.metrics_port),
        "BATON_DRAIN_GRACE_S": str(config.drain_grace_s),
        "BATON_LOG_FORMAT": config.log_format.value,
        "BATON_LOG_LEVEL": config.log_level.value,
        "BATON_MODEL": config.tokenizer,
        "BATON_FLEET_LISTEN": config.fleet_address,
    }
    if config.local_prefill_tokens is not None:
        chosen["BATON_LOCAL_PREFILL_TOKENS"] = str(config.local_prefill_tokens)
    if config.http:
        chosen["BATON_HTTP_LISTEN"] = config.http
    if config.drawn_port:
        # Nobody would find a file by this port again.
        chosen["BATON_SESSION_STORE"] = os.environ.get("BATON_SESSION_STORE", "sqlite://")
    if config.placement is not None:
        chosen["BATON_PLACEMENT"] = config.placement.value
    return os.environ | chosen
