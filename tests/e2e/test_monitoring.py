"""A real Prometheus scrapes a served fleet that works, fails and recovers: every panel of every dashboard shows something, and an alert
reaches whoever is to be told.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import yaml

from baton.client import Client, Result, SamplingOptions
from baton.errors import CapacityError, InvalidRequestError
from baton.types import Role, WorkerInfo
from tests.dashboards import DASHBOARDS, RULES, PanelQuery, load, queries
from tests.faults.probes import load_of
from tests.prometheus import Prometheus, alertmanager, prometheus, promtool, webhook
from tests.served import Served, served, until

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(180)]

FLAGS = (
    *("--engine", "sim", "--transport", "ray", "--decode", "2", "--kv-tokens", "65536"),
    # So that an answer takes seconds: a worker that is killed while it generates has most of it before it.
    *("--step-ms", "2", "--max-batch-tokens", "64", "--max-context", "8192"),
)
SETTINGS = {
    "BATON_MAX_RUNNING": "2",
    "BATON_TTFT_TARGET_S": "1",
    "BATON_TPOT_TARGET_S": "0.05",
    "BATON_SESSION_STORE": "sqlite://",
}
LOAD_S = 4.0
SEEN_S = 60.0
"""How long Prometheus has to see what happened, on a busy machine."""
ALERT = "BatonRecoveries"
SCALED = Path(__file__).parents[2] / "k8s/components/keda/scaledobjects.yaml"


@pytest.fixture(scope="module")
def alerts() -> Iterator[tuple[str, "SimpleQueue[dict[str, Any]]"]]:
    with webhook() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def watched(
    alerts: tuple[str, "SimpleQueue[dict[str, Any]]"], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A fleet that was scraped before, while and after it had everything happen to it."""
    directory = tmp_path_factory.mktemp("monitoring")
    with pytest.MonkeyPatch.context() as environ:
        for name, value in SETTINGS.items():
            environ.setenv(name, value)
        with served(directory, *FLAGS) as fleet, alertmanager(directory, alerts[0]) as manager:
            jobs = {
                "baton-router": [router_metrics(fleet)],
                "baton-workers": [worker.metrics_address for worker in fleet.workers()],
            }
            rules = [at_once(path, directory) for path in RULES]
            with prometheus(directory, jobs, rules=rules, alertmanager=manager) as server:
                until(lambda: num_up(server) == 4, SEEN_S, "every process is scraped")
                put_through_it(fleet)
                yield server


def router_metrics(fleet: Served) -> str:
    found = re.search(r"metrics\s+http://(\S+)/metrics", fleet.output())
    assert found is not None, fleet.output()
    return found[1]


def num_up(server: Prometheus) -> float:
    """Processes that were scraped twice at least."""
    return sum(each.value for each in server.query("sum_over_time(up[1m]) >= bool 2"))


def at_once(rules: Path, directory: Path) -> Path:
    """The same rules, but nobody waits for an alert."""
    content = yaml.safe_load(rules.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    changed = directory / rules.name
    changed.write_text(yaml.safe_dump(content))
    return changed


def put_through_it(fleet: Served) -> None:
    """A decode worker killed under requests; prompts that wait for prefill; then requests side by side, sessions, refusals, and a
    request that cannot be.
    """
    kill_under_requests(fleet)
    queue_prompts(fleet)
    stop_at_s = time.monotonic() + LOAD_S
    failures: SimpleQueue[BaseException] = SimpleQueue()

    def repeat(work: Callable[[Client, int], None]) -> None:
        number = 0
        try:
            with Client(fleet.address) as client:
                while number < 3 or time.monotonic() < stop_at_s:
                    work(client, number)
                    number += 1
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.put(error)

    works = [ask, ask, ask, talk]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    with Client(fleet.address) as client:
        with pytest.raises(InvalidRequestError):
            client.complete([1, 2, 3], sampling=SamplingOptions(temperature=-1))
        with pytest.raises(CapacityError):
            client.complete(prompt(9), ttft_slo_s=1e-9)
    for thread in threads:
        thread.join(60)
    with suppress(Empty):
        raise failures.get(block=False)


def prompt(number: int) -> list[int]:
    return [2 + (number * 31 + position * 7) % 200 for position in range(300)]


def ask(client: Client, number: int) -> None:
    client.complete(prompt(number % 7), sampling=SamplingOptions(max_tokens=40, ignore_eos=True))


def talk(client: Client, number: int) -> None:
    """One session, turn after turn."""
    session = client.sessions.create()
    for turn in range(3):
        client.complete(
            prompt(50 + number)[: 60 + turn],
            session=session,
            sampling=SamplingOptions(max_tokens=10, ignore_eos=True),
        )


def kill_under_requests(fleet: Served) -> None:
    """A worker that has just begun to generate, of requests that take long together; whatever it had goes on where it was."""
    decodes = fleet.workers(Role.DECODE)

    def answer(number: int) -> Result:
        long = SamplingOptions(max_tokens=1500, ignore_eos=True, seed=1)
        with Client(fleet.address) as client:
            return client.complete(prompt(70 + number), sampling=long)

    busy: list[WorkerInfo] = []

    def generates() -> bool:
        busy.extend(worker for worker in decodes if load_of(worker).running_requests)
        return bool(busy)

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer, number) for number in range(8)]
        until(generates, 30, "a decode worker generates")
        fleet.kill(busy[0])
        results = [each.result(60) for each in answers]
    assert {len(result.token_ids) for result in results} == {1500}
    assert any(len(result.attempts) > 1 for result in results)


