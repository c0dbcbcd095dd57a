"""PromQL over Baton's series. Each expression keeps to the jobs that the dashboard's variable selects."""

JOB = 'job=~"$job"'
INTERVAL = "$__rate_interval"


def series(metric: str, *where: str) -> str:
    """A selector. Each `where` is a label matcher."""
    return f"{metric}{{{', '.join([JOB, *where])}}}"


def rate(metric: str, *where: str) -> str:
    """What a counter gains in a second."""
    return f"rate({series(metric, *where)}[{INTERVAL}])"


def total(expression: str, *by: str) -> str:
    """Added up, apart for each value of the labels `by`."""
    return f"sum{_by(by)} ({expression})"


def rates(metric: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """What counters gain in a second together."""
    return total(rate(metric, *where), *by)


def gauges(metric: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Gauges added up."""
    return total(series(metric, *where), *by)


def quantile(q: float, histogram: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Of what a histogram observed within the interval."""
    return f"histogram_quantile({q}, {rates(f'{histogram}_bucket', 'le', *by, where=where)})"


def mean(histogram: str, *by: str, where: tuple[str, ...] = ()) -> str:
    """Of what a histogram observed within the interval."""
    observed = rates(f"{histogram}_count", *by, where=where)
    return f"{rates(f'{histogram}_sum', *by, where=where)} / {observed}"


def share(part: str, whole: str) -> str:
    """A ratio of two expressions."""
    return f"{part} / {whole}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
