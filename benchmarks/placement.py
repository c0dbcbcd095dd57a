"""Placement policies on replays of two traces in virtual time, with 8 prefill and 8 decode workers: goodput under TTFT and TPOT
targets, and percentiles, at several request rates. Deterministic; takes about a minute.

    python -m benchmarks.placement --output benchmarks/results/placement.json --plot docs/images/placement.png

The plot needs matplotlib, which `make install` brings.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np

from baton.service.settings import PlacementPolicy
from benchmarks.placement_sim import SimFleet, Speeds, TraceRequest
from benchmarks.placement_traces import AGENT, CONVERSATION, Shape, trace
from benchmarks.report import write_report
from router.policies import policy_of

PREFILL = DECODE = 8
TTFT_TARGET_S = 3.0
TPOT_TARGET_S = 0.05
RATES_PER_S: Mapping[str, Sequence[float]] = {
    CONVERSATION.name: (3, 4, 5, 6, 7, 8),
    AGENT.name: (6, 8, 10, 12, 14, 16),
}
HEADLINE_PER_S = {CONVERSATION.name: 6.0, AGENT.name: 14.0}
"""The rate of the table: about what the fleet can do where nothing is reused on purpose."""

REPLAYED = {
    "prefill_workers": PREFILL,
    "decode_workers": DECODE,
    "ttft_target_s": TTFT_TARGET_S,
    "tpot_target_s": TPOT_TARGET_S,
}
"""What every replay's report tells."""

Figures = dict[str, float]


def replay(shape: Shape, policy: PlacementPolicy, rate_per_s: float, requests: int) -> Figures:
    """One trace, one policy, one rate."""
    fleet = SimFleet(
        policy_of(policy, local_prefill_tokens=32), prefill=PREFILL, decode=DECODE, speeds=Speeds()
    )
    played = trace(shape, requests=requests, rate_per_s=rate_per_s)
    return figures_of(fleet.play(played), played)


class Outcome(Protocol):
    """What became of a request."""

    @property
    def request(self) -> TraceRequest: ...

    @property
    def ttft_s(self) -> float: ...

    @property
    def tpot_s(self) -> float: ...

    @property
    def cached_tokens(self) -> int: ...


def figures_of(outcomes: Iterable[Outcome], played: Sequence[TraceRequest]) -> Figures:
    """Of a replay. Caches are empty at first, and arrivals end at last: neither counts."""
    first_s, last_s = (played[-1].at_s * share for share in (0.2, 1.0))
    counted = [each for each in outcomes if first_s <= each.request.at_s <= last_s]
    return _figures(counted, last_s - first_s)


def _figures(outcomes: Sequence[Outcome], seconds: float) -> Figures:
    ttft_s = np.array([each.ttft_s for each in outcomes])
    tpot_s = np.array([each.tpot_s for each in outcomes])
    good = (ttft_s <= TTFT_TARGET_S) & (tpot_s <= TPOT_TARGET_S)
    prompt_tokens = sum(each.request.prompt_tokens for each in outcomes)
    return {
        "requests_per_s": len(outcomes) / seconds,
        "goodput_per_s": float(good.sum()) / seconds,
        "good_share": float(good.mean()),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p90_s": float(np.percentile(ttft_s, 90)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "tpot_p90_s": float(np.percentile(tpot_s, 90)),
        "prefix_hit_share": sum(each.cached_tokens for each in outcomes) / prompt_tokens,
    }


def _print_table(shape: Shape, rate_per_s: float, figures: Mapping[str, Figures]) -> None:
    print(f"\n{shape.name}, {rate_per_s:g} requests a second")
    columns = ("goodput_per_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p90_s")
    print(f"| {'policy':14} | " + " | ".join((*columns, "prefix_hit_share")) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for policy, values in figures.items():
        row = [f"{values[c]:{len(c)}.3f}" for c in (*columns, "prefix_hit_share")]
        print(f"| {policy:14} | " + " | ".join(row) + " |")


def _plot(path: Path, results: Mapping[str, Mapping[str, Mapping[str, Figures]]]) -> None:
    # Only the plot needs it.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    rows = (("goodput_per_s", "goodput [requests/s]"), ("ttft_p90_s", "TTFT p90 [s]"))
    for column, (name, by_rate) in enumerate(results.items()):
        rates = [float(rate) for rate in by_rate]
        for row, (key, label) in enumerate(rows):
            axis = axes[row][column]
            for policy in PlacementPolicy:
                values = [figures[policy.value][key] for figures in by_rate.values()]
                axis.plot(rates, values, marker="o", label=policy.value)
            axis.set_xlabel("requests/s")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(name)
        axes[1][column].set_yscale("log")
        axes[1][column].axhline(TTFT_TARGET_S, color="grey", linestyle=":")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    """Prints the tables, and writes figures and plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=2000, help="of each replay")
    parser.add_argument("--headline-only", action="store_true", help="one rate of each trace")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, Figures]]] = {}
    for shape in (CONVERSATION, AGENT):
        headline = HEADLINE_PER_S[shape.name]
        rates = (headline,) if given.headline_only else RATES_PER_S[shape.name]
        results[shape.name] = {
            f"{rate:g}": {
                policy.value: replay(shape, policy, rate, given.requests)
                for policy in PlacementPolicy
            }
            for rate in rates
        }
        _print_table(shape, headline, results[shape.name][f"{headline:g}"])
    if given.plot is not None:
        _plot(given.plot, results)
    if given.output is not None:
        settings = REPLAYED | {
            "requests": given.requests,
            "speeds": asdict(Speeds()),
            "traces": {shape.name: asdict(shape) for shape in (CONVERSATION, AGENT)},
        }
        write_report(given.output, settings=settings, raw=dict(results), summary=dict(results))


if __name__ == "__main__":
    main()
