"""A worker's load by the names that vLLM's dashboards and the Gateway API's inference extension know. Their colon is one that `promtool
check metrics` does not let pass, so they have a registry, and a path, of their own.

The collector runs on the scrape's thread.
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.base import EngineInfo
from baton.types import WorkerLoad

PATH = "/metrics/vllm"
ENGINE = "0"
"""VLLM numbers the engines behind one port; here there is one."""


class VllmCollector(Collector):
    """With vLLM's labels and meanings, from one snapshot a scrape."""

    def __init__(self, info: EngineInfo, load: Callable[[], WorkerLoad]) -> None:
        self._info = info
        self._load = load

    def collect(self) -> Iterator[Metric]:
        info, load = self._info, self._load()
        held = load.reserved_blocks + load.used_blocks + load.in_flight_blocks
        for name, text, value in (
            (
                "num_requests_running",
                "As baton_worker_running_requests.",
                float(load.running_requests),
            ),
            (
                "num_requests_waiting",
                "As baton_worker_waiting_requests.",
                float(load.waiting_requests),
            ),
            (
                "kv_cache_usage_perc",
                "Share of the KV pool's blocks that requests hold, 0 to 1.",
                held / info.num_blocks,
            ),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["engine", "model_name"])
            gauge.add_metric([ENGINE, info.model], value)
            yield gauge
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV pool's shape; always 1.",
            labels=["engine", "block_size", "num_gpu_blocks"],
        )
        cache.add_metric([ENGINE, str(info.block_size_tokens), str(info.num_blocks)], 1)
        yield cache
