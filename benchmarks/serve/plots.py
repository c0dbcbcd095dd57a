"""Pictures of the results, as SVG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
STYLES = {"split": "o-", "halved": "v-.", "single": "s--", "vllm": "^:"}


def plot_load(summary: Mapping[str, Mapping[str, Rows]], path: Path) -> None:
    """A row of pictures for each model: TTFT, ITL, throughput and goodput by the rate of requests."""
    columns = {
        "TTFT, ms": {"ttft_ms_p50": 1.0, "ttft_ms_p99": 0.35},
        "ITL, ms": {"itl_ms_p50": 1.0, "itl_ms_p99": 0.35},
        "output tokens a second": {"output_tokens_per_s": 1.0},
        "requests a second within the objectives": {
            "goodput_strict_per_s": 1.0,
            "goodput_relaxed_per_s": 0.35,
        },
    }
    figure = Figure(figsize=(4 * len(columns), 3.4 * len(summary)), layout="constrained")
    grid = figure.subplots(len(summary), len(columns), squeeze=False)
    for model, systems, axes in zip(summary, summary.values(), grid, strict=True):
        for (label, fields), axis in zip(columns.items(), axes, strict=True):
            for number, (system, rows) in enumerate(systems.items()):
                for field, alpha in fields.items():
                    name = system if alpha == 1 else None
                    axis.plot(
                        *_points(rows, "rate_per_s", field),
                        STYLES[system],
                        color=f"C{number}",
                        label=name,
                        alpha=alpha,
                        markersize=4,
                    )
            axis.set_title(f"{model}: {label}", fontsize=9)
            axis.set_xlabel("requests a second")
            if label.endswith("ms"):
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
    figure.suptitle("dark: p50, or the strict objectives; light: p99, or the relaxed ones")
    _save(figure, path)


GROWTH = {
    "streams": ("streams", {"cpu_us_per_token": "CPU, µs a token", "itl_p50_ms": "ITL p50, ms"}),
    "context": (
        "context",
        {"cpu_us_per_prompt_token": "CPU, µs a prompt token", "itl_p50_ms": "ITL p50, ms"},
    ),
    "workers": (
        "workers",
        {"cpu_us_per_token": "CPU, µs a token", "tokens_per_s_per_pair": "tokens/s of each pair"},
    ),
}


def plot_growth(summary: Mapping[str, Rows], path: Path) -> None:
    """Cost for each unit, by how many there are: flat where growth is linear."""
    figure = Figure(figsize=(4 * len(summary), 6.4), layout="constrained")
    grid = figure.subplots(2, len(summary), squeeze=False)
    for part, axes in zip(summary, grid.T, strict=True):
        unit, fields = GROWTH[part]
        for (field, label), axis in zip(fields.items(), axes, strict=True):
            axis.plot(*_points(summary[part], unit, field), "o-")
            axis.set_title(label, fontsize=9)
            axis.set_xlabel(unit if part != "context" else "tokens of context")
            if part != "workers":
                axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    _save(figure, path)


def _points(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    told = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    return [point[0] for point in told], [point[1] for point in told]


def _save(figure: Figure, path: Path) -> None:
    # Without a date, so that the same figures are the same file.
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")
