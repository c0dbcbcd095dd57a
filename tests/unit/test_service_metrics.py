"""What is exported: names, units, labels, and that the figures are right."""

import re
import socket
import struct
from urllib.request import urlopen

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from baton.engine.sim import SimConfig, build_sim_engine
from baton.errors import CapacityError, UnauthenticatedError, UnavailableError
from baton.lifecycle import SPLIT_STAGES, Event, Timeline
from baton.service.metrics import (
    NO_OBJECTIVES,
    MetricsServer,
    Objectives,
    RouterMetrics,
    WorkerMetrics,
    outcome_of,
)
from baton.service.metrics.exposition import SILENT_S, _QuietHandler
from baton.types import ObjectStoreUsage, Role, WorkerLoad
from router.sessions.metrics import SessionMetrics
from router.sessions.store import Counts

LABELS = {
    *("cause", "device", "dtype", "le", "model_name", "objective", "operation", "outcome"),
    *("priority", "reason", "role", "stage", "state"),
}
INFO = build_sim_engine(SimConfig(num_blocks=8)).info


def exposition(metrics: MetricsServer) -> str:
    return generate_latest(metrics.registry).decode()


def value(metrics: MetricsServer, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"{name}{labels}\n{exposition(metrics)}"
    return found


def router() -> RouterMetrics:
    metrics = RouterMetrics()
    timeline = Timeline(received_s=100.0)
    for event, at_s in {
        Event.ADMITTED: 100.125,
        Event.PLACING: 100.125,
        Event.PLACED: 100.25,
        Event.RESERVED: 100.375,
        Event.PREFILL_STARTED: 100.4,
        Event.PREFILLED: 100.45,
        Event.FIRST_TOKEN: 100.5,
        Event.KV_RECEIVED: 100.6,
        Event.LAST_TOKEN: 102.5,
        Event.FINISHED: 103.0,
    }.items():
        timeline.record(event, at_s)
    metrics.record_stages(timeline.durations(SPLIT_STAGES))
    metrics.record_request(
        timeline,
        None,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=5,
        longest_tokens=5,
        objectives=Objectives(ttft_s=1.0, tpot_s=0.1),
    )
    metrics.record_attempt(None, "decode")
    metrics.record_attempt(UnavailableError("gone"), "handoff")
    metrics.record_recovery("failure", 0.2)
    metrics.record_refused_call(UnauthenticatedError("who?"))
    metrics.record_autoscaling(Role.DECODE, UnavailableError("gone"))
    metrics.record_placement(0.00002)
    metrics.record_handoff(0.01, 4096)
    metrics.record_token_gap(0.003)
    metrics.set_workers({(Role.DECODE, "ready"): 2})
    sessions = SessionMetrics(metrics.registry)
    sessions.record_turn(None)
    sessions.set_sessions(Counts(idle=2, generating=1))
    with sessions.operation("get"):
        pass
    return metrics


def worker() -> WorkerMetrics:
    metrics = WorkerMetrics(Role.PREFILL)
    load = WorkerLoad(
        free_blocks=3, cached_blocks=2, used_blocks=1, running_requests=1, waiting_requests=4
    )
    metrics.watch(INFO, lambda: load, lambda: 0.5)
    metrics.set_object_store(
        ObjectStoreUsage(used_bytes=1 << 20, capacity_bytes=1 << 30, spilled_bytes=2 << 20)
    )
    metrics.record_call("ok")
    metrics.record_queue(0.001, prompt_tokens=100, hit_tokens=16)
    metrics.record_prefill(0.1, computed_tokens=84)
    metrics.record_decode_tokens(3)
    metrics.record_preemption()
    metrics.record_handoff(0.02, 1024)
    metrics.record_handoff_failure(CapacityError.reason)
    return metrics


def test_a_requests_stages_are_timed_by_its_lifecycle() -> None:
    metrics = router()
    for stage, seconds in {
        "time_to_first_token": 0.5,
        "time_per_output_token": 0.5,
        "request": 3.0,
        "handoff": 0.01,
        "inter_token_latency": 0.003,
    }.items():
        assert value(metrics, f"baton_{stage}_seconds_sum") == pytest.approx(seconds)
        assert value(metrics, f"baton_{stage}_seconds_count") == 1
    for stage, seconds in {
        "queue": 0.125,
        "placement": 0.125,
        "reserve": 0.125,
        "prefill_queue": 0.025,
        "prefill": 0.05,
        "first_token": 0.05,
        "handoff": 0.15,
        "decode": 1.9,
    }.items():
        assert value(metrics, "baton_stage_seconds_sum", stage=stage) == pytest.approx(seconds)
        assert value(metrics, "baton_stage_seconds_count", stage=stage) == 1
    assert value(metrics, "baton_requests_total", outcome="ok") == 1
    assert value(metrics, "baton_prompt_tokens_total") == 10
    assert value(metrics, "baton_cached_tokens_total") == 4
    assert value(metrics, "baton_completion_tokens_total") == 5
    attempts = "baton_attempts_total"
    assert value(metrics, attempts, outcome="failed", reason="unavailable", stage="handoff") == 1
    assert value(metrics, "baton_handoff_bytes_total") == 4096


def test_a_failed_request_counts_by_its_reason() -> None:
    metrics = RouterMetrics()
    metrics.record_request(
        Timeline(received_s=0.0),
        CapacityError("full"),
        prompt_tokens=10,
        cached_tokens=0,
        completion_tokens=0,
        longest_tokens=0,
    )
    assert value(metrics, "baton_requests_total", outcome="no_capacity") == 1
    assert value(metrics, "baton_request_seconds_count") == 0


def measured(completion_tokens: int, longest_tokens: int, *, goes_on: bool) -> RouterMetrics:
    metrics, timeline = RouterMetrics(), Timeline(received_s=0.0)
    timeline.record(Event.FIRST_TOKEN, 0.5)
    timeline.record(Event.LAST_TOKEN, 2.5)
    metrics.record_request(
        timeline,
        None,
        prompt_tokens=10,
        cached_tokens=0,
        completion_tokens=completion_tokens,
        longest_tokens=longest_tokens,
        objectives=NO_OBJECTIVES if goes_on else Objectives(ttft_s=1.0, tpot_s=0.1),
        goes_on=goes_on,
    )
    return metrics


def test_the_time_for_a_token_is_that_of_one_completion_however_many_there_are() -> None:
    metrics = measured(20, 5, goes_on=False)
    assert value(metrics, "baton_time_per_output_token_seconds_sum") == 0.5
    assert value(metrics, "baton_slo_requests_total", objective="tpot", outcome="missed") == 1


def test_an_answer_that_goes_on_says_nothing_of_how_long_its_client_waited() -> None:
    metrics = measured(100, 1000, goes_on=True)
    assert value(metrics, "baton_completion_tokens_total") == 100
    assert value(metrics, "baton_time_to_first_token_seconds_count") == 0
    assert value(metrics, "baton_time_per_output_token_seconds_count") == 0


def test_workers_that_left_are_no_longer_counted() -> None:
    metrics = router()
    metrics.set_workers({(Role.PREFILL, "ready"): 1})
    assert value(metrics, "baton_workers", role="prefill", state="ready") == 1
    assert value(metrics, "baton_workers", role="decode", state="ready") == 0


def test_a_workers_series_carry_its_role() -> None:
    metrics = worker()
    role = "prefill"
    assert value(metrics, "baton_worker_kv_blocks", role=role, state="free") == 3
    assert value(metrics, "baton_worker_running_requests", role=role) == 1
    assert value(metrics, "baton_worker_engine_stalled_seconds", role=role) == 0.5
    assert value(metrics, "baton_worker_prefill_tokens_total", role=role) == 84
    assert value(metrics, "baton_worker_prefix_cache_hit_tokens_total", role=role) == 16
    assert (
        value(metrics, "baton_worker_handoff_failures_total", role=role, reason="no_capacity") == 1
    )


@pytest.mark.parametrize("metrics", [router(), worker()], ids=["router", "worker"])
def test_names_and_labels_follow_the_conventions(metrics: MetricsServer) -> None:
    """Counters end in _total, durations and sizes in their base unit, no label holds an id."""
    families = [
        family
        for family in text_string_to_metric_families(exposition(metrics))
        if not family.name.startswith("process_") and not family.name.endswith("_created")
    ]
    assert len(families) > 10
    for family in families:
        assert re.fullmatch(r"baton_[a-z]+(_[a-z]+)*", family.name), family.name
        assert family.documentation
        assert not re.search("_(ms|millis|kb|mb|total)$", family.name)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, sample
            assert family.type != "counter" or sample.name.endswith(("_total", "_created"))


def test_buckets_reach_down_to_a_millisecond() -> None:
    assert value(router(), "baton_stage_seconds_bucket", stage="queue", le="0.001") == 0


def test_the_port_serves_the_registry_and_is_free_again_afterwards() -> None:
    first, second = router(), router()
    port = first.serve("127.0.0.1", 0)
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"baton_requests_total" in answer.read()
    with pytest.raises(UnavailableError, match=str(port)):
        second.serve("127.0.0.1", port)
    first.close()
    first.close()
    assert second.serve("127.0.0.1", port) == port
    second.close()


def test_a_connection_that_asks_nothing_is_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise: it holds a thread for a while only, whether it says nothing at all or stops in the middle; so does one that breaks."""
    assert 0 < SILENT_S < 60
    assert _QuietHandler.timeout == SILENT_S
    monkeypatch.setattr(_QuietHandler, "timeout", 0.1)
    metrics = router()
    address = ("127.0.0.1", metrics.serve("127.0.0.1", 0))
    for said in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection(address, timeout=5) as silent:
            silent.sendall(said)
            assert silent.recv(1) == b""
    with socket.create_connection(address, timeout=5) as broken:
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with urlopen(f"http://127.0.0.1:{address[1]}/metrics", timeout=5) as answer:
        assert answer.status == 200
    metrics.close()
    assert capsys.readouterr().err == ""


def test_a_worker_serves_vllms_names_at_a_path_of_their_own() -> None:
    """Promise: one page has only Baton's names, the other only vLLM's, with the load in them."""
    metrics = worker()
    port = metrics.serve("127.0.0.1", 0)

    def values(path: str) -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            page = answer.read().decode()
        families = text_string_to_metric_families(page)
        return {family.name: family.samples[0].value for family in families if family.samples}

    own, vllm = values("/metrics"), values("/metrics/vllm")
    metrics.close()
    assert "baton_worker_kv_blocks" in own
    assert not any(":" in name for name in own)
    assert vllm == {
        "vllm:cache_config_info": 1,
        "vllm:kv_cache_usage_perc": 1 / 8,
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 4,
    }


def test_outcomes_are_the_reasons_of_the_error_tree() -> None:
    assert (outcome_of(None), outcome_of(CapacityError("x"))) == ("ok", "no_capacity")
