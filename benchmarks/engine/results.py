"""The raw results: one sample per engine, format, shape, cell and round, in one file that later runs add to.

A run that measures a cell again replaces that cell's samples of the same engine and format, and leaves all others.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.engine.limits import Limits
from benchmarks.engine.protocol import Cell


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine with weights in one format."""

    peer: str
    weight_format: str

    def __str__(self) -> str:
        return f"{self.peer} {self.weight_format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One cell, measured once."""

    shape: str
    cell: Cell
    contender: Contender
    run: int
    """Index into the file's runs: with which command, when, on what machine."""
    round: int
    seconds: list[float]
    tokens: int
    """In a repetition; 0 for a start."""
    peak_rss_bytes: int
    limits: Limits | None
    """Right before it; None for a start."""
    least_s: float | None = None
    """A repetition's, at these limits."""
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    sections_s: dict[str, float] = field(default_factory=dict)
    """Profiles: exclusive seconds by what a step does."""

    @property
    def tokens_per_s(self) -> float:
        """The median repetition's."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the machine's limit at that moment; None where no limit is known."""
        return None if self.least_s is None else self.least_s / statistics.median(self.seconds)

    @property
    def place(self) -> tuple[str, str, Contender]:
        return self.shape, self.cell.name, self.contender


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that is in the file."""

    runs: list[dict[str, object]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Replaces samples of the same place that an earlier run took."""
        kept = [s for s in self.samples if s.place != sample.place or s.run == sample.run]
        self.samples[:] = [*kept, sample]

    def drop_run(self, run: int) -> None:
        """Forgets a run without samples."""
        if not any(sample.run == run for sample in self.samples):
            del self.runs[run]

    def has(self, shape: str, cell: Cell, contender: Contender, number: int) -> bool:
        """Whether a round of it is there, whichever run took it."""
        place = (shape, cell.name, contender)
        return any(s.place == place and s.round == number for s in self.samples)


def load(path: Path) -> Results:
    """What is there; nothing where there is no file."""
    if not path.exists():
        return Results()
    found = json.loads(path.read_text())
    return Results(runs=found["runs"], samples=[_sample(fields) for fields in found["samples"]])


def _sample(fields: dict[str, object]) -> Sample:
    limits = fields.pop("limits")
    return Sample(
        **fields
        | {
            "cell": Cell(**fields["cell"]),  # type: ignore[arg-type]
            "contender": Contender(**fields["contender"]),  # type: ignore[arg-type]
            "limits": Limits(**limits) if limits else None,  # type: ignore[arg-type]
        }
    )


def save(path: Path, results: Results) -> None:
    """Writes the whole file, or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n  ".join(json.dumps(run) for run in results.runs)
    samples = ",\n  ".join(json.dumps(_rounded(asdict(sample))) for sample in results.samples)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"runs": [\n  {runs}\n],\n"samples": [\n  {samples}\n]}}\n')
    partial.replace(path)


def _rounded(value: object) -> object:
    """More digits than five are noise."""
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {key: _rounded(inner) for key, inner in value.items()}
        case list():
            return [_rounded(inner) for inner in value]
        case _:
            return value
