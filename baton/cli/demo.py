"""`baton demo`: starts `baton serve` on free ports, asks it several questions at once, shows what happened to each, and compares with a
single process. Nothing is left running.
"""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import typer
from rich.console import Console

from baton.cli.config import shipped_model
from baton.cli.console import EXIT_FAILED, reported, seconds, stdout
from baton.cli.demo_examples import Question, load_questions
from baton.cli.demo_view import AnswerBoard, Asked, timelines
from baton.client import AsyncClient, Result
from baton.engine.config import EngineConfig
from baton.engine.cores import usable_cores
from baton.errors import InternalError

DTYPE = "float32"
"""Exact on every CPU, so that equality of tokens means equality."""
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def demo(
    *,
    questions: Annotated[
        int, typer.Option("--questions", "-q", min=1, max=48, help="How many to ask at once.")
    ] = 8,
    prefill: Annotated[int, typer.Option("--prefill", "-p", min=0, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option("--decode", "-d", min=1, help="Decode workers.")] = 1,
    transport: Annotated[str, typer.Option(help="ray or memory.")] = "ray",
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first question.")] = 1,
) -> None:
    """Watch prefill and decode work in different processes.

    Starts a server on free ports, asks the shipped model several questions
    at once, and shows the answers as they stream, each request's timeline,
    and whether a single process gives the same tokens. Exits with 1 where
    it does not.

    [bold]Examples[/]

      baton demo

      baton demo --questions 12 --prefill 2 --decode 2

      baton demo --temperature 0.8 --seed 5
    """
    with reported(asking=False):
        asked = load_questions(
            shipped_model() / "examples.json", questions, temperature=temperature, seed=seed
        )
        fleet = ["--prefill", str(prefill), "--decode", str(decode), "--transport", transport]
        same = asyncio.run(_demo(stdout(), asked, fleet))
    if not same:
        raise typer.Exit(EXIT_FAILED)


async def _demo(console: Console, questions: Sequence[Question], fleet: Sequence[str]) -> bool:
    console.rule("[bold]1  Serve[/]", align="left", style="dim")
    async with _serving(fleet) as address:
        console.rule(
            f"[bold]2  Ask {len(questions)} questions at once[/]", align="left", style="dim"
        )
        asked = await _ask_all(console, address, questions)
        console.rule("[bold]3  Where the time went[/]", align="left", style="dim")
        console.print(timelines(asked, console.width))
        console.rule("[bold]4  Drain and stop[/]", align="left", style="dim")
    console.print("The server has drained and stopped.")
    console.rule("[bold]5  The same in a single process[/]", align="left", style="dim")
    return _compare(console, asked)


@asynccontextmanager
async def _serving(fleet: Sequence[str]) -> AsyncIterator[str]:
    """Runs `baton serve` as a child inside the context; yields its address. Raises `InternalError` where it fails to start or to stop
    cleanly.
    """
    command = [
        "-m",
        "baton",
        "serve",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--dtype",
        DTYPE,
        *fleet,
    ]
    server = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            address = await _address(server)
        yield address
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await server.wait()
            except TimeoutError:
                server.kill()
                await server.wait()
    if server.returncode:
        raise InternalError(f"baton serve ended with exit code {server.returncode}")


async def _address(server: asyncio.subprocess.Process) -> str:
    assert server.stdout is not None
    async for line in server.stdout:
        word, _, address = line.decode().strip().partition(" ")
        if word == "ready":
            return address
    raise InternalError(f"baton serve did not start (exit code {await server.wait()})")


async def _ask_all(console: Console, address: str, questions: Sequence[Question]) -> list[Asked]:
    board = AnswerBoard(console, questions)
    began_s = time.monotonic()

    async def ask(client: AsyncClient, question: Question) -> Asked:
        sent_s = time.monotonic() - began_s
        async with client.generate(
            question.messages, sampling=question.sampling, timeout_s=ANSWER_TIMEOUT_S
        ) as stream:
            async for chunk in stream:
                board.add(question, chunk.text)
        board.finish(question)
        return Asked(question, stream.result, sent_s)

    async with AsyncClient(address) as client:
        await client.model()  # connects, so that the first question's time is its own
        began_s = time.monotonic()
        with board.showing():
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(client, question)) for question in questions]
    return [task.result() for task in tasks]


def _compare(console: Console, asked: Sequence[Asked]) -> bool:
    from baton.cli.demo_check import single_process_tokens  # noqa: PLC0415 - imports torch

    began_s = time.monotonic()
    config = EngineConfig(model=str(shipped_model()), dtype=DTYPE, threads=usable_cores())
    single = single_process_tokens(config, [each.question for each in asked])
    differing = [each for each in asked if each.result.token_ids != single[each.question.number]]
    for each in differing:
        console.print(
            f"[bold red]differs[/]: question {each.question.number}: "
            f"{_first_difference(each.result, single[each.question.number])}"
        )
    tokens = sum(len(each.result.token_ids) for each in asked)
    right = sum(each.question.is_right(each.result.text) for each in asked)
    console.print(
        f"One engine, no split: computed in {seconds(time.monotonic() - began_s)}, model load included."
    )
    if not differing:
        console.print(
            f"[bold green]identical[/]: all {tokens} tokens of {len(asked)} answers are the same."
        )
    console.print(f"{right} of {len(asked)} answers are right.\n")
    return not differing


def _first_difference(result: Result, single: Sequence[int]) -> str:
    pairs = zip(result.token_ids, single, strict=False)
    at = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(result.token_ids), len(single))
    )
    return f"split {result.token_ids[at : at + 5]}, single {tuple(single[at : at + 5])} from position {at} on"
