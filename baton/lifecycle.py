"""The named events of a request, and the timeline that records them: the one clock behind spans, histograms and the timings
returned to clients.

A timeline belongs to one request on one process and is written by that process's event loop only.
"""

from dataclasses import dataclass, field
from enum import Enum


class Event(Enum):
    """Instants in a request's life, in the order in which an undisturbed one meets them."""

    # Members are singletons; an enum's own hash is a Python function, and timelines are looked up all the time.
    __hash__ = object.__hash__

    RECEIVED = "received"
    ADMITTED = "admitted"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"
    KV_RECEIVED = "kv_received"
    LAST_TOKEN = "last_token"
    FINISHED = "finished"


@dataclass(slots=True)
class Timeline:
    """When each event happened, in seconds after RECEIVED. Later records replace earlier ones, except FIRST_TOKEN, which a
    recovery does not move.
    """

    received_s: float
    """Monotonic clock."""
    _at_s: dict[Event, float] = field(default_factory=dict)

    def record(self, event: Event, now_s: float) -> None:
        """`now_s` is the monotonic clock."""
        if event is Event.FIRST_TOKEN and event in self._at_s:
            return
        self._at_s[event] = now_s - self.received_s

    def at_s(self, event: Event) -> float | None:
        """Seconds after RECEIVED, or None where the event has not happened."""
        return 0.0 if event is Event.RECEIVED else self._at_s.get(event)

    def between_s(self, start: Event, end: Event) -> float | None:
        """Duration of a stage, or None where either end has not happened."""
        first, last = self.at_s(start), self.at_s(end)
        return None if first is None or last is None else last - first