def queue_prompts(fleet: Served) -> None:
    """For seconds, one prompt waits while prefill computes another."""

    def ask_long(number: int) -> None:
        with Client(fleet.address) as client:
            client.complete(prompt(80 + number) * 20, sampling=SamplingOptions(max_tokens=2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_long, range(16)))


def dead(server: Prometheus, left: list[PanelQuery]) -> list[PanelQuery]:
    return [
        query
        for query in left
        if not any(not math.isnan(sample.value) for sample in server.query(query.sent))
    ]


def test_every_panels_every_query_shows_data(watched: Prometheus) -> None:
    """Promise: no panel is dead. Fails with the list of those that are."""
    nobody = PanelQuery("none", "none", "rate(baton_never_total[$__rate_interval])")
    assert dead(watched, [nobody]) == [nobody]
    left = queries()
    assert len(left) > 80
    end_s = time.monotonic() + SEEN_S
    while (left := dead(watched, left)) and time.monotonic() < end_s:
        time.sleep(0.5)
    assert not left, "\n".join(f"{each.board} / {each.panel}: {each.expr}" for each in left)


def test_the_job_variable_offers_routers_and_workers(watched: Prometheus) -> None:
    for path in DASHBOARDS:
        (job,) = [each for each in load(path)["templating"]["list"] if each["name"] == "job"]
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", job["query"]["query"])
        assert asked is not None
        assert watched.label_values(asked[1], asked[2]) == {"baton-router", "baton-workers"}


def test_workers_tell_of_rays_object_store(watched: Prometheus) -> None:
    """Promise: its size and use are the raylet's own, and all workers of a node tell the same."""
    for name in ("used", "capacity"):
        told = watched.query(f"max_over_time(baton_worker_object_store_{name}_bytes[2m])")
        assert len(told) == 3
    assert {sample.value for sample in told} == {told[0].value}
    assert told[0].value >= 128 * 2**20


def test_prometheus_finds_no_fault(watched: Prometheus) -> None:
    """Promise: what the processes of a fleet export, Ray's object store too, is clean by `promtool check metrics`."""
    pages: dict[str, str] = {}

    def all_there() -> bool:
        pages.clear()
        pages.update(watched.pages())
        return len(pages) == 3

    until(
        all_there, SEEN_S, "a router and two workers are scraped: the one that was killed is gone"
    )
    assert any("baton_worker_object_store_used_bytes" in page for page in pages.values())
    for page in pages.values():
        checked = promtool("check", "metrics", stdin=page)
        assert (checked.stdout + checked.stderr).splitlines() == []


def test_keda_gets_a_number_for_what_it_scales_by(watched: Prometheus) -> None:
    """Promise: the queries that ship give one number each, which is above 0 while there is work."""
    scaled = list(yaml.safe_load_all(SCALED.read_text()))
    assert {each["metadata"]["name"] for each in scaled} == {"baton-prefill", "baton-decode"}
    for each in scaled:
        (trigger,) = each["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        assert len(watched.query(query)) == 1
        (most,) = watched.query(f"max_over_time(({query})[2m:500ms])")
        assert most.value > 0
        assert most.value <= 2 or each["metadata"]["name"] == "baton-prefill"


def test_an_alert_reaches_whoever_is_told(
    watched: Prometheus, alerts: tuple[str, "SimpleQueue[dict[str, Any]]"]
) -> None:
    """Promise: what Prometheus finds by the shipped rules goes through Alertmanager to a receiver, with its words."""
    until(lambda: bool(watched.query(f'ALERTS{{alertname="{ALERT}"}}')), SEEN_S, "it fires")
    end_s = time.monotonic() + SEEN_S
    while True:
        told = alerts[1].get(timeout=max(0.1, end_s - time.monotonic()))
        found = [each for each in told["alerts"] if each["labels"]["alertname"] == ALERT]
        if found:
            break
    assert found[0]["status"] == "firing"
    assert found[0]["labels"]["severity"] == "warning"
    assert "Clients saw a pause" in found[0]["annotations"]["description"]


def test_recording_rules_give_ratios(watched: Prometheus) -> None:
    """Promise: what alerts are made of has values between 0 and 1 on a live fleet."""
    for rule in (
        "ttft_missed:ratio_rate5m",
        "requests_failed:ratio_rate5m",
        "kv_blocks_held:ratio",
    ):
        values = [sample.value for sample in watched.query(f"baton:{rule}")]
        assert values
        assert all(0 <= value <= 1 for value in values if not math.isnan(value))
