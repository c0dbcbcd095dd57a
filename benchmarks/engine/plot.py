"""The picture: every engine's share of the machine's limit, cell by cell."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.engine.report import contenders_of, rows
from benchmarks.engine.results import Sample

COLOURS = (
    "#0b6e4f",
    "#2fb380",
    "#9fe2c4",
    "#c1440e",
    "#e8a87c",
    "#2b4c7e",
    "#6b8fc9",
    "#b7c9e8",
    "#7a6c5d",
    "#b8ab9c",
)


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Writes one picture with a panel per shape; nothing where no cell has a limit."""
    limited = [sample for sample in samples if sample.share is not None and not sample.cell.profile]
    shapes = list(dict.fromkeys(sample.shape for sample in limited))
    if not shapes:
        return
    who = contenders_of(limited)
    figure = Figure(figsize=(13, 3.2 * len(shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), squeeze=False)[:, 0]
    for panel, shape in zip(panels, shapes, strict=True):
        table = rows(limited, shape)
        for place, contender in enumerate(who):
            shares = [
                row.figures[contender].share if contender in row.figures else 0 for row in table
            ]
            width = 0.85 / len(who)
            offsets = [n + width * (place - (len(who) - 1) / 2) for n in range(len(table))]
            colour = COLOURS[place % len(COLOURS)]
            panel.bar(
                offsets, [100 * (s or 0) for s in shares], width, label=str(contender), color=colour
            )
        panel.axhline(100, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(shape, loc="left")
        panel.set_ylabel("% of the machine's limit")
        panel.set_xticks(
            range(len(table)), [row.cell.name.replace(" ctx", "\nctx") for row in table]
        )
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(ncols=5, fontsize=8, loc="upper right")
    figure.savefig(path)
