"""What a weight format for each role is worth: the time to the first token of a long prompt, and tokens a second of many streams, of fleets
that differ in nothing but the formats.

    bfloat16, int8     both roles in one format, behind one router
    one of each        prefill in bfloat16, decode in int8
    NAME, one worker   the same engine without a split, in one format

    python -m benchmarks.serve.formats [--model qwen] [--rounds 5]

All run side by side and are loaded in turn: first long prompts, one at a time, then streams. Each worker may use all cores while the other
rests.
"""

import argparse
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from baton.cli.bench_options import BenchOptions
from benchmarks.report import write_report
from benchmarks.serve.loading import put_load
from benchmarks.serve.models import CACHE, NAMES, model_directory, model_flags
from benchmarks.serve.systems import Server, running_baton

INT8_PREFILL, INT8_DECODE = ("--prefill-weights", "int8"), ("--decode-weights", "int8")
ONE_WORKER = ("--prefill", "0", "--decode", "1")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "bfloat16": (),
    "int8": (*INT8_PREFILL, *INT8_DECODE),
    "one of each": INT8_DECODE,
    "bfloat16, one worker": ONE_WORKER,
    "int8, one worker": (*ONE_WORKER, *INT8_DECODE),
}


def sample(server: Server, tokenizer: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One round on one system."""
    long = BenchOptions(
        concurrency="1", requests=args.prompts, isl=str(args.prompt_tokens), osl="2", seed=seed
    )
    many = BenchOptions(
        concurrency=str(args.streams),
        requests=3 * args.streams,
        isl="128",
        osl="128",
        seed=seed,
    )
    (prompts,) = put_load(server, long, tokenizer=tokenizer)
    (streams,) = put_load(server, many, tokenizer=tokenizer)
    first, rest = prompts.figures(), streams.figures()
    assert first.ttft_s is not None
    assert rest.itl_s is not None
    return {
        "prompt_ttft_p50_ms": round(first.ttft_s.p50 * 1e3, 1),
        "tokens_per_s": round(rest.output_tokens_per_s, 1),
        "itl_p50_ms": round(rest.itl_s.p50 * 1e3, 2),
        "failed": first.failed + rest.failed,
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="qwen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=3, help="of each round, one at a time")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_formats.json"))
    args = parser.parse_args()
    flags = [*model_flags(args.model, args.cache), "--no-prefix-cache", "--transport", "ray"]
    flags += ["--prefill", "1", "--decode", "1", "--threads", str(args.threads)]
    tokenizer = str(model_directory(args.model, args.cache))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(running_baton([*flags, *each]))
            for name, each in SYSTEMS.items()
        }
        # The first round warms them up.
        for number in range(args.rounds + 1):
            for name in sorted(servers, reverse=bool(number % 2)):
                taken = sample(servers[name], tokenizer, args, number)
                if number:
                    samples[name].append(taken)
    summary: dict[str, Any] = {
        name: {field: statistics.median(each[field] for each in taken) for field in taken[0]}
        for name, taken in samples.items()
    }
    for name, row in summary.items():
        print(
            f"{name:21} first token of {args.prompt_tokens} after {row['prompt_ttft_p50_ms']:7.1f} ms, "
            f"{args.streams} streams {row['tokens_per_s']:6.1f} tokens/s"
        )
    told = {k: v for k, v in vars(args).items() if k not in ("out", "cache")}
    write_report(args.out, settings=told, raw=samples, summary=summary)


if __name__ == "__main__":
    main()
