"""Which requests were in time, and which count for goodput."""

import pytest

from baton.errors import BatonError, CancelledError, CapacityError, UnavailableError
from baton.service.metrics.objectives import NO_OBJECTIVES, Attainment, Objectives, attainment

BOTH = Objectives(ttft_s=1.0, tpot_s=0.1)
GONE, CALLED_OFF = UnavailableError("gone"), CancelledError("by id")


@pytest.mark.parametrize(
    ("objectives", "error", "ttft_s", "tpot_s", "kept"),
    [
        (NO_OBJECTIVES, None, 99.0, 99.0, Attainment(None, None, good=True)),
        (NO_OBJECTIVES, GONE, None, None, Attainment(None, None, good=False)),
        (BOTH, None, 1.0, 0.1, Attainment(ttft=True, tpot=True, good=True)),
        (BOTH, None, 1.1, 0.1, Attainment(ttft=False, tpot=True, good=False)),
        (BOTH, None, 1.0, 0.2, Attainment(ttft=True, tpot=False, good=False)),
        # One token has no time between tokens.
        (BOTH, None, 1.0, None, Attainment(ttft=True, tpot=None, good=True)),
        # The service's fault, before the first token and after it.
        (BOTH, GONE, None, None, Attainment(ttft=False, tpot=None, good=False)),
        (BOTH, CapacityError("full"), None, None, Attainment(ttft=False, tpot=None, good=False)),
        (BOTH, GONE, 0.5, 0.05, Attainment(ttft=True, tpot=True, good=False)),
        # The caller's.
        (BOTH, CALLED_OFF, None, None, Attainment(None, None, good=False)),
        (BOTH, CALLED_OFF, 2.0, None, Attainment(ttft=False, tpot=None, good=False)),
    ],
)
def test_attainment(
    objectives: Objectives,
    error: BatonError | None,
    ttft_s: float | None,
    tpot_s: float | None,
    kept: Attainment,
) -> None:
    assert attainment(objectives, error, ttft_s=ttft_s, tpot_s=tpot_s) == kept
