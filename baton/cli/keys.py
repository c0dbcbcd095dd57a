"""`baton keys`: makes, lists and revokes the API keys of a router's keys file. Running routers read the file when it changes."""

from typing import Annotated

import typer
from rich.table import Table

from baton.cli.console import reported, stderr, stdout
from baton.service.keys import TenantLimits, add_key, load_keys, new_key, remove_key

app = typer.Typer(
    help="Make, list and revoke API keys.", no_args_is_help=True, rich_markup_mode="rich"
)

File = Annotated[
    str,
    typer.Option(
        "--file",
        "-f",
        envvar="BATON_API_KEYS_FILE",
        help="The keys file; routers read the one in BATON_API_KEYS_FILE.",
    ),
]


@app.command()
def create(
    tenant: Annotated[
        str, typer.Argument(help="Who will use the key; a tenant may have several keys.")
    ],
    *,
    file: File,
    max_running: Annotated[
        int | None, typer.Option(help="Requests served at once.", show_default="no limit")
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(help="Prompt and output tokens a second.", show_default="no limit"),
    ] = None,
    burst_tokens: Annotated[
        int | None, typer.Option(help="Tokens at once after a rest.", show_default="no limit")
    ] = None,
    weight: Annotated[float, typer.Option(help="Share beside other tenants'.")] = 1.0,
    max_priority: Annotated[
        int | None, typer.Option(help="Highest priority.", show_default="no limit")
    ] = None,
    private_cache: Annotated[
        bool, typer.Option("--private-cache", help="Share no prompt's KV with other tenants.")
    ] = False,
    admin: Annotated[
        bool, typer.Option("--admin", help="May see the fleet's workers and administer it.")
    ] = False,
) -> None:
    """Make a key and print it: this once, for the file holds a hash only.

    [bold]Examples[/]

      baton keys create acme --file keys.json --max-running 8 --tokens-per-s 2000
    """
    limits = TenantLimits(
        max_running=max_running,
        tokens_per_s=tokens_per_s,
        burst_tokens=burst_tokens,
        weight=weight,
        max_priority=max_priority,
    )
    with reported(asking=False):
        entry, key = new_key(tenant, limits=limits, is_admin=admin, private_cache=private_cache)
        add_key(file, entry)
        print(key)
        stderr().print(f"Key {entry.id} of tenant {tenant}. It cannot be shown again.", style="dim")


@app.command("list")
def list_(*, file: File) -> None:
    """List the keys: whose they are and what they may, not the keys themselves."""
    with reported(asking=False):
        table = Table("id", "tenant", "created", "rights", "limits", box=None)
        for key in load_keys(file).keys:
            rights = [
                name
                for name, has in (("admin", key.is_admin), ("private cache", key.private_cache))
                if has
            ]
            table.add_row(key.id, key.tenant, key.created, ", ".join(rights), _text(key.limits))
        stdout().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `baton keys list` shows it.")], *, file: File
) -> None:
    """Take a key out of the file. Calls that run go on; the next one fails."""
    with reported(asking=False):
        remove_key(file, key_id)
        stderr().print(f"Key {key_id} is revoked.", style="dim")


def _text(limits: TenantLimits) -> str:
    named = {
        "max running": limits.max_running,
        "tokens/s": limits.tokens_per_s,
        "burst": limits.burst_tokens,
        "weight": None if limits.weight == 1 else limits.weight,
        "max priority": limits.max_priority,
    }
    return ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None)
