"""What the KV cache buys: the time for new tokens with and without it, on the same GPT-2-shaped model with random weights.

Runs Baton's engine and, as the peer, `transformers`' generate, each with and without its cache, interleaved in one process.

    python -m benchmarks.kv_cache --new-tokens 1000 --repeats 3
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from baton.engine.base import EngineRequest, Mode
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from benchmarks.report import write_report

PROMPT = tuple(range(100, 116))
PUBLISHED_RATIOS = {
    "349.95 s / 42.94 s (CPU)": 349.95 / 42.94,
    "56.20 s / 11.89 s (T4)": 56.20 / 11.89,
}


def baton_run(engine: PagedEngine, new_tokens: int) -> float:
    """Seconds for one request, alone."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    sequence = Sequence(PROMPT, (), sampling)
    started_s = time.perf_counter()
    engine.add(EngineRequest(AttemptKey(RequestId("bench")), sequence, Mode.LOCAL))
    while engine.has_work():
        engine.step()
    return time.perf_counter() - started_s


def peer_run(model: GPT2LMHeadModel, new_tokens: int, *, use_cache: bool) -> float:
    """Seconds for `transformers`' generate."""
    ids = torch.tensor([PROMPT])
    started_s = time.perf_counter()
    with torch.inference_mode():
        # transformers declares a self that its models are not.
        out = model.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
    assert isinstance(out, torch.Tensor)
    assert out.shape[1] == len(PROMPT) + new_tokens
    return time.perf_counter() - started_s


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="runs with a cache")
    parser.add_argument("--repeats-without", type=int, default=1, help="runs without one")
    parser.add_argument("--peer-without", action="store_true", help="the peer without a cache too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_cache.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    model.train(mode=False)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = EngineConfig(
            model=directory, kv_pool_tokens=2048, prefix_cache=False, threads=args.threads
        )
        cached = build_torch_engine(config)
        uncached = PagedEngine(cached.runner, max_batch_tokens=1, max_running=1, kv_cache=False)
    runs: dict[str, Callable[[], float]] = {
        "baton, cache": lambda: baton_run(cached, args.new_tokens),
        "transformers, cache": lambda: peer_run(model, args.new_tokens, use_cache=True),
        "baton, no cache": lambda: baton_run(uncached, args.new_tokens),
    }
    if args.peer_without:
        runs["transformers, no cache"] = lambda: peer_run(model, args.new_tokens, use_cache=False)
    baton_run(cached, 8)
    peer_run(model, 8, use_cache=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats):
        for name, run in runs.items():
            if "no cache" not in name or turn < args.repeats_without:
                seconds[name].append(run())
                print(f"{name:24} {seconds[name][-1]:9.2f} s", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "baton: no cache / cache": median["baton, no cache"] / median["baton, cache"],
        "transformers / baton, with cache": median["transformers, cache"] / median["baton, cache"],
        **{f"published: {name}": ratio for name, ratio in PUBLISHED_RATIOS.items()},
    }
    if args.peer_without:
        ratios["transformers: no cache / cache"] = (
            median["transformers, no cache"] / median["transformers, cache"]
        )
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:6.2f}x")
    write_report(
        args.out,
        settings={"new_tokens": args.new_tokens, "prompt_tokens": len(PROMPT), "dtype": "float32"},
        raw={"seconds": seconds},
        summary={"median_seconds": median, "ratios": ratios},
    )


if __name__ == "__main__":
    main()
