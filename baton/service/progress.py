"""Whether a worker makes progress: a pure decision from what its engine tells, for health and for routers."""

from dataclasses import dataclass

from baton.service.settings import WorkerSettings

STALL_FACTOR = 4.0
"""A step may take so many times what the slowest recent one of its size took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgress:
    """What the engine tells; see `baton.engine.aio.AsyncEngine`."""

    failed: bool
    stalled_s: float
    expected_s: float | None
    stuck_s: float


@dataclass(frozen=True, slots=True)
class Problem:
    """Why new requests would not get on."""

    reason: str
    alive: bool
    """The process is sound, and what it waits for may still come."""


def problem_of(engine: EngineProgress, settings: WorkerSettings) -> Problem | None:
    """None where the engine gets on, or has nothing to do."""
    if engine.failed:
        return Problem("the engine failed", alive=False)
    if engine.stalled_s >= step_limit_s(engine.expected_s, settings):
        return Problem(f"a step has run for {engine.stalled_s:.1f} s", alive=False)
    # What a step under way has taken is the step's: blocks move at its end.
    unmoved_s = engine.stuck_s - engine.stalled_s
    if unmoved_s >= settings.progress_limit_s:
        reason = f"requests have waited for {unmoved_s:.1f} s for blocks that do not move"
        return Problem(reason, alive=True)
    return None


def step_limit_s(expected_s: float | None, settings: WorkerSettings) -> float:
    """How long a step may take that should take `expected_s`; None is a step of a size that is new."""
    if expected_s is None:
        return settings.stall_limit_s
    return min(settings.stall_limit_s, max(settings.progress_limit_s, STALL_FACTOR * expected_s))
