"""What a soak found, as a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.soak_load import Trace
from tests.faults.soak_plan import Lasted, Pair, pairs_among

LONGEST = 12
"""Requests with the longest waits that are told of."""


@dataclass(slots=True)
class Row:
    """One kind of fault."""

    times: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """The longest wait of each request that went on in another attempt, or on another stream, while the fault lasted."""


@dataclass(slots=True)
class Report:
    """See the module docstring."""

    rows: dict[str, Row] = field(default_factory=dict)
    pairs: Counter[Pair] = field(default_factory=Counter)
    """Of faults that lasted at one time."""
    num_possible_pairs: int = 0
    requests: int = 0
    longest_calm_gap_s: float = 0.0
    """Of requests that went through in one attempt and on one stream."""
    longest_gap_s: float = 0.0
    attempts: Counter[str] = field(default_factory=Counter)
    """By reason, as the routers that live at the end count them."""
    longest: list[str] = field(default_factory=list)
    """The requests that waited longest, and why."""

    def table(self) -> str:
        lines = [f"{'fault':<28}{'times':>6}{'disturbed':>11}{'p50 s':>8}{'p99 s':>8}"]
        for name, row in sorted(self.rows.items()):
            gaps = sorted(row.gaps_s)
            told = [f"{quantile(gaps, q):8.2f}" for q in (0.5, 0.99)] if gaps else ["       -"] * 2
            lines.append(f"{name:<28}{row.times:>6}{len(gaps):>11}{''.join(told)}")
        times, pairs = sum(row.times for row in self.rows.values()), sum(self.pairs.values())
        lines += [
            f"{times} faults; {pairs} times two at once, {len(self.pairs)} of {self.num_possible_pairs} pairs",
            f"{self.requests} requests, none failed, none differs",
            f"longest wait of all: {self.longest_gap_s:.2f} s; of the undisturbed: {self.longest_calm_gap_s:.2f} s",
            f"attempts: {dict(self.attempts)}",
            "longest waits of all:",
            *self.longest,
        ]
        return "\n".join(lines)


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def account(faults: Sequence[Lasted], traces: Sequence[Trace]) -> Report:
    """A disturbed request belongs to every fault that lasted during its longest wait, or else to the last one before."""
    names = {fault.name for fault in faults}
    report = Report(
        rows={name: Row() for name in names},
        pairs=pairs_among(faults),
        requests=len(traces),
        longest_gap_s=max((trace.gap_s for trace in traces), default=0.0),
    )
    for fault in faults:
        report.rows[fault.name].times += 1
    for trace in traces:
        if trace.disturbed:
            for name in {fault.name for fault in _during(trace, faults)}:
                report.rows[name].gaps_s.append(trace.gap_s)
        else:
            report.longest_calm_gap_s = max(report.longest_calm_gap_s, trace.gap_s)
    waited = sorted(traces, key=lambda trace: trace.gap_s, reverse=True)
    report.longest = [_told(trace, faults) for trace in waited[:LONGEST]]
    return report


def _during(trace: Trace, faults: Sequence[Lasted]) -> list[Lasted]:
    met = [fault for fault in faults if fault.meets(trace.gap_began_s, trace.gap_ended_s)]
    before = [fault for fault in faults if fault.began_s <= trace.gap_began_s]
    return met or sorted(before, key=lambda fault: fault.ended_s)[-1:]


def _told(trace: Trace, faults: Sequence[Lasted]) -> str:
    """The wait, the faults that it meets with their times from its begin, and the request's way."""
    began_s = trace.gap_began_s
    met = ", ".join(
        f"{fault.name} [{fault.began_s - began_s:+.2f}, {fault.ended_s - began_s:+.2f}]"
        for fault in _during(trace, faults)
    )
    way = "; ".join(trace.attempts)
    return (
        f"  {trace.gap_s:6.2f} s after {trace.gap_at} messages: {met}\n"
        f"      {way}\n      {trace.times}"
    )
