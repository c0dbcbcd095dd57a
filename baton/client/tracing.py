"""The application's own trace goes along with its requests, where it has one. Nothing of OpenTelemetry is imported that the application
has not imported itself.
"""

import sys


def active_trace() -> tuple[tuple[str, str], ...]:
    """Metadata that names the application's active span, by W3C Trace Context; nothing where there is none. In the thread or task of
    whoever starts a request.
    """
    if sys.modules.get("opentelemetry.trace") is None:
        return ()
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - see the module docstring
        TraceContextTextMapPropagator,
    )

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())
