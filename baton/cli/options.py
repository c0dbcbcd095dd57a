"""Options that several commands share."""

from typing import Annotated

import typer

Address = Annotated[
    str,
    typer.Option("--address", "-a", envvar="BATON_ADDRESS", help="host:port of the router."),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        help="Most tokens to generate.",
        show_default="what the context has left",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", help="0 is greedy; higher is more random.", show_default="1"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Sample from the likeliest tokens with this probability.", show_default="1"
    ),
]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest tokens; 0 is off.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="The same seed gives the same answer.", show_default="drawn by the server"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be given up to 16 times."),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", help="Give up after so many seconds.", show_default="none"),
]
