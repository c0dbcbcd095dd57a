"""What handing a long prompt over while it is computed is worth: time from its first to its second token, by its length, with and without.

Both systems run side by side and are asked in turn, one request at a time, with prompts that no prefix cache holds.

    python -m benchmarks.serve.overlap [--model qwen] [--lengths 512 1024 2048 4096 8192] [--requests 5]

The gap is what a client sees between two tokens; the handoff is what the router tells of it: from the end of the prompt to the KV in
decode's pool. What is not handoff is decode's first step.
"""

import argparse
import random
import statistics
from contextlib import ExitStack
from pathlib import Path

from baton.client import Client
from benchmarks.report import write_report
from benchmarks.serve.models import CACHE, NAMES, model_flags
from benchmarks.serve.systems import running_baton
from benchmarks.split_cost import ask

SYSTEMS = {"overlapped": {}, "afterwards": {"BATON_OVERLAP_TOKENS": "1000000"}}
FIELDS = ("second_token_gap_s", "handoff_s", "ttft_s")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="qwen")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[512, 1024, 1536, 2048, 4096, 8000]
    )
    parser.add_argument("--requests", type=int, default=5, help="of each length")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_overlap.json"))
    args = parser.parse_args()
    flags = [*model_flags(args.model, args.cache), "--no-prefix-cache", "--transport", "ray"]
    flags += ["--prefill", "1", "--decode", "1", "--threads", str(args.threads)]
    flags += [
        "--kv-tokens",
        str(4 * max(args.lengths)),
        "--max-context",
        str(max(args.lengths) + 8),
    ]
    rng = random.Random(0)
    samples: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in SYSTEMS}
    with ExitStack() as stack:
        clients: dict[str, Client] = {}
        for name, environment in SYSTEMS.items():
            server = stack.enter_context(running_baton(flags, environment))
            clients[name] = stack.enter_context(Client(server.address))
        vocab_size = clients["overlapped"].model().vocab_size
        for length in args.lengths:
            for taken in samples.values():
                taken[length] = []
            for turn in range(args.requests + 1):
                prompt = [rng.randrange(10, vocab_size) for _ in range(length)]
                for name in sorted(SYSTEMS, reverse=bool(turn % 2)):
                    sample = ask(clients[name], prompt, 3)
                    if turn:
                        samples[name][length].append(sample)
            for name, taken in samples.items():
                median = {f: statistics.median(s[f] for s in taken[length]) for f in FIELDS}
                told = "  ".join(f"{f[:-2]} {1e3 * v:9.2f} ms" for f, v in median.items())
                print(f"{length:6} tokens  {name:10}  {told}", flush=True)
    summary = {
        name: {
            str(length): {
                f"{f[:-2]}_ms": round(1e3 * statistics.median(s[f] for s in each), 2)
                for f in FIELDS
            }
            for length, each in taken.items()
        }
        for name, taken in samples.items()
    }
    told_settings = {k: v for k, v in vars(args).items() if k not in ("out", "cache")}
    write_report(args.out, settings=told_settings, raw={"samples": samples}, summary=summary)


if __name__ == "__main__":
    main()
