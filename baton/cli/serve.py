"""`baton serve`: router and workers on this machine."""

from typing import Annotated

import typer

from baton.cli.config import Device, Kernels, ServeConfig, Transport, shipped_model, with_ports
from baton.cli.console import EXIT_FAILED, reported
from baton.cli.serving import run
from baton.engine.config import EngineConfig, default_batch_tokens
from baton.engine.cores import usable_cores
from baton.engine.sim import EngineKind, simulated
from baton.errors import FieldViolation, InvalidRequestError
from baton.kv.spec import KVDtype, WeightFormat
from baton.service.settings import LogFormat, LogLevel, PlacementPolicy

MODEL = "Model"
FLEET = "Fleet"
SERVER = "Server"


def serve(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A Hugging Face directory or hub id.",
            show_default="the small model that ships with Baton",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Annotated[
        KVDtype | None,
        typer.Option(
            help="Of activations and KV.",
            show_default="the checkpoint's; float32 for the shipped model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    kernels: Annotated[
        Kernels | None,
        typer.Option(
            help="What computes on a CPU.",
            show_default="native where the processor and the model allow it",
            rich_help_panel=MODEL,
        ),
    ] = None,
    prefill_weights: Annotated[
        WeightFormat | None,
        typer.Option(
            help="How prefill workers keep the weights.",
            show_default="in the dtype",
            rich_help_panel=MODEL,
        ),
    ] = None,
    decode_weights: Annotated[
        WeightFormat | None,
        typer.Option(
            help="How decode workers keep the weights.",
            show_default="in the dtype",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="What computes.", rich_help_panel=MODEL)
    ] = Device.CPU,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Longest sequence in tokens.", show_default="the model's", rich_help_panel=MODEL
        ),
    ] = None,
    engine: Annotated[
        EngineKind,
        typer.Option(
            help="sim answers without a model, from a simulated engine: for trying out everything else.",
            rich_help_panel=MODEL,
        ),
    ] = EngineKind.TORCH,
    step_ms: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --engine sim: milliseconds that each step takes.",
            rich_help_panel=MODEL,
        ),
    ] = 0.0,
    prefill: Annotated[
        int,
        typer.Option(
            "--prefill",
            "-p",
            min=0,
            help="Prefill workers; 0 leaves prompts to the decode workers.",
            rich_help_panel=FLEET,
        ),
    ] = 1,
    decode: Annotated[
        int, typer.Option("--decode", "-d", min=1, help="Decode workers.", rich_help_panel=FLEET)
    ] = 1,
    transport: Annotated[
        Transport | None,
        typer.Option(
            help="ray: a process for each worker, KV through the object store. memory: everything in this process.",
            show_default="ray, or memory without prefill workers",
            rich_help_panel=FLEET,
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV pool of each worker, in tokens.",
            show_default="sized from memory",
            rich_help_panel=FLEET,
        ),
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens in a KV block.", rich_help_panel=FLEET)
    ] = 16,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens in one step: the prefill chunk.",
            show_default="512; on CUDA 8192, without prefill workers 2048",
            rich_help_panel=FLEET,
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Most sequences in one step.", rich_help_panel=FLEET)
    ] = 64,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each worker.",
            show_default="the cores, shared out by who computes",
            rich_help_panel=FLEET,
        ),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse the KV of shared prefixes.",
            rich_help_panel=FLEET,
        ),
    ] = True,
    kv_cache: Annotated[
        bool,
        typer.Option(
            "--kv-cache/--no-kv-cache",
            help="Off recomputes every token in each step; needs --prefill 0.",
            rich_help_panel=FLEET,
        ),
    ] = True,
    local_prefill_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Decode computes prompts itself when it lacks at most so many tokens of them.",
            show_default="the router's default",
            rich_help_panel=FLEET,
        ),
    ] = None,
    placement: Annotated[
        PlacementPolicy | None,
        typer.Option(
            help="How the router chooses workers.",
            show_default="prefix-aware",
            rich_help_panel=FLEET,
        ),
    ] = None,
    object_store_mib: Annotated[
        int | None,
        typer.Option(
            min=128,
            help="Size of Ray's object store.",
            show_default="sized from memory",
            rich_help_panel=FLEET,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The router's port; 0 takes a free one.", rich_help_panel=SERVER)
    ] = 50051,
    http: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve the OpenAI API there too, with /health, /ready and /metrics; port 0 takes a free one.",
            show_default="no HTTP",
            rich_help_panel=SERVER,
        ),
    ] = "",
    metrics_port: Annotated[
        int,
        typer.Option(
            help="The router's Prometheus port; 0 takes a free one.", rich_help_panel=SERVER
        ),
    ] = 9464,
    drain_grace: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that running requests get after a stop signal.",
            rich_help_panel=SERVER,
        ),
    ] = 30.0,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="One JSON object a line.", rich_help_panel=SERVER)
    ] = False,
    log_level: Annotated[
        LogLevel,
        typer.Option(help="Least severe lines of the services' logs.", rich_help_panel=SERVER),
    ] = LogLevel.WARNING,
) -> None:
    """Serve a model on this machine: router, prefill workers, decode workers.

    When everything answers, a line "ready HOST:PORT" goes to standard
    output, unless that is a terminal. Ctrl-C or SIGTERM drains: running
    requests finish, then nothing is left running. A second signal stops
    at once.

    [bold]Examples[/]

      baton serve

      baton serve --model ./SmolLM2-135M --dtype bfloat16 --prefill 2 --decode 2

      baton serve --decode-weights int8         [dim]# prompts in the dtype[/]

      baton serve --prefill 0 --decode 1        [dim]# one engine, no handoff[/]

      baton serve --transport memory --port 0   [dim]# one process, any free port[/]

      baton serve --http 127.0.0.1:8000         [dim]# for OpenAI's clients too[/]

      baton serve --engine sim --prefill 8 --decode 8 --transport memory
    """
    with reported(asking=False):
        if step_ms and engine is not EngineKind.SIM:
            raise InvalidRequestError(
                FieldViolation("--step-ms", "has no meaning without --engine sim")
            )
        if not kv_cache and prefill > 0:
            raise InvalidRequestError(
                FieldViolation("--no-kv-cache", "has nothing to hand over: add --prefill 0")
            )
        if prefill_weights is not None and not prefill:
            raise InvalidRequestError(
                FieldViolation("--prefill-weights", "has no meaning without prefill workers")
            )
        source = model if model is not None else str(shipped_model())
        # Half precision saves memory, which the shipped model has no need of, and costs speed on a CPU.
        kept = dtype or (KVDtype.FLOAT32 if model is None else None)
        cores = usable_cores()
        chosen = EngineConfig(
            model=source,
            dtype=kept and kept.value,
            device=device.value,
            block_size_tokens=block_size,
            kv_pool_tokens=kv_tokens,
            max_batch_tokens=max_batch_tokens
            or default_batch_tokens(device.value, prefills=prefill > 0),
            max_running=max_running,
            max_context_tokens=max_context,
            kernels=kernels and kernels.value,
            threads=threads or max(1, cores // (prefill + decode)),
            most_threads=threads or cores,
            prefix_cache=prefix_cache,
            kv_cache=kv_cache,
        )
        config = ServeConfig(
            engine=simulated(chosen, step_s=step_ms / 1000) if engine is EngineKind.SIM else chosen,
            tokenizer=source,
            prefill_weights=prefill_weights,
            decode_weights=decode_weights,
            prefill=prefill,
            decode=decode,
            transport=transport or (Transport.RAY if prefill else Transport.MEMORY),
            host=host,
            port=port,
            metrics_port=metrics_port,
            http=http,
            object_store_bytes=None if object_store_mib is None else object_store_mib * 2**20,
            local_prefill_tokens=local_prefill_tokens,
            placement=placement,
            drain_grace_s=drain_grace,
            log_format=LogFormat.JSON if json_logs else LogFormat.PLAIN,
            log_level=log_level,
        )
        clean = run(with_ports(config))
    if not clean:
        raise typer.Exit(EXIT_FAILED)
