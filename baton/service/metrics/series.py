"""What the series of all processes have in common: buckets, label values, and children that are looked up once."""

from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from baton.errors import BatonError

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Histogram buckets: down to what a tiny model on one machine needs."""

DECISION_SECONDS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.1),
)
"""Of what is computed on the event loop, where more than a millisecond holds others up."""

ERROR_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Histogram buckets, in both directions."""

OK = "ok"
"""The outcome, and the failure reason, of what did not fail."""


def outcome_of(error: BatonError | None) -> str:
    """A label value."""
    return OK if error is None else error.reason.lower()


def priority_class(priority: int) -> str:
    """A label value."""
    return "normal" if priority == 0 else "high" if priority > 0 else "low"


_M = TypeVar("_M", Counter, Gauge, Histogram)


class Children(Generic[_M]):
    """A metric's children by label values. The client library's own lookup takes a lock and several times as long as counting does."""

    def __init__(self, metric: _M) -> None:
        self._metric: _M = metric
        self._children: dict[tuple[str, ...], _M] = {}

    def __call__(self, *values: str) -> _M:
        """The child of these values, which exists from now on: at 0, so that its first increase is one."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values)
        return child

    def clear(self) -> None:
        """Forgets every child."""
        self._children.clear()
        self._metric.clear()
