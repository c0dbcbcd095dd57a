"""How Baton's cost grows, on simulated engines, whose steps take time but hardly a core: with streams, with context, with workers.

    streams     1 to 64 at once on one pair of workers
    context     prompts of 128 to 8,192 tokens
    workers     1 to 4 pairs, each with so many streams

    python -m benchmarks.serve.growth [--parts streams context workers] [--requests 3]

Costs are CPU time of all of Baton's processes, which other work on the machine changes little: linear growth is a flat line of cost for
each token. Whatever a run does not measure stays in the file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baton.cli.bench_options import BenchOptions
from benchmarks.report import write_report
from benchmarks.serve.loading import Loaded, put_load
from benchmarks.serve.models import CACHE, SIM, model_flags
from benchmarks.serve.plots import plot_growth
from benchmarks.serve.systems import running_baton

STREAMS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = (128, 256, 512, 1024, 2048, 4096, 8192)
WORKERS = (1, 2, 3, 4)
NEW_TOKENS = 64


def flags(args: argparse.Namespace, pairs: int = 1) -> list[str]:
    """Of `baton serve`."""
    return [
        *model_flags(SIM, args.cache, step_ms=args.step_ms),
        *("--transport", "ray", "--no-prefix-cache", "--threads", "1"),
        *("--max-context", "8448", "--kv-tokens", str(128 * 1024)),
        *("--prefill", str(pairs), "--decode", str(pairs)),
    ]


def by_streams(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of streams."""
    with running_baton(flags(args)) as server:
        for streams in STREAMS:
            options = BenchOptions(
                concurrency=str(streams),
                requests=max(8, args.requests * streams),
                isl="128",
                osl=str(NEW_TOKENS),
                warm_up=4,
                seed=streams,
            )
            (loaded,) = put_load(server, options)
            yield {"streams": streams} | _row(loaded)


def by_context(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length of prompts, four at once."""
    with running_baton(flags(args)) as server:
        for context in CONTEXT:
            options = BenchOptions(
                concurrency="4",
                requests=max(8, 4 * args.requests),
                isl=str(context),
                osl="8",
                warm_up=4,
                seed=context,
            )
            (loaded,) = put_load(server, options)
            figures = loaded.figures()
            cpu_s = sum(loaded.cpu_s.values())
            yield (
                {"context": context}
                | _row(loaded)
                | {
                    "cpu_ms_per_request": round(1e3 * cpu_s / figures.answered, 2),
                    "cpu_us_per_prompt_token": round(1e6 * cpu_s / figures.input_tokens, 3),
                    "handoff_p50_ms": _handoff_p50_ms(loaded),
                }
            )


def by_workers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of pairs, with as many streams for each pair."""
    for pairs in WORKERS:
        with running_baton(flags(args, pairs)) as server:
            options = BenchOptions(
                concurrency=str(args.streams_per_pair * pairs),
                requests=args.requests * args.streams_per_pair * pairs,
                isl="128",
                osl=str(NEW_TOKENS),
                warm_up=4 * pairs,
                seed=pairs,
            )
            (loaded,) = put_load(server, options)
            row = _row(loaded)
            per_pair = round(row["tokens_per_s"] / pairs, 1)
            yield {"workers": 2 * pairs, "pairs": pairs} | row | {"tokens_per_s_per_pair": per_pair}


PARTS = {"streams": by_streams, "context": by_context, "workers": by_workers}


def _row(loaded: Loaded) -> dict[str, Any]:
    figures = loaded.figures()
    assert figures.itl_s is not None
    assert figures.ttft_s is not None
    return {
        "failed": figures.failed,
        "tokens_per_s": round(figures.output_tokens_per_s, 1),
        "ttft_p50_ms": round(figures.ttft_s.p50 * 1e3, 2),
        "itl_p50_ms": round(figures.itl_s.p50 * 1e3, 3),
        "cpu_us_per_token": round(sum(loaded.cpu_us_per_token.values()), 1),
        "by_process": {k: round(v, 1) for k, v in loaded.cpu_us_per_token.items()},
    }


def _handoff_p50_ms(loaded: Loaded) -> float:
    took_s = sorted(
        record.timings.handoff_s
        for record in loaded.measured.records
        if record.timings is not None and record.timings.handoff_s is not None
    )
    return round(1e3 * took_s[len(took_s) // 2], 2)


def main() -> None:
    """Measures, prints, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--requests", type=int, default=3, help="of each stream")
    parser.add_argument("--streams-per-pair", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_growth.json"))
    args = parser.parse_args()
    summary: dict[str, Any] = (
        json.loads(args.out.read_text())["summary"] if args.out.exists() else {}
    )
    for part in args.parts:
        summary[part] = []
        for row in PARTS[part](args):
            summary[part].append(row)
            print(part, {k: v for k, v in row.items() if k != "by_process"}, flush=True)
    told = {k: v for k, v in vars(args).items() if k not in ("out", "cache", "parts")}
    write_report(args.out, settings=told, raw={}, summary=summary)
    plot_growth(summary, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
