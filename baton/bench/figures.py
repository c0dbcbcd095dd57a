"""What follows from records. Pure.

    TTFT    first part of the answer - send
    E2E     last part of the answer - send
    ITL     (E2E - TTFT) / (output tokens - 1), of each request with at least two; vLLM and DistServe call it TPOT
    ICL     gaps between parts of an answer, of all requests; vLLM calls it ITL

    duration           last part of any answer - first send
    throughput         answered requests, their input tokens, their output tokens / duration
    goodput            requests that met all objectives / duration; one without a value for an objective did not meet it
    good share         of all requests that were answered or failed

These are AIPerf's formulas under AIPerf's names; percentiles interpolate linearly, as numpy's and AIPerf's. Latencies are of answered
requests only: failures stand beside them. TTFT and E2E are also told from when the request was due, so that a generator that was late, or
had to wait for room, hides nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import numpy as np

from baton.bench.records import OK, UNFINISHED, Record
from baton.errors import FieldViolation, InvalidRequestError

PERCENTILES = (50, 90, 95, 99)


class Objective(Enum):
    """What a service level objective bounds."""

    TTFT = "ttft"
    TPOT = "tpot"
    """The same as ITL."""
    ITL = "itl"
    E2E = "e2e"


@dataclass(frozen=True, slots=True)
class Slo:
    """A bound."""

    objective: Objective
    limit_s: float

    def __str__(self) -> str:
        return f"{self.objective.value}:{self.limit_s * 1e3:g}"


def parse_slos(texts: Sequence[str], option: str) -> tuple[Slo, ...]:
    """From `ttft:MS`, `tpot:MS`, `itl:MS`, `e2e:MS`, one or several in each text. Raises `InvalidRequestError` naming the option."""
    slos = []
    for text in " ".join(texts).replace(",", " ").split():
        name, _, limit = text.partition(":")
        try:
            slo = Slo(Objective(name.lower()), float(limit) / 1e3)
        except ValueError:
            slo = None
        if slo is None or not 0 < slo.limit_s < float("inf"):
            raise InvalidRequestError(
                FieldViolation(option, f"{text!r} is none of ttft:MS, tpot:MS, itl:MS, e2e:MS")
            )
        slos.append(slo)
    return tuple(slos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of seconds, or of tokens."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None of no values."""
        if not values:
            return None
        array = np.asarray(values, np.float64)
        p50, p90, p95, p99 = np.percentile(array, PERCENTILES).tolist()
        return cls(
            count=len(array),
            mean=float(array.mean()),
            min=float(array.min()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(array.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Under all objectives at once."""

    slos: tuple[str, ...]
    requests: int
    requests_per_s: float
    share: float
    """In [0, 1], of all requests that were answered or failed."""
    requests_since_due: int
    """Good where TTFT and E2E count from when the request was due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of a level's requests."""

    answered: int
    failed: int
    unfinished: int
    errors: dict[str, int]
    """Failures by status."""
    duration_s: float
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Distribution | None
    ttft_since_due_s: Distribution | None
    itl_s: Distribution | None
    icl_s: Distribution | None
    e2e_s: Distribution | None
    e2e_since_due_s: Distribution | None
    late_s: Distribution | None
    """Between when requests were due and when they were sent."""
    input_lengths: Distribution | None
    """Tokens, as the next."""
    output_lengths: Distribution | None
    goodput: Goodput | None
    """None without objectives."""


def ttft_s(record: Record) -> float | None:
    """None where nothing came."""
    return record.chunk_s[0] - record.sent_s if record.chunk_s else None


def e2e_s(record: Record) -> float | None:
    """None where nothing came."""
    return record.chunk_s[-1] - record.sent_s if record.chunk_s else None


def itl_s(record: Record) -> float | None:
    """None of fewer than two tokens."""
    tokens = record.output_tokens
    if not record.chunk_s or tokens < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) / (tokens - 1)


def is_good(record: Record, slos: Sequence[Slo], *, since_due: bool = False) -> bool:
    """Whether it was answered and met every objective."""
    wait_s = record.sent_s - record.scheduled_s if since_due else 0.0
    values = {
        Objective.TTFT: _plus(ttft_s(record), wait_s),
        Objective.TPOT: itl_s(record),
        Objective.ITL: itl_s(record),
        Objective.E2E: _plus(e2e_s(record), wait_s),
    }
    reached = [(values[slo.objective], slo.limit_s) for slo in slos]
    return record.status == OK and all(v is not None and v <= limit for v, limit in reached)


def figures_of(records: Sequence[Record], slos: Sequence[Slo] = ()) -> Figures:
    """All that is told of a level. Requests that were answered without a token count, and have no latencies."""
    answered = [record for record in records if record.status == OK]
    errors = Counter(r.status for r in records if r.status not in (OK, UNFINISHED))
    sent = [record for record in records if record.was_sent]
    began_s = min((record.sent_s for record in answered), default=0.0)
    last_s = max((r.chunk_s[-1] if r.chunk_s else r.ended_s for r in answered), default=began_s)
    duration_s = last_s - began_s
    input_tokens = sum(record.input_tokens for record in answered)
    output_tokens = sum(record.output_tokens for record in answered)
    ttft = [(r, v) for r in answered if (v := ttft_s(r)) is not None]
    e2e = [(r, v) for r in answered if (v := e2e_s(r)) is not None]
    return Figures(
        answered=len(answered),
        failed=errors.total(),
        unfinished=len(records) - len(answered) - errors.total(),
        errors=dict(errors.most_common()),
        duration_s=duration_s,
        requests_per_s=_per_s(len(answered), duration_s),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_tokens_per_s=_per_s(input_tokens, duration_s),
        output_tokens_per_s=_per_s(output_tokens, duration_s),
        ttft_s=Distribution.of([v for _, v in ttft]),
        ttft_since_due_s=Distribution.of([v + r.sent_s - r.scheduled_s for r, v in ttft]),
        itl_s=Distribution.of([v for r in answered if (v := itl_s(r)) is not None]),
        icl_s=Distribution.of([b - a for r in answered for a, b in pairwise(r.chunk_s)]),
        e2e_s=Distribution.of([v for _, v in e2e]),
        e2e_since_due_s=Distribution.of([v + r.sent_s - r.scheduled_s for r, v in e2e]),
        late_s=Distribution.of([record.sent_s - record.scheduled_s for record in sent]),
        input_lengths=Distribution.of([record.input_tokens for record in answered]),
        output_lengths=Distribution.of([record.output_tokens for record in answered]),
        goodput=_goodput(records, slos, duration_s, len(answered) + errors.total()),
    )


def _goodput(
    records: Sequence[Record], slos: Sequence[Slo], duration_s: float, ended: int
) -> Goodput | None:
    if not slos:
        return None
    good = sum(is_good(record, slos) for record in records)
    return Goodput(
        slos=tuple(str(slo) for slo in slos),
        requests=good,
        requests_per_s=_per_s(good, duration_s),
        share=good / ended if ended else 0.0,
        requests_since_due=sum(is_good(record, slos, since_due=True) for record in records),
    )


def _plus(value: float | None, more: float) -> float | None:
    return None if value is None else value + more


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
