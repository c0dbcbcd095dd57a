"""`baton bench`: a load generator for Baton and for any server with OpenAI's API."""

from pathlib import Path
from typing import Annotated

import typer

from baton.bench.figures import parse_slos
from baton.bench.prompts import PromptKind
from baton.bench.target import Options
from baton.cli.bench_options import DEFAULT_ISL, DEFAULT_OSL, DEFAULT_REQUESTS, BenchOptions
from baton.cli.bench_run import Output, measure, show_again
from baton.cli.console import reported
from baton.cli.options import Address
from baton.errors import FieldViolation, InvalidRequestError

SERVER, LOAD, REQUESTS, OUTPUT = "Server", "Load", "Requests", "Output"


def bench(
    goodput_too: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="tpot:MS")] = None,
    *,
    address: Address = "127.0.0.1:50051",
    url: Annotated[
        str | None,
        typer.Option(
            help="A server with OpenAI's HTTP API instead: http://HOST:PORT.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Its name.", show_default="the one served", rich_help_panel=SERVER
        ),
    ] = "",
    connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="gRPC connections to share the requests. Over HTTP each has its own.",
            rich_help_panel=SERVER,
        ),
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option(min=0.001, help="Seconds for each request.", rich_help_panel=SERVER),
    ] = 600.0,
    give_up: Annotated[
        float,
        typer.Option(
            min=0,
            help="Stop once the server has been unreachable for so many seconds.",
            rich_help_panel=SERVER,
        ),
    ] = 10.0,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            "-c",
            help="Closed-loop: so many requests at once; a list such as 1,2,4,8 is a sweep.",
            show_default="1",
            rich_help_panel=LOAD,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            "-r",
            help="Open-loop: so many requests a second, whatever the server does; a list is a sweep. Arrivals are Poisson.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --rate: gaps of a gamma distribution of this shape; below 1 in bursts, above 1 evenly.",
            show_default="1, which is Poisson",
            rich_help_panel=LOAD,
        ),
    ] = None,
    fixed_rate: Annotated[
        bool, typer.Option("--fixed-rate", help="With --rate: equal gaps.", rich_help_panel=LOAD)
    ] = False,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --rate or --trace: most at once; others wait, and their wait counts as due.",
            show_default="no limit",
            rich_help_panel=LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay a trace: Mooncake's JSON lines, or an Azure LLM inference CSV.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    speed: Annotated[
        float,
        typer.Option(min=1e-6, help="Replay so many times as fast.", rich_help_panel=LOAD),
    ] = 1.0,
    length_scale: Annotated[
        float,
        typer.Option(
            min=1e-6,
            help="Of a trace's prompts, answers and shared blocks: 0.1 makes 1,000 tokens 100.",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            min=1,
            help="Of each level.",
            show_default=f"{DEFAULT_REQUESTS} without --duration and --trace",
            rich_help_panel=LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds of each level after which no request is due.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that running requests get after that.", rich_help_panel=LOAD
        ),
    ] = 30.0,
    warmup: Annotated[
        int,
        typer.Option(
            min=0,
            help="Requests before the first level, which no figure contains.",
            rich_help_panel=LOAD,
        ),
    ] = 0,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Of arrivals, lengths and prompts: the same load.", rich_help_panel=LOAD
        ),
    ] = 0,
    isl: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each prompt: N, uniform:LOW:HIGH, normal:MEAN:SD, lognormal:MEAN:SD.",
            show_default=DEFAULT_ISL,
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    osl: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each answer, likewise.",
            show_default=DEFAULT_OSL,
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts from a file, over and over: one a line, or .jsonl with `prompt` or `messages`.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    prompt_as: Annotated[
        PromptKind | None,
        typer.Option(
            help="How prompts travel.",
            show_default="chat over HTTP; over gRPC tokens, or text where a tokenizer or a file is named",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The served model's directory or hub id, to write text of so many tokens.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers that are as long as they may be.",
            show_default="yes, but not with --prompts",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            help="0 is greedy.",
            show_default="the server's",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ttft:MS tpot:MS",
            help="Objectives: count the requests that meet all of them. Also itl:MS, the same as tpot, and e2e:MS.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write figures and raw data of every request; - is standard output.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw pictures.", rich_help_panel=OUTPUT)
    ] = None,
    from_json: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Show what an earlier --json has, with these objectives and plots; asks no server.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure a server under load.

    TTFT is the time from sending a request to the first part of its
    answer, E2E to the last one, ITL = (E2E - TTFT) / (output tokens - 1)
    of each request (elsewhere TPOT), ICL the gaps between parts. Throughput
    is what was answered, over the time from the first send to the last
    part. These are AIPerf's formulas. "Since due" counts from when a
    request had to be sent, so that no wait is hidden.

    Ctrl-C shows what there is so far. The API key and certificates come
    from the environment, as for the other commands.

    [bold]Examples[/]

      baton bench --concurrency 1,2,4,8 -n 200 --isl 512 --osl 64 --plots out

      baton bench --rate 10 --duration 60 --warmup 10 --goodput ttft:200 tpot:20

      baton bench --trace conversation_trace.jsonl --speed 2 --json run.json

      baton bench --url http://127.0.0.1:8000 --tokenizer ./model -c 8
    """
    with reported():
        if goodput_too and not goodput:
            raise InvalidRequestError(FieldViolation(goodput_too[0], "is no option"))
        slos = parse_slos([*(goodput or ()), *(goodput_too or ())], "--goodput")
        output = Output(slos=slos, json_file=json_file, plots=plots)
        if from_json is not None:
            show_again(from_json, output)
            return
        options = BenchOptions(
            address=address,
            url=url,
            connections=connections,
            rate=rate,
            burstiness=burstiness,
            fixed_rate=fixed_rate,
            max_concurrency=max_concurrency,
            concurrency=concurrency,
            trace=trace,
            speed=speed,
            length_scale=length_scale,
            requests=requests,
            duration_s=duration,
            grace_s=grace,
            warm_up=warmup,
            seed=seed,
            give_up_s=give_up,
            isl=isl,
            osl=osl,
            prompts=prompts,
            prompt_as=prompt_as,
            tokenizer=tokenizer,
        )
        asked = Options(
            model=model,
            ignore_eos=(prompts is None) if ignore_eos is None else ignore_eos,
            temperature=temperature,
            timeout_s=timeout,
        )
        code = measure(options, asked, output)
    if code:
        raise typer.Exit(code)
