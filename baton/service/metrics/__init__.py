"""What a process tells Prometheus. One object per process, with a registry of its own and one HTTP port.

    series      buckets, label values, children looked up once
    exposition  a registry and its HTTP port
    objectives  which requests were in time, and count for goodput
    router      whole requests, attempts, the fleet
    worker      one worker's engine, pool and handoffs
    load        what a worker's scrape samples, and the names that vLLM's dashboards know

Labels are closed sets (roles, states, outcomes, error reasons), never ids or texts of tenants. Recorded on the event loop; the scrape
runs on the HTTP server's thread and only reads. Durations of requests come from their lifecycle events (`baton.lifecycle`).
"""

from baton.service.metrics.exposition import MetricsServer
from baton.service.metrics.objectives import NO_OBJECTIVES, Objectives
from baton.service.metrics.router import RouterMetrics
from baton.service.metrics.series import OK, SECONDS, Children, outcome_of
from baton.service.metrics.worker import WorkerMetrics

__all__ = [
    "NO_OBJECTIVES",
    "OK",
    "SECONDS",
    "Children",
    "MetricsServer",
    "Objectives",
    "RouterMetrics",
    "WorkerMetrics",
    "outcome_of",
]
