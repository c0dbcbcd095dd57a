"""What the split itself costs at so many streams: tokens a second and CPU time per token. All run behind their routers, and are loaded in
turn, closed-loop.

    single   one worker, with a thread for each core
    split    a prefill and a decode worker, as `baton serve` starts them: each has all cores while the other rests
    halved   the same, each with half of the cores' threads and no more

    python -m benchmarks.serve.split [--models qwen smollm2 sim] [--streams 16] [--rounds 5]

CPU time is that of all processes, also on a machine that has other work. What is beside the engines' threads is the router, gRPC and Ray:
the split's own share is what it takes of that beyond a single worker, of all that this one takes. The engines' threads take more too:
prompts are computed apart from generation, so that weights are read for both, and KV is copied out of one pool and into another. With
the model `sim` a step takes a fixed time and no core: what is lost there is lost to waiting.
"""

import argparse
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from baton.cli.bench_options import BenchOptions
from benchmarks.report import write_report
from benchmarks.serve.loading import Loaded, put_load
from benchmarks.serve.models import CACHE, NAMES, model_directory, model_flags
from benchmarks.serve.systems import running_baton


def measure(args: argparse.Namespace, model: str) -> dict[str, list[dict[str, Any]]]:
    """Samples of all systems, one for each round after the first, which warms them up."""
    flags = [*model_flags(model, args.cache), "--no-prefix-cache", "--transport", "ray"]
    threads = args.threads or len(os.sched_getaffinity(0))
    systems = {
        "single": ["--prefill", "0", "--decode", "1", "--threads", str(threads)],
        "split": ["--prefill", "1", "--decode", "1", "--threads", str(threads)],
        "halved": ["--prefill", "1", "--decode", "1", "--threads", str(max(1, threads // 2))],
    }
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(running_baton([*flags, *each]))
            for name, each in systems.items()
        }
        for number in range(args.rounds + 1):
            options = BenchOptions(
                concurrency=str(args.streams),
                requests=args.requests,
                isl=str(args.isl),
                osl=str(args.osl),
                seed=number,
            )
            for name in sorted(servers, reverse=bool(number % 2)):
                tokenizer = str(model_directory(model, args.cache))
                (loaded,) = put_load(servers[name], options, tokenizer=tokenizer)
                if number:
                    samples[name].append(_sample(loaded))
    return samples


def _sample(loaded: Loaded) -> dict[str, Any]:
    figures = loaded.figures()
    assert figures.itl_s is not None
    assert figures.ttft_s is not None
    return {
        "failed": figures.failed,
        "tokens_per_s": round(figures.output_tokens_per_s, 1),
        "ttft_p50_ms": round(figures.ttft_s.p50 * 1e3, 2),
        "itl_p50_ms": round(figures.itl_s.p50 * 1e3, 2),
        "itl_p99_ms": round(figures.itl_s.p99 * 1e3, 2),
        "cpu_us_per_token": round(sum(loaded.cpu_us_per_token.values()), 1),
        "by_process": {k: round(v, 1) for k, v in loaded.cpu_us_per_token.items()},
    }


def summarized(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and what each has of the single worker's: the median over pairs of one round."""
    median: dict[str, Any] = {
        name: {
            field: statistics.median(s[field] for s in taken)
            for field in taken[0]
            if field != "by_process"
        }
        | {
            "by_process": {
                kind: statistics.median(s["by_process"].get(kind, 0.0) for s in taken)
                for kind in taken[0]["by_process"]
            }
        }
        for name, taken in samples.items()
    }
    for name, taken in samples.items():
        pairs = list(zip(taken, samples["single"], strict=True))
        for field in ("tokens_per_s", "cpu_us_per_token"):
            ratio = statistics.median(a[field] / b[field] for a, b in pairs)
            median[name][f"{field}_ratio"] = round(ratio, 4)
        own = statistics.median(
            (_beside_engines_us(a) - _beside_engines_us(b)) / b["cpu_us_per_token"]
            for a, b in pairs
        )
        median[name]["own_share"] = round(own, 4)
    return median


def _beside_engines_us(sample: dict[str, Any]) -> float:
    used: dict[str, float] = sample["by_process"]
    return sum(us for kind, us in used.items() if kind != "engines")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["qwen", "smollm2", "sim"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="of each round")
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: one for each core")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_split.json"))
    args = parser.parse_args()
    raw: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for model in args.models:
        raw[model] = measure(args, model)
        summary[model] = found = summarized(raw[model])
        for name, row in found.items():
            print(
                f"{model:8} {name:7} {row['tokens_per_s']:8.1f} tokens/s ({row['tokens_per_s_ratio']:.1%})  "
                f"ITL p50 {row['itl_p50_ms']:7.2f} ms  {row['cpu_us_per_token']:8.0f} us of CPU a token "
                f"({row['cpu_us_per_token_ratio']:.1%}, of its own {row['own_share']:+.1%}) {row['by_process']}"
            )
    told = {k: v for k, v in vars(args).items() if k not in ("out", "cache")}
    write_report(args.out, settings=told, raw=raw, summary=summary)


if __name__ == "__main__":
    main()
