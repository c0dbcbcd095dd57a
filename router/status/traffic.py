"""What went through in the last minutes: one slot a second, and in each the counts and latencies of that second.

A ring of slots of fixed number; a slot is made anew when its second comes around again, so that an idle router does nothing. Latencies
are counted in buckets each 10 % wider than the one before: percentiles are right to 5 %, and recording one is a logarithm and an addition.

Pure; `now_s` is the monotonic clock. Written and read on the router's event loop.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from router.status.snapshot import LatencyStatus, RateStatus, TrafficStatus

SLOTS = 120
RECENT_SLOTS = 5
"""Of a rate that is told as the present one."""

_WIDTH = math.log(1.1)

Buckets = Counter[int]


@dataclass(slots=True)
class Slot:
    """One second."""

    second: int
    ttft: Buckets = field(default_factory=Buckets)
    itl: Buckets = field(default_factory=Buckets)
    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    handoff_bytes: int = 0


class Traffic:
    """See the module docstring."""

    def __init__(self) -> None:
        self._ring: list[Slot | None] = [None] * SLOTS
        self._told: tuple[int, TrafficStatus] | None = None
        """The last status, and the second in which it was made."""

    def slot(self, now_s: float) -> Slot:
        """The present one, to be added to at once."""
        second = int(now_s)
        slot = self._ring[second % SLOTS]
        if slot is None or slot.second != second:
            slot = self._ring[second % SLOTS] = Slot(second)
        return slot

    def status(self, now_s: float) -> TrafficStatus:
        """Of the seconds that are over, the oldest first. Made once a second, however many ask."""
        second = int(now_s)
        if self._told is None or self._told[0] != second:
            self._told = (second, self._status(self._past(second)))
        return self._told[1]

    def _status(self, slots: Sequence[Slot]) -> TrafficStatus:
        return TrafficStatus(
            window_s=float(len(slots)),
            slot_s=1.0,
            ttft=_latency([slot.ttft for slot in slots]),
            itl=_latency([slot.itl for slot in slots]),
            requests=_rate(slot.requests for slot in slots),
            failures=_rate(slot.failures for slot in slots),
            prompt_tokens=_rate(slot.prompt_tokens for slot in slots),
            completion_tokens=_rate(slot.completion_tokens for slot in slots),
            handoff_bytes=_rate(slot.handoff_bytes for slot in slots),
        )

    def _past(self, second: int) -> list[Slot]:
        past = []
        for each in range(second - SLOTS + 1, second):
            slot = self._ring[each % SLOTS]
            past.append(slot if slot is not None and slot.second == each else Slot(each))
        return past


class Meter:
    """Adds what one request does to every `Traffic` that it is part of."""

    def __init__(self, parts: Iterable[Traffic] = ()) -> None:
        self._parts = tuple(parts)

    def tokens(self, count: int, now_s: float, *, gap_s: float | None = None) -> None:
        """A message with so many tokens, so long after the one before; None where there was none."""
        bucket = None if gap_s is None else bucket_of(gap_s)
        for part in self._parts:
            slot = part.slot(now_s)
            slot.completion_tokens += count
            if bucket is not None:
                slot.itl[bucket] += 1

    def first_tokens(self, count: int, now_s: float, *, ttft_s: float) -> None:
        """The first message with tokens, so long after the request."""
        bucket = bucket_of(ttft_s)
        for part in self._parts:
            slot = part.slot(now_s)
            slot.ttft[bucket] += 1
            slot.completion_tokens += count

    def handoff(self, num_bytes: int, now_s: float) -> None:
        """KV came from prefill to decode."""
        for part in self._parts:
            part.slot(now_s).handoff_bytes += num_bytes

    def ended(self, prompt_tokens: int, now_s: float, *, failed: bool) -> None:
        """A request ended."""
        for part in self._parts:
            slot = part.slot(now_s)
            slot.requests += 1
            slot.failures += failed
            slot.prompt_tokens += prompt_tokens


def bucket_of(seconds: float) -> int:
    """The bucket that a latency falls into; they are numbered from 1 s, upwards and downwards."""
    return math.floor(math.log(max(seconds, 1e-6)) / _WIDTH)


def percentile(buckets: Buckets, share: float) -> float | None:
    """In seconds, the middle of the bucket that the percentile falls into; None where there is no latency."""
    left = share * buckets.total()
    for bucket in sorted(buckets):
        left -= buckets[bucket]
        if left <= 0:
            return math.exp((bucket + 0.5) * _WIDTH)
    return None


def _latency(slots: Sequence[Buckets]) -> LatencyStatus:
    together = Buckets()
    for buckets in slots:
        together.update(buckets)
    p50, p90, p99 = (_rounded(percentile(together, share)) for share in (0.5, 0.9, 0.99))
    return LatencyStatus(
        count=together.total(),
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        p50_series_s=tuple(_rounded(percentile(buckets, 0.5)) for buckets in slots),
        p99_series_s=tuple(_rounded(percentile(buckets, 0.99)) for buckets in slots),
    )


def _rate(counts: Iterable[int]) -> RateStatus:
    series = tuple(counts)
    recent = series[-RECENT_SLOTS:]
    return RateStatus(
        per_s=round(sum(recent) / len(recent), 3),
        mean_per_s=round(sum(series) / len(series), 3),
        series_per_s=series,
    )


def _rounded(seconds: float | None) -> float | None:
    """To the three digits that a percentile is good for."""
    return None if seconds is None else float(f"{seconds:.3g}")
