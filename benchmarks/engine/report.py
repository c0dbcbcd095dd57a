"""The table: what each engine reached in each cell, how Baton stands to the best of the others, and how near the limit that is. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.engine.protocol import Cell
from benchmarks.engine.results import Contender, Sample

BATON = "baton"
NOTES = """\
Tokens per second, the median of the rounds; in brackets the share of the machine's limit, which was measured right before each sample:
memory bandwidth over weights and KV, read once a step, or the rate of matrix products, whichever allows less. Bold: the best of the row.
Ratios are Baton's to the best other engine with weights in the same format, and Baton's best to the best of all, round by round.

llama.cpp's own benchmarks time the model alone; all others sample and schedule too. int8 is q8_0 in llama.cpp, and 8-bit weights and
activations in CTranslate2. Ready: from the start of the process to the first token; cold: with nothing compiled before. Peak memory: of
the whole process, over all cells that it ran. Mixed: 16 streams decode while prompts arrive at a fixed rate; prompt and generated
tokens, and the 99th percentile of the gaps between a stream's tokens, by the most tokens of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One engine's in one cell."""

    rounds: Mapping[int, float]
    """Tokens per second, or seconds of a start."""
    share: float | None
    itl_p99_s: float | None
    run: int

    @property
    def median(self) -> float:
        return statistics.median(self.rounds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell on one shape."""

    cell: Cell
    figures: Mapping[Contender, Figure]

    @property
    def counts_seconds(self) -> bool:
        """Less is better, then."""
        return self.cell.kind.startswith("ready")

    def best(self, contenders: Iterable[Contender]) -> Contender | None:
        """Of those that were measured."""
        there = [contender for contender in contenders if contender in self.figures]
        if not there:
            return None
        chosen = min if self.counts_seconds else max
        return chosen(there, key=lambda contender: self.figures[contender].median)

    def ratio(self, weight_format: str | None) -> float | None:
        """How many times as fast Baton is as the best other engine, with weights in this format or, for None, in any. Of rounds in which
        both were measured: what slowed one down slowed the other.
        """
        suited = [
            contender
            for contender in self.figures
            if weight_format in {None, contender.weight_format}
        ]
        ours = self.best(contender for contender in suited if contender.peer == BATON)
        theirs = self.best(contender for contender in suited if contender.peer != BATON)
        if ours is None or theirs is None:
            return None
        mine, other = self.figures[ours].rounds, self.figures[theirs].rounds
        ratios = [mine[number] / other[number] for number in mine.keys() & other.keys()]
        if not ratios:
            return None
        ratio = statistics.median(ratios)
        return 1 / ratio if self.counts_seconds else ratio


def rows(samples: Sequence[Sample], shape: str) -> list[Row]:
    """In the order in which cells were first measured."""
    found: dict[str, dict[Contender, list[Sample]]] = {}
    for sample in samples:
        if sample.shape == shape and not sample.cell.profile:
            found.setdefault(sample.cell.name, {}).setdefault(sample.contender, []).append(sample)
    return [
        Row(
            cell=next(iter(by_contender.values()))[0].cell,
            figures={who: _figure(taken) for who, taken in by_contender.items()},
        )
        for by_contender in found.values()
    ]


def _figure(samples: Sequence[Sample]) -> Figure:
    shares = [sample.share for sample in samples if sample.share is not None]
    gaps_s = [sample.itl_p99_s for sample in samples if sample.itl_p99_s is not None]
    return Figure(
        rounds={
            sample.round: sample.tokens_per_s if sample.tokens else sample.seconds[0]
            for sample in samples
        },
        share=statistics.median(shares) if shares else None,
        itl_p99_s=statistics.median(gaps_s) if gaps_s else None,
        run=samples[-1].run,
    )


def contenders_of(samples: Iterable[Sample]) -> list[Contender]:
    """Baton first."""
    found = {sample.contender for sample in samples}
    return sorted(found, key=lambda who: (who.peer != BATON, who.peer, who.weight_format))


def markdown(samples: Sequence[Sample]) -> str:
    """All shapes' tables."""
    parts = ["# The engine against its peers and the machine's limit", NOTES]
    for shape in dict.fromkeys(sample.shape for sample in samples):
        parts.append(f"## {shape}")
        parts.append(shape_table(samples, shape))
        profiles = profile_table(samples, shape)
        if profiles:
            parts += ["Where the time of Baton's steps goes:", profiles]
    return "\n\n".join(parts) + "\n"


def shape_table(samples: Sequence[Sample], shape: str) -> str:
    """A row per cell, a column per contender, then Baton's ratios."""
    ours = [sample for sample in samples if sample.shape == shape and not sample.cell.profile]
    who = contenders_of(ours)
    formats = sorted({contender.weight_format for contender in who if contender.peer == BATON})
    head = ["", *map(str, who), *(f"ratio, {name}" for name in formats), "ratio, best"]
    lines = [head]
    for row in rows(ours, shape):
        ratios = [row.ratio(name) for name in [*formats, None]]
        best = row.best(who)
        figures = [_cell_text(row, contender, bold=contender == best) for contender in who]
        lines.append([row.cell.name, *figures, *(_ratio_text(ratio) for ratio in ratios)])
    peaks = [_peak_bytes(ours, contender) for contender in who]
    lines.append(
        ["peak memory, MB", *(f"{peak / 1e6:.0f}" for peak in peaks), *[""] * (len(formats) + 1)]
    )
    return _table(lines)


def _peak_bytes(samples: Iterable[Sample], contender: Contender) -> int:
    return max(sample.peak_rss_bytes for sample in samples if sample.contender == contender)


def _cell_text(row: Row, contender: Contender, *, bold: bool) -> str:
    figure = row.figures.get(contender)
    if figure is None:
        return "-"
    text = f"{figure.median:.1f} s" if row.counts_seconds else _digits(figure.median)
    text = f"**{text}**" if bold else text
    if figure.share is not None:
        text += f" ({figure.share:.0%})"
    if figure.itl_p99_s is not None:
        text += f", p99 {figure.itl_p99_s * 1e3:.3g} ms"
    return text


def _digits(value: float) -> str:
    """Three digits say all that a run on a shared machine knows."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def profile_table(samples: Sequence[Sample], shape: str) -> str:
    """A row per section, a column per cell; empty where nothing was profiled."""
    profiles = [s for s in samples if s.shape == shape and s.sections_s]
    taken = {f"{s.cell.name}, {s.contender.weight_format}": s for s in profiles}
    if not taken:
        return ""
    sections = dict.fromkeys(name for sample in taken.values() for name in sample.sections_s)
    lines = [["", *taken]]
    for section in sections:
        shares = [
            sample.sections_s.get(section, 0.0) / sum(sample.sections_s.values())
            for sample in taken.values()
        ]
        lines.append([section, *(f"{share:.1%}" for share in shares)])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
