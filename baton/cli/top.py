"""`baton top`: a router and its fleet, watched in the terminal, or told once."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.console import reported, stdout
from baton.cli.watch.plain import plain
from baton.cli.watch.source import StatusSource
from baton.errors import FieldViolation, InvalidRequestError
from baton.service.settings import ClientSettings
from router.status.snapshot import SNAPSHOT

WIDE = 160
"""Columns of plain text: a line for a request should stay one."""


def top(
    *,
    url: Annotated[
        str,
        typer.Option(
            "--url", "-u", envvar="BATON_URL", help="The router's HTTP port, http:// or https://."
        ),
    ] = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.2, help="Seconds from one look to the next.")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Tell it once, as text, and end; so it is where output is no terminal."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: the router's JSON, for scripts.")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Holds the API key.", show_default="the key in BATON_API_KEY, if any"),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="PEM certificates to trust.",
            show_default="those of BATON_CLIENT_CA_FILE, or the system's",
        ),
    ] = None,
) -> None:
    """Watch a router: workers, requests, sessions, latencies.

    The router must have an HTTP port (--http of baton serve). An
    administrator's key shows everything, a tenant's what is its own.

    [bold]Keys[/]  tab or 1 2 3: tables; s: sort by the next column, r: the other
    way round (or click a heading); p: pause; d: light or dark; q: quit

    [bold]Examples[/]

      baton top

      baton top --url https://router:8443 --ca-file ca.pem

      baton top --once --json | jq .traffic.ttft.p99_s
    """
    with reported(asking=False):
        if as_json and not once:
            raise InvalidRequestError(FieldViolation("--json", "needs --once"))
        settings = _settings(key_file, ca_file)
        if once or not sys.stdout.isatty():
            asyncio.run(_tell_once(url, settings, as_json=as_json))
        else:
            asyncio.run(_watch(url, settings, interval))


async def _tell_once(url: str, settings: ClientSettings, *, as_json: bool) -> None:
    async with StatusSource(url, settings) as source:
        content = await source.fetch_json()
    if as_json:
        print(content.decode())
        return
    console = stdout()
    if not console.is_terminal:
        console.width = max(WIDE, console.width)
    for each in plain(SNAPSHOT.validate_json(content)):
        console.print(each)


async def _watch(url: str, settings: ClientSettings, interval_s: float) -> None:
    # Textual is not to be waited for by who only wants a line of JSON.
    from baton.cli.watch.screen import Top  # noqa: PLC0415

    async with StatusSource(url, settings) as source:
        await Top(source, interval_s=interval_s).run_async()


def _settings(key_file: Path | None, ca_file: Path | None) -> ClientSettings:
    settings = ClientSettings.from_env(os.environ)
    if ca_file is not None:
        settings = replace(settings, client_ca_file=str(ca_file))
    if key_file is not None:
        try:
            settings = replace(settings, api_key=key_file.read_text().strip())
        except (OSError, UnicodeError) as error:
            raise InvalidRequestError(FieldViolation("--key-file", str(error))) from None
    return settings
