"""What long prompts do to running streams: the split, one core for each role, against the same engine in one process on both cores,
with and without chunked prefill.

Each system runs alone, several streams decode all the time, and in every other round long prompts arrive at random instants (a Poisson
process, the same instants for each system). What counts is the gap between two messages with tokens of one stream, as its client
sees it, divided by the tokens of the later one where it brings several.

    python -m benchmarks.isolation --rounds 5
"""

import argparse
import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baton.client import AsyncClient, Client, SamplingOptions
from baton.types import Role
from benchmarks.report import write_report
from benchmarks.split_cost import serving

SPLIT = ("--prefill", "1", "--decode", "1", "--transport", "ray", "--threads", "1")
ONE_PROCESS = ("--prefill", "0", "--decode", "1", "--threads", "2")
SYSTEMS = {
    "split": SPLIT,
    "one process, chunked": ONE_PROCESS,
    "one process, whole prompts": (*ONE_PROCESS, "--max-batch-tokens", "4096"),
}
SHIPPED_MODEL = Path("baton/models/tales")
CORES = {Role.PREFILL: {0}, Role.DECODE: {1}}


@dataclass(slots=True)
class Round:
    """One system, once without arrivals or once with."""

    gaps_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    """Of the long prompts."""


async def stream(client: AsyncClient, prompt: list[int], end_s: float, seen: Round) -> None:
    """Decodes until the end, request after request."""
    sampling = SamplingOptions(max_tokens=1500, temperature=0.0, ignore_eos=True)
    while time.perf_counter() < end_s:
        async with client.generate(prompt, sampling=sampling) as answer:
            last_s: float | None = None
            async for chunk in answer:
                now_s = time.perf_counter()
                if last_s is not None and chunk.token_ids:
                    each_s = (now_s - last_s) / len(chunk.token_ids)
                    seen.gaps_s += [each_s] * len(chunk.token_ids)
                last_s = now_s
                if now_s >= end_s:
                    break


async def arrive(client: AsyncClient, prompt: list[int], at_s: float, seen: Round) -> None:
    """One long prompt, and its first tokens."""
    await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
    began_s = time.perf_counter()
    sampling = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)
    async with client.generate(prompt, sampling=sampling) as answer:
        first = True
        async for _ in answer:
            if first:
                seen.ttft_s.append(time.perf_counter() - began_s)
                first = False


async def measure(address: str, args: argparse.Namespace, seed: int, *, arrivals: bool) -> Round:
    """One round."""
    rng, seen = random.Random(seed), Round()
    async with AsyncClient(address) as client:
        vocab = (await client.model()).vocab_size

        def prompt(length: int) -> list[int]:
            return [rng.randrange(10, vocab) for _ in range(length)]

        start_s = time.perf_counter() + args.warm_up_s
        end_s = start_s + args.seconds
        warm = Round()
        tasks = [
            asyncio.create_task(stream(client, prompt(64), end_s, warm if arrivals else seen))
            for _ in range(args.streams)
        ]
        warm.gaps_s = seen.gaps_s
        at_s = start_s
        while arrivals and (at_s := at_s + rng.expovariate(args.rate)) < end_s:
            tasks.append(
                asyncio.create_task(arrive(client, prompt(args.prompt_tokens), at_s, seen))
            )
        await asyncio.gather(*tasks)
    return seen


def pin(address: str) -> None:
    """Gives each role's process a core of its own; what routes and asks may use both."""
    with Client(address) as client:
        for worker in client.model().workers:
            for thread in Path(f"/proc/{worker.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), CORES[worker.role])


def make_checkpoint(directory: Path) -> Path:
    """A Llama of 17 million random weights, with the shipped model's tokenizer: a step takes long enough that router and client, who
    use the same two cores, keep up with it.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2336,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_MODEL / name, directory / name)
    return directory


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def profile_ms(gaps_s: list[float]) -> dict[str, list[float]]:
    """Two hundred quantiles of a round's gaps, the least first, and the hundred longest."""
    ordered = [round(1e3 * gap_s, 3) for gap_s in sorted(gaps_s)]
    quantiles = [ordered[len(ordered) * i // 200] for i in range(200)]
    return {"quantiles": quantiles, "longest": ordered[-100:]}


def goodput(rounds: list[Round], args: argparse.Namespace) -> float:
    """Tokens a second of running streams that came within the limit."""
    seconds: float = len(rounds) * args.seconds
    return sum(sum(gap <= args.itl_limit_s for gap in each.gaps_s) for each in rounds) / seconds


def summary_of(calm: list[Round], busy: list[Round], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds are medians over rounds of each round's percentile."""

    def itl_ms(rounds: list[Round], share: float) -> float:
        return 1e3 * statistics.median(percentile(each.gaps_s, share) for each in rounds)

    ttft_s = [value for each in busy for value in each.ttft_s]
    return {
        "calm_itl_p50_ms": itl_ms(calm, 0.5),
        "calm_itl_p99_ms": itl_ms(calm, 0.99),
        "busy_itl_p50_ms": itl_ms(busy, 0.5),
        "busy_itl_p99_ms": itl_ms(busy, 0.99),
        "calm_itl_p999_ms": itl_ms(calm, 0.999),
        "busy_itl_p999_ms": itl_ms(busy, 0.999),
        "p99_ratio": itl_ms(busy, 0.99) / itl_ms(calm, 0.99),
        "goodput_tokens_per_s": goodput(busy, args),
        "prompt_ttft_p50_ms": 1e3 * statistics.median(ttft_s),
        "prompts": len(ttft_s),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each round")
    parser.add_argument("--warm-up-s", type=float, default=1.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.3, help="long prompts a second")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--itl-limit-s", type=float, default=0.05, help="what counts as goodput")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/isolation.json"))
    args = parser.parse_args()
    directory = tempfile.TemporaryDirectory()
    model = make_checkpoint(Path(directory.name))
    calm: dict[str, list[Round]] = {name: [] for name in SYSTEMS}
    busy: dict[str, list[Round]] = {name: [] for name in SYSTEMS}
    for number in range(args.rounds):
        for name, flags in SYSTEMS.items():
            with ExitStack() as stack:
                address, _ = stack.enter_context(serving(*flags, "--model", str(model)))
                if name == "split":
                    pin(address)
                calm[name].append(asyncio.run(measure(address, args, number, arrivals=False)))
                busy[name].append(asyncio.run(measure(address, args, number, arrivals=True)))
    summary = {name: summary_of(calm[name], busy[name], args) for name in SYSTEMS}
    for name, figures in summary.items():
        told = "  ".join(f"{key} {value:.2f}" for key, value in figures.items())
        print(f"{name:28} {told}")
    write_report(
        args.out,
        settings={k: v for k, v in vars(args).items() if k != "out"},
        raw={
            name: {
                "calm_itl_ms": [profile_ms(each.gaps_s) for each in calm[name]],
                "busy_itl_ms": [profile_ms(each.gaps_s) for each in busy[name]],
                "prompt_ttft_s": [[round(t, 4) for t in each.ttft_s] for each in busy[name]],
            }
            for name in SYSTEMS
        },
        summary=summary,
    )


if __name__ == "__main__":
    main()
