"""Declares the commands. Each one's module is imported when the command runs or its help is shown."""

from typing import Annotated

import typer

from baton import __version__
from baton.cli import bench, chat, demo, fleet, generate, keys, serve, top

EPILOG = "Start with [bold]baton serve[/], then in another terminal [bold]baton chat[/]."

app = typer.Typer(
    name="baton",
    help="Serve language models over gRPC, with prefill and decode on different workers.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if value:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve language models over gRPC, with prefill and decode on different workers."""


app.command()(serve.serve)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(demo.demo)
app.command()(top.top)
app.command()(bench.bench)
app.add_typer(fleet.fleet, name="fleet")
app.add_typer(keys.app, name="keys")
