"""What the split costs: time to first token of a 128-token prompt through the split system and through the same engine in one process.

Both systems run side by side behind their routers and are asked in turn, one request at a time, with prompts that no prefix
cache holds. The client's clock decides.

    python -m benchmarks.split_cost --requests 60
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from baton.client import Client, SamplingOptions
from benchmarks.report import write_report
from benchmarks.serve.systems import running_baton

SYSTEMS = {
    "single": ("--prefill", "0", "--decode", "1"),
    "split": ("--prefill", "1", "--decode", "1", "--transport", "ray"),
}


@contextmanager
def serving(*flags: str) -> Iterator[tuple[str, float]]:
    """Address of a running `baton serve`, and the seconds it took to be ready."""
    with running_baton(flags) as server:
        yield server.address, server.ready_s


def ask(client: Client, prompt: Sequence[int], new_tokens: int) -> dict[str, float]:
    """One request: seconds to the first token, between the first two, and to the end."""
    sampling = SamplingOptions(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    started_s = time.perf_counter()
    arrivals_s: list[float] = []
    with client.generate(list(prompt), sampling=sampling) as stream:
        for chunk in stream:
            now_s = time.perf_counter() - started_s
            arrivals_s += [now_s] * len(chunk.token_ids)
        result = stream.result
    return {
        "ttft_s": arrivals_s[0],
        "second_token_gap_s": arrivals_s[1] - arrivals_s[0],
        "total_s": time.perf_counter() - started_s,
        "prefill_s": result.timings.prefill_s,
        "handoff_s": result.timings.handoff_s,
        "handoff_bytes": float(result.timings.handoff_bytes),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--model", default=None, help="default: the model that ships")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/split_cost.json"))
    args = parser.parse_args()
    common = ["--threads", str(args.threads), *(["--model", args.model] if args.model else [])]
    rng = random.Random(0)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    ready_s: dict[str, float] = {}
    with ExitStack() as stack:
        clients: dict[str, Client] = {}
        for name, flags in SYSTEMS.items():
            address, ready_s[name] = stack.enter_context(serving(*flags, *common))
            clients[name] = stack.enter_context(Client(address))
        vocab_size = clients["single"].model().vocab_size
        warm_up = 5
        for turn in range(args.requests + warm_up):
            prompt = [rng.randrange(10, vocab_size) for _ in range(args.prompt_tokens)]
            for name in sorted(SYSTEMS, reverse=bool(turn % 2)):
                sample = ask(clients[name], prompt, args.new_tokens)
                if turn >= warm_up:
                    samples[name].append(sample)
    median = {
        name: {field: statistics.median(s[field] for s in taken) for field in taken[0]}
        for name, taken in samples.items()
    }
    for name, fields in median.items():
        figures = "  ".join(
            f"{k[:-2]} {v * 1e3:7.2f} ms" for k, v in fields.items() if k.endswith("_s")
        )
        print(f"{name:7} ready {ready_s[name]:5.1f} s  {figures}")
    added_s = median["split"]["ttft_s"] - median["single"]["ttft_s"]
    print(f"the split adds {added_s * 1e3:.2f} ms to the median time to first token")
    write_report(
        args.out,
        settings={k: v for k, v in vars(args).items() if k != "out"},
        raw={"samples": samples, "ready_s": ready_s},
        summary={"median": median, "ttft_added_s": added_s, "ready_s": ready_s},
    )


if __name__ == "__main__":
    main()
