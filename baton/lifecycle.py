"""The named events of a request, and the timeline that records them: the one clock behind spans, histograms and the timings
returned to clients.

A timeline belongs to one request on one process and is written by that process's event loop only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Event(Enum):
    """Instants in a request's life, in the order in which an undisturbed one meets them."""

    # Members are singletons; an enum's own hash is a Python function, and timelines are looked up all the time.
    __hash__ = object.__hash__

    RECEIVED = "received"
    ADMITTED = "admitted"
    PLACING = "placing"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILL_STARTED = "prefill_started"
    PREFILLED = "prefilled"
    FIRST_TOKEN = "first_token"
    KV_RECEIVED = "kv_received"
    LAST_TOKEN = "last_token"
    FINISHED = "finished"
    # Of disturbed ones only.
    LOST = "lost"
    RECOVERED = "recovered"


Stages = Mapping[str, tuple[Event, Event]]
"""What a request waits for, from one event to another."""

_PLACEMENT: Stages = {
    "placement": (Event.PLACING, Event.PLACED),
    "reserve": (Event.PLACED, Event.RESERVED),
}
SPLIT_STAGES: Stages = {
    **_PLACEMENT,
    "prefill_queue": (Event.RESERVED, Event.PREFILL_STARTED),
    "prefill": (Event.PREFILL_STARTED, Event.PREFILLED),
    "handoff": (Event.PREFILLED, Event.KV_RECEIVED),
}
"""Of an attempt whose prompt another worker computes."""
LOCAL_STAGES: Stages = {**_PLACEMENT, "prefill": (Event.RESERVED, Event.KV_RECEIVED)}
"""Of one whose prompt decode computes."""
MOVED_STAGES: Stages = {**_PLACEMENT, "handoff": (Event.RESERVED, Event.KV_RECEIVED)}
"""Of one that takes its KV from another decode worker."""
REQUEST_STAGES: Stages = {
    "queue": (Event.RECEIVED, Event.ADMITTED),
    "first_token": (Event.PREFILLED, Event.FIRST_TOKEN),
    "decode": (Event.KV_RECEIVED, Event.LAST_TOKEN),
}
"""Of a request, whatever its attempts."""
STAGES = ("queue", *SPLIT_STAGES, "first_token", "decode")
"""All names."""

_ATTEMPT = (Event.PLACED, Event.RESERVED, Event.PREFILL_STARTED, Event.PREFILLED, Event.KV_RECEIVED)
"""What each attempt meets anew."""


@dataclass(slots=True)
class Timeline:
    """When each event happened, in seconds after RECEIVED. Later records replace earlier ones, except FIRST_TOKEN, which a
    recovery does not move.
    """

    received_s: float
    """Monotonic clock."""
    _at_s: dict[Event, float] = field(default_factory=dict)

    def record(self, event: Event, now_s: float) -> None:
        """`now_s` is the monotonic clock. PLACING begins an attempt: what an earlier one met is forgotten."""
        if event is Event.FIRST_TOKEN and event in self._at_s:
            return
        if event is Event.PLACING:
            for each in _ATTEMPT:
                self._at_s.pop(each, None)
        self._at_s[event] = now_s - self.received_s

    def at_s(self, event: Event) -> float | None:
        """Seconds after RECEIVED, or None where the event has not happened."""
        return 0.0 if event is Event.RECEIVED else self._at_s.get(event)

    def between_s(self, start: Event, end: Event) -> float | None:
        """Duration of a stage, or None where either end has not happened."""
        first, last = self.at_s(start), self.at_s(end)
        return None if first is None or last is None else last - first

    def durations(self, stages: Stages) -> Iterator[tuple[str, float]]:
        """Names and seconds of the stages that have ended. One whose end came before its start was another attempt's."""
        for name, (start, end) in stages.items():
            seconds = self.between_s(start, end)
            if seconds is not None and seconds >= 0:
                yield name, seconds
