"""How the benchmark speaks with what it measures: lines of JSON over a subprocess' pipes, one cell at a time. Questions come on standard
input; answers go to a pipe of their own, since libraries print what they like.

    benchmark → runner   {"kind": "decode", "batch": 4, …}
    runner → benchmark   {"seconds": [0.21, 0.20], "tokens": 96, "peak_rss_bytes": 5e8}

The first line that a runner writes, unasked, says that it has generated its first token. Torch-free, and free of everything but Python:
runners of other engines import it in environments that hold no Baton.
"""

import argparse
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

READY_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing to measure."""

    kind: str
    """`prefill`, `decode` or `mixed`; `ready` and `ready-cold` are not for runners, but time a runner's start."""
    batch: int = 1
    """Prompts at once, or streams that decode."""
    context: int = 0
    """Tokens of a prompt."""
    chunk: int | None = None
    """Most tokens in a step; None is the engine's default."""
    interval_s: float = 0.0
    """Mixed: between two prompts' arrivals."""
    repetitions: int = 1
    """Prefill: prompts; decode: stretches of `steps` steps; mixed: prompts that arrive."""
    steps: int = 0
    """Decode: steps of a repetition; mixed: tokens generated after each arriving prompt."""
    profile: bool = False
    """Also tell where the time goes."""

    @property
    def name(self) -> str:
        """Results are kept by it."""
        profile = "profile, " if self.profile else ""
        match self.kind:
            case "prefill":
                return f"{profile}prefill {self.context}"
            case "decode":
                return f"{profile}decode b{self.batch} ctx {self.context}"
            case "mixed":
                return f"mixed b{self.batch} chunk {self.chunk or 'default'}"
            case _:
                return self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one cell took."""

    seconds: list[float]
    """One value a repetition."""
    tokens: int
    """Computed or generated in a repetition."""
    gaps_s: list[float] = field(default_factory=list)
    """Mixed: between any two tokens of the same stream."""
    peak_rss_bytes: int = 0
    """Of the process so far."""
    sections_s: dict[str, float] = field(default_factory=dict)
    """Profile: seconds by what a step does."""


Measure = Callable[[Cell], Answer]


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random tokens, without the special ones that stand first in a vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(10, vocab_size) for _ in range(length)]


def peak_rss_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Linux counts in KiB."""
    return resource.getrusage(who).ru_maxrss * 1024


def serve(answers_fd: int, measure: Measure, peak: Callable[[], int] = peak_rss_bytes) -> None:
    """Announces that the engine is ready, then measures cell by cell until standard input ends."""
    with os.fdopen(answers_fd, "w") as answers:
        print(json.dumps({"peak_rss_bytes": peak()}), file=answers, flush=True)
        for line in sys.stdin:
            answer = measure(Cell(**json.loads(line)))
            print(json.dumps(asdict(answer)), file=answers, flush=True)


def runner_arguments() -> argparse.Namespace:
    """What every runner is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="in the engine's own format")
    parser.add_argument("--format", required=True, help="of weights, as the engine calls it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True, help="descriptor to write them to")
    parser.add_argument("--tools", default="", help="the engine's own programs")
    parser.add_argument("--kernels", default=None, help="what computes in Baton")
    return parser.parse_args()


def stretches(token_s: Sequence[float], steps: int) -> list[float]:
    """Seconds of each run of `steps` tokens, from when the first token came."""
    return [token_s[last] - token_s[last - steps] for last in range(steps, len(token_s), steps)]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest value at or above `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
