"""`baton generate`: one prompt in, streamed text out."""

import dataclasses
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.connect import connected
from baton.cli.console import delays_told, reported, seconds, size, stderr
from baton.cli.options import (
    Address,
    MaxTokens,
    MinP,
    Seed,
    Stop,
    Temperature,
    Timeout,
    TopK,
    TopP,
)
from baton.client import ChatMessage, Prompt, Result, SamplingOptions, Stream
from baton.errors import FieldViolation, InvalidRequestError


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; '-' or nothing reads standard input."),
    ] = None,
    *,
    address: Address = "127.0.0.1:50051",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user's message, through the chat template."
        ),
    ] = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1 discourages repeats.", show_default="1"),
    ] = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            help="With --json: log-probabilities and so many alternatives.",
            show_default="none",
        ),
    ] = None,
    timeout: Timeout = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole result as JSON instead of streaming.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Afterwards, tell on stderr where the time went.")
    ] = False,
) -> None:
    """Continue a text with the served model.

    [bold]Examples[/]

      baton generate "Once upon a time" -n 64

      baton generate --chat -t 0 --stats "Nora's hat was red. What colour was Nora's hat?"

      baton generate --seed 7 --stop "." < story.txt

      baton generate "Hello" --json --logprobs 3 | jq .token_ids
    """
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    with reported(), delays_told(), connected(address) as client:
        text = _read(prompt, file)
        whole: Prompt = [ChatMessage("user", text)] if chat else text
        with client.generate(whole, sampling=sampling, timeout_s=timeout) as stream:
            result = stream.read() if as_json else _print_stream(stream)
        if as_json:
            print(json.dumps(dataclasses.asdict(result), default=_plain, ensure_ascii=False))
        if stats:
            stderr().print(summary(result), style="dim", soft_wrap=True)


def _read(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(FieldViolation(str(file), str(error))) from error
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            stderr().print("Reading the prompt from the terminal; end it with Ctrl-D.", style="dim")
        return sys.stdin.read()
    return prompt


def _print_stream(stream: Stream) -> Result:
    for chunk in stream:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return stream.result


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(type(value).__name__)


def summary(result: Result) -> str:
    """Where the time of a request went, in two lines."""
    usage, timings = result.usage, result.timings
    total_s, first_s = timings.finished_at_s, timings.first_token_at_s
    rate = ""
    if total_s is not None and first_s is not None and usage.completion_tokens > 1:
        rate = f", {(usage.completion_tokens - 1) / max(total_s - first_s, 1e-9):.0f} tokens/s after it"
    workers = result.attempts[-1] if result.attempts else None
    path = (
        ""
        if workers is None
        else f"{workers.prefill_worker or '(no prefill worker)'} to {workers.decode_worker}, "
    )
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} new, {result.finish_reason.value}, seed {result.seed}\n"
        f"first token after {seconds(first_s)}{rate}, {seconds(total_s)} in all; "
        f"{path}handoff {size(timings.handoff_bytes)} in {seconds(timings.handoff_s)}, "
        f"{len(result.attempts)} attempt(s)"
    )
