"""What an engine measures of its own speed, and that its load tells it."""

import pytest

from baton.engine.base import EngineRequest, Mode
from baton.engine.sim import SimConfig, build_sim_engine
from baton.engine.speed import SpeedMeter
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence


def test_nothing_is_known_before_the_first_step() -> None:
    meter = SpeedMeter()
    assert (meter.prefill_tokens_per_s, meter.decode_step_s) == (0.0, 0.0)


def test_a_steady_engine_is_measured_exactly() -> None:
    meter = SpeedMeter()
    for _ in range(10):
        meter.record(prefill_tokens=500, generating=0, seconds=0.05)
        meter.record(prefill_tokens=0, generating=8, seconds=0.02)
    assert meter.prefill_tokens_per_s == pytest.approx(10_000)
    assert meter.decode_step_s == pytest.approx(0.02)


def test_the_short_end_of_a_prompt_does_not_make_an_engine_look_slow() -> None:
    """Half of the steps compute one token in 10 ms: the speed is still that of what is computed."""
    meter = SpeedMeter()
    for _ in range(50):
        meter.record(prefill_tokens=512, generating=0, seconds=0.05)
        meter.record(prefill_tokens=1, generating=0, seconds=0.01)
    assert meter.prefill_tokens_per_s == pytest.approx(513 / 0.06, rel=0.05)


def test_a_change_of_speed_is_followed() -> None:
    meter = SpeedMeter()
    for seconds in [0.01] * 100 + [0.04] * 100:
        meter.record(prefill_tokens=100, generating=1, seconds=seconds)
    assert meter.prefill_tokens_per_s == pytest.approx(2500, rel=0.05)
    assert meter.decode_step_s == pytest.approx(0.04, rel=0.05)


def test_an_engines_load_tells_its_speed() -> None:
    engine = build_sim_engine(SimConfig(max_batch_tokens=64, token_s=1e-5))
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    sequence = Sequence(tuple(range(1, 200)), (), sampling)
    engine.add(EngineRequest(AttemptKey(RequestId("r")), sequence, Mode.LOCAL))
    while engine.has_work():
        engine.step()
    load = engine.load()
    assert 0 < load.prefill_tokens_per_s <= 100_000
    assert load.decode_step_s > 0
