"""What a weight format costs in quality: the shipped model's perplexity on held-out conversations, token by token, as decode computes them.

    python -m benchmarks.weight_formats

Each format reads the same tokens; the difference is to the first format. Activations and KV are float32.
"""

import argparse
import math
import random
import statistics
from pathlib import Path

from tokenizers import Tokenizer

from baton.cli.config import shipped_model
from baton.engine.batch import BatchRow, Runner, SampleInput
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.kv.spec import WeightFormat
from baton.types import SamplingParams
from benchmarks.report import write_report
from training.corpus import as_messages, write_tale, write_turns
from training.tokenizer import render

BLOCK = 16
FORCED = 100.0
"""A bias that has any token chosen; its log-probability is told by the raw logits."""


def conversations(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[list[int]]:
    """Held-out tales with questions and answers, the first `length` tokens of each."""

    def size(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    found: list[list[int]] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"held-out/{seed}/perplexity/{number}")
        number += 1
        tale = write_tale(rng, split="held-out", max_tokens=length // 2, count=size)
        turns = write_turns(rng, tale, split="held-out", limit=12)
        text = render(as_messages(tale, turns), add_generation_prompt=False)
        ids = tokenizer.encode(text).ids
        if len(ids) >= length:
            found.append(ids[:length])
    return found


def losses(runner: Runner, texts: list[list[int]]) -> list[float]:
    """Each token's negative log-likelihood, given those before it."""
    length = len(texts[0])
    blocks = -(-length // BLOCK)
    tables = [range(i * blocks, (i + 1) * blocks) for i in range(len(texts))]
    found: list[float] = []
    for at in range(length - 1):
        rows = []
        for text, table in zip(texts, tables, strict=True):
            wanted = SamplingParams(
                max_tokens=1, temperature=0.0, logprobs=0, logit_bias=((text[at + 1], FORCED),)
            )
            rows.append(BatchRow([text[at]], at, table, SampleInput(wanted, text[: at + 1], [])))
        for text, sampled in zip(texts, runner.run(rows), strict=True):
            assert sampled is not None
            assert sampled.logprobs is not None
            assert sampled.token_id == text[at + 1]
            found.append(-sampled.logprobs.chosen.logprob)
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=shipped_model())
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=320, help="of each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "weight_formats.json"
    )
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = conversations(tokenizer, args.texts, args.tokens, args.seed)
    perplexity: dict[str, float] = {}
    print(f"{'weights':<12}{'perplexity':>12}{'difference':>12}")
    for weights in WeightFormat:
        config = EngineConfig(
            model=str(args.model),
            dtype="float32",
            weights=weights,
            block_size_tokens=BLOCK,
            kv_pool_tokens=(-(-args.tokens // BLOCK)) * BLOCK * args.texts,
            threads=args.threads,
        )
        runner = build_torch_engine(config).runner
        perplexity[weights.value] = math.exp(statistics.fmean(losses(runner, texts)))
        first = perplexity[WeightFormat.FLOAT32.value]
        own = perplexity[weights.value]
        print(f"{weights.value:<12}{own:>12.4f}{own / first - 1:>+12.3%}", flush=True)
    write_report(
        args.out,
        settings={"model": args.model.name, "texts": args.texts, "tokens": args.tokens},
        raw={"perplexity": perplexity},
        summary={
            name: f"{value:.4f} ({value / perplexity[WeightFormat.FLOAT32.value] - 1:+.3%})"
            for name, value in perplexity.items()
        },
    )


if __name__ == "__main__":
    main()
