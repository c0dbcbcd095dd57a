"""What sessions tell Prometheus: series of the router's registry. Recorded on the event loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.errors import BatonError, UnavailableError
from baton.service.metrics import OK, SECONDS, Children, outcome_of
from router.sessions.store import Counts


class SessionMetrics:
    """See the module docstring."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sessions = Gauge(
            "baton_sessions", "Sessions in the store, by state.", ["state"], registry=registry
        )
        self._turns = Children(
            Counter(
                "baton_session_turns_total", "Turns by outcome.", ["outcome"], registry=registry
            )
        )
        self._turns(OK)
        self._prompt_tokens = Counter(
            "baton_session_prompt_tokens_total",
            "Prompt tokens of turns that finished, with their history.",
            registry=registry,
        )
        self._cached_tokens = Counter(
            "baton_session_cached_tokens_total",
            "Those whose KV came from a prefix cache.",
            registry=registry,
        )
        self._expired = Counter(
            "baton_sessions_expired_total", "Sessions whose time had come.", registry=registry
        )
        self._store_s = Children(
            Histogram(
                "baton_session_store_seconds",
                "Operations of the session store.",
                ["operation"],
                buckets=SECONDS,
                registry=registry,
            )
        )
        self._store_failures = Children(
            Counter(
                "baton_session_store_failures_total",
                "Operations of the session store that failed.",
                ["operation"],
                registry=registry,
            )
        )

    def record_turn(self, error: BatonError | None) -> None:
        """Counts a turn at its end."""
        self._turns(outcome_of(error)).inc()

    def record_tokens(self, *, prompt: int, cached: int) -> None:
        """Of a turn that finished."""
        self._prompt_tokens.inc(prompt)
        self._cached_tokens.inc(cached)

    def record_expired(self, count: int) -> None:
        self._expired.inc(count)

    def set_sessions(self, counts: Counts) -> None:
        """What the store held a moment ago."""
        self._sessions.labels("idle").set(counts.idle)
        self._sessions.labels("generating").set(counts.generating)

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Times an operation of the store, and counts those that it did not answer."""
        failures = self._store_failures(name)
        began_s = time.monotonic()
        try:
            yield
        except UnavailableError:
            failures.inc()
            raise
        finally:
            self._store_s(name).observe(time.monotonic() - began_s)
